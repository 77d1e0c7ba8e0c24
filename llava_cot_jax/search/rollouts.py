"""Rollouts: continuations of each candidate of a stage, which tell how often an answer that goes on from it is right.

The continuations of a candidate read its keys and values, and those of the question, where they lie:

    question | candidate, joint | continuation [continuations of each candidate]
"""

from collections.abc import Sequence
from dataclasses import replace

import jax
from jaxtyping import Array, Float, Int, Key, UInt8

from llava_cot_jax.inference.decoding import Decoder, Samples
from llava_cot_jax.inference.ragged_tokens import RaggedTokens, concat
from llava_cot_jax.model.kv_cache import Segment
from llava_cot_jax.search.program import extend_chain, sample_candidates
from llava_cot_jax.search.strategies import SearchSpec


def joint_capacity(joint: int) -> int:
    """Return the room that a candidate's cache needs for the ``joint`` tokens that ``append_joints`` adds."""
    return 2 * (1 + joint)


def append_joints(
    decoder: Decoder, chain: Sequence[Segment], candidates: Samples, joints: RaggedTokens
) -> tuple[Segment, Float[Array, "candidates vocab"]]:
    """Append to candidates the last token of each, which is not cached yet, and what comes between two stages.

    Args:
        decoder: Model and images.
        chain: Segments up to the candidates' own, as in ``sample_continuations``.
        candidates: Candidates, [candidates].
        joints: Tokens after each, [candidates].

    Returns:
        The candidates' segment, and the float32 logits after it.
    """
    tokens = concat((candidates.last_token, joints), 1 + joints.capacity)
    return extend_chain(replace(decoder, prefill_chunk=tokens.capacity), chain, tokens)


@jax.named_scope("rollouts")
def sample_continuations(
    decoder: Decoder,
    spec: SearchSpec,
    chain: tuple[Segment, ...],
    candidates: Samples,
    joints: RaggedTokens,
    stop_tables: UInt8[Array, "stages states vocab"],
    keys: Key[Array, " groups"],
    stage: Int[Array, " groups"],
) -> Samples:
    """Sample ``spec.num_candidates`` continuations of each candidate, side by side.

    Args:
        decoder: Model and images.
        spec: Static part of the search, whose candidates are the continuations.
        chain: Segments up to the candidates' own, root first. The last has a row for each candidate, with the keys and
            values of ``Samples.num_cached`` tokens, and room for ``joint_capacity`` tokens more.
        candidates: Candidates, [groups].
        joints: Tokens between a candidate and its continuations, such as what closes a stage and opens the next,
            [groups]. A candidate without text needs at least one.
        stop_tables: Stop table of each stage of the continuations.
        keys: Random key of each candidate.
        stage: int32, index of the stage of each candidate's continuations in ``spec``.

    Returns:
        The continuations, [groups * continuations].
    """
    own, logits = append_joints(decoder, chain, candidates, joints)
    suffix = decoder.init_cache(len(keys) * max(spec.num_candidates), max(spec.max_new_tokens))
    return sample_candidates(decoder, spec, logits, (*chain[:-1], own), suffix, stop_tables, keys, stage)[1]
