"""The verifier: an absolute score of each candidate, read after the candidate's own cached keys and values.

A probe is appended to every candidate as a new leaf of the chain of segments: what of the candidate is not cached, the
end of the turn, a user's question whether the last part is right, and the beginning of the answer. Nothing that is
cached is read again, and nothing is copied.

    question (shared by candidates) | candidate (cached while it was sampled) | last token | closing | probe
    --------------------------- chain --------------------------------------   ------------- leaf ----------

An adapter of the verifier acts on the tokens of the probe alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llava_cot_jax.inference.decoding import Decoder, EndReason, Samples, prefill
from llava_cot_jax.inference.ragged_tokens import RaggedTokens, concat
from llava_cot_jax.model.kv_cache import KVCache, Segment
from llava_cot_jax.search.lengths import probe_capacity, probe_chunk
from llava_cot_jax.search.tables import VerifierTables


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StageScores:
    """Scores of the candidates of a stage. Those of candidates that the stage does not have are 0.

    Attributes:
        score: float32, probability of "yes" against "no".
        other_probability: float32, probability of anything but the two answers.
        probe_lengths: int32, number of tokens that were read after the candidate's cached ones.
    """

    score: Float[Array, "questions candidates"]
    other_probability: Float[Array, "questions candidates"]
    probe_lengths: Int[Array, "questions candidates"]


@jax.named_scope("verifier")
def score_candidates(
    decoder: Decoder,
    chain: Sequence[Segment],
    candidates: Samples,
    closings: RaggedTokens,
    stage: Int[Array, " questions"],
    tables: VerifierTables,
) -> StageScores:
    """Score the candidates of a stage.

    Args:
        decoder: Model and images.
        chain: Segments up to the candidates' own, root first. The last has a row for each candidate, with the keys and
            values of ``Samples.num_cached`` tokens.
        candidates: Candidates, [questions, candidates].
        closings: Rest of the closing of each candidate that did not write it whole, [questions, candidates].
        stage: int32, index of each question's stage.
        tables: Probes, and the tokens of the two answers.
    """
    shape = candidates.lengths.shape
    is_used = candidates.ended != EndReason.UNUSED
    capacity = probe_capacity(tables, closings.capacity)
    pieces = (candidates.last_token, closings, tables.probes[stage[:, None]])
    probes = concat(pieces, capacity).where(is_used)
    probe_start = (candidates.last_token.lengths + closings.lengths).reshape(-1)
    flat = RaggedTokens(probes.tokens.reshape(-1, capacity), probes.lengths.reshape(-1))
    chunk = probe_chunk(decoder.prefill_chunk, shape[1], capacity)
    leaf = decoder.init_cache(flat.lengths.shape[0], capacity + chunk)
    cache = KVCache(leaf, jnp.zeros_like(flat.lengths), tuple(chain))
    _, logits = prefill(replace(decoder, prefill_chunk=chunk), flat, cache, adapted_from=probe_start)
    answers = logits[:, tables.answers]  # [questions * candidates, 2]
    score = jax.nn.sigmoid(answers[:, 0] - answers[:, 1])  # share of "yes" in the sum of both
    other = 1 - jnp.exp(answers - jax.nn.logsumexp(logits, axis=-1, keepdims=True)).sum(axis=-1)
    score, other = (jnp.where(is_used, x.reshape(shape), 0) for x in (score, other))
    return StageScores(score, other, probes.lengths)


def rank_candidates(
    score: Float[Array, "questions candidates"], mean_log_prob: Float[Array, "questions candidates"]
) -> Int[Array, "questions candidates"]:
    """Return the candidates by their scores, the highest first, int32.

    Of equal scores the higher mean log-probability comes first, and then the lower index. Candidates that the stage
    does not have come last; their mean log-probability is -inf.
    """
    score = jnp.where(jnp.isneginf(mean_log_prob), -jnp.inf, score)
    return jnp.lexsort((-mean_log_prob, -score), axis=-1).astype(jnp.int32)
