"""Ends of a stage's candidates on the device: what is kept of each, and how many line breaks it ends with."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt8

from llava_cot_jax.inference.decoding import EndReason, Samples
from llava_cot_jax.inference.ragged_tokens import RaggedTokens
from llava_cot_jax.inference.stop_strings import TAILS
from llava_cot_jax.search.tables import BLANK_LINE, StageTables


def end_stage(
    candidates: Samples, tables: StageTables, stage: Int[Array, " questions"]
) -> tuple[RaggedTokens, Int[Array, "questions candidates"]]:
    """Return the tokens that are kept of a stage's candidates, and the line breaks that each then ends with.

    Of a stage that ends before the next opening, what the model wrote of that opening is not kept, from the token on
    that it begins in. All of an answer that the model itself ended is kept.

    Args:
        candidates: Candidates, [questions, candidates].
        tables: Tables of the stages.
        stage: int32, index of each question's stage.

    Returns:
        The tokens, [questions, candidates], and int32, the line breaks once the stage is closed, at most
        ``BLANK_LINE``.
    """
    closed = jnp.where(candidates.ended == EndReason.TAG, candidates.state - tables.num_states, BLANK_LINE)
    if tables.cuts is None:
        return candidates.text, closed
    lengths, breaks = _cut_headings(candidates, tables.stop_tables, stage)
    cut = tables.cuts[stage][:, None]
    kept = RaggedTokens(candidates.tokens, jnp.where(cut, lengths, candidates.lengths))
    return kept, jnp.where(cut, breaks, closed)


def _cut_headings(
    candidates: Samples, stop_tables: UInt8[Array, "stages states vocab"], stage: Int[Array, " questions"]
) -> tuple[Int[Array, "questions candidates"], Int[Array, "questions candidates"]]:
    """Return the length of each candidate before a heading, and the line breaks at the end of that, both int32."""
    zeros = jnp.zeros_like(candidates.lengths)

    Carry = tuple[jax.Array, jax.Array, jax.Array]

    def read(carry: Carry, at: tuple[jax.Array, jax.Array]) -> tuple[Carry, None]:
        state, kept, breaks = carry
        step, token = at
        inside = step < candidates.lengths
        unfinished = jnp.minimum(state, stop_tables.shape[1] - 1)
        following = stop_tables[stage[:, None], unfinished, token].astype(jnp.int32)
        state = jnp.where(inside, following, state)
        plain = inside & (state < TAILS)  # no heading begins at the end of the text so far
        return (state, jnp.where(plain, step + 1, kept), jnp.where(plain, state, breaks)), None

    steps = jnp.arange(candidates.tokens.shape[-1], dtype=jnp.int32)
    (state, kept, breaks), _ = jax.lax.scan(
        read, (zeros, zeros, zeros), (steps, jnp.moveaxis(candidates.tokens, -1, 0))
    )
    whole = candidates.ended == EndReason.EOS
    kept = jnp.where(whole, candidates.lengths, kept)
    return kept, jnp.where(whole & (state >= TAILS), 0, breaks)
