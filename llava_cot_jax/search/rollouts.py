"""Rollouts: continuations of each candidate of a stage, which tell how often an answer that goes on from it is right.

The continuations of a candidate read its keys and values, and those of the question, where they lie:

    question | candidate, joint | continuation [continuations of each candidate]
"""

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from llava_cot_jax.inference.decoding import Decoder, Samples, continue_samples, start_samples
from llava_cot_jax.inference.ragged_tokens import RaggedTokens, concat
from llava_cot_jax.model.kv_cache import Segment
from llava_cot_jax.rounding import ceil_div
from llava_cot_jax.search.program import candidate_cache, candidate_stops, extend_chain
from llava_cot_jax.search.strategies import SearchSpec
from llava_cot_jax.search.tables import StageTables


def joint_capacity(joint: int) -> int:
    """Return the room that a candidate's cache needs for the ``joint`` tokens that ``append_joints`` adds."""
    return 2 * (1 + joint)


def joint_tokens(tables: StageTables) -> int:
    """Return the largest number of tokens between two stages: a closing and an opening."""
    return tables.closings.capacity + tables.openings.capacity


def row_capacity(spec: SearchSpec, tables: StageTables) -> int:
    """Return the number of tokens that the cache of a candidate has room for, so that it can be continued."""
    return spec.candidate_tokens + joint_capacity(joint_tokens(tables))


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
    logits: Float[Array, "groups vocab"],
    used: Bool[Array, " groups"],
    stop_tables: UInt8[Array, "stages states vocab"],
    keys: Key[Array, " groups"],
    stage: Int[Array, " groups"],
) -> tuple[Segment, Samples]:
    """Sample ``max(spec.num_candidates)`` continuations of each candidate, side by side.

    Args:
        decoder: Model and images.
        spec: Static part of the search, whose candidates are the continuations.
        chain: Segments up to the candidates' own, root first, the last as ``append_joints`` returns it.
        logits: float32 logits after the chain, as ``append_joints`` returns them.
        used: Whether to continue a candidate at all.
        stop_tables: Stop table of each stage of the continuations.
        keys: Random key of each candidate.
        stage: int32, index of the stage of each candidate's continuations in ``spec``.

    Returns:
        The segment of the continuations, but for the last token of each, and the continuations,
        [groups * continuations].
    """
    count, capacity = max(spec.num_candidates), max(spec.max_new_tokens)
    stop = candidate_stops(spec, stop_tables, keys, stage)
    stop = replace(stop, used=stop.used & jnp.repeat(used, count))
    logits = jnp.repeat(logits, count, axis=0)
    samples = start_samples(decoder.config, logits, stop, capacity=capacity, sampling=spec.sampling)
    # Few continuations are as long as they may be. Each step reads all the room that there is, so that the first half
    # of the tokens are sampled with half of it.
    room = ceil_div(capacity, 2)
    layers = decoder.init_cache(len(logits), room)
    for rooms in (room, capacity):
        layers = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, rooms - x.shape[2]), (0, 0))), layers)  # noqa: B023
        until = replace(stop, max_new_tokens=jnp.minimum(stop.max_new_tokens, rooms))
        cache = candidate_cache(layers, chain)
        layers, samples = continue_samples(decoder, samples, cache, until, sampling=spec.sampling)
    return Segment(layers, samples.samples.num_cached), samples.samples
