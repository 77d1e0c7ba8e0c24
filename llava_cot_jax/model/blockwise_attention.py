"""Attention in plain JAX, by blocks of queries: the path of every platform and every case without a kernel.

No more scores are held than those of one block. The forward pass keeps the log-sum-exp of each query's scores, from
which the backward pass makes the weights of a block again (Rabe and Staats, arXiv 2112.05682; Dao et al., arXiv
2205.14135, appendix B.4).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from llava_cot_jax.model.attention import AttentionMask
from llava_cot_jax.rounding import ceil_div, round_up

QUERY_BLOCK = 128
"""Largest number of queries that attend at a time. A CPU is fastest where the scores of a block are some megabytes.
Nothing was measured on GPUs, nor on TPUs, whose kernels take most of their attention."""

BLOCK_MULTIPLE = 8
"""Where there are several blocks, the queries of each are a multiple of this: rows of a TPU's tile in float32."""

Carry = TypeVar("Carry")

Mask = AttentionMask | Bool[Array, "#batch #queries keys"]


def query_blocks(queries: int) -> tuple[int, int]:
    """Return the number of blocks, and the number of queries of each, of which some of the last may be padding."""
    count = ceil_div(queries, QUERY_BLOCK)
    return (1, queries) if count == 1 else (count, round_up(ceil_div(queries, count), BLOCK_MULTIPLE))


class _Residuals(NamedTuple):
    """What the forward pass keeps for the backward pass."""

    q: Float[Array, "batch heads queries head_dim"]
    k: Float[Array, "batch kv_heads keys head_dim"]
    v: Float[Array, "batch kv_heads keys head_dim"]
    mask: Mask
    out: Float[Array, "batch heads queries head_dim"]
    log_sum_exp: Float32[Array, "batch heads queries 1"]


@jax.custom_vjp
def blockwise_attention(
    q: Float[Array, "batch heads queries head_dim"],
    k: Float[Array, "batch kv_heads keys head_dim"],
    v: Float[Array, "batch kv_heads keys head_dim"],
    mask: Mask,
) -> Float[Array, "batch heads queries head_dim"]:
    """Apply grouped-query attention; see ``layers.attention``.

    Scores, weights and sums are float32. A query that sees no key has no part in the gradients.
    """
    return _forward(q, k, v, mask)[0]


def attend(
    q: Float[Array, "batch kv_heads group queries head_dim"],
    k: Float[Array, "batch kv_heads keys head_dim"],
    v: Float[Array, "batch kv_heads keys head_dim"],
    mask: Mask,
) -> tuple[Float32[Array, "batch kv_heads group queries head_dim"], Float32[Array, "batch kv_heads group queries 1"]]:
    """Return the means of the values, and the log-sum-exp of each query's scores, by which segments can be joined.

    Args:
        q: Queries of each key head.
        k: Keys.
        v: Values.
        mask: Which keys each query sees. A query that sees none has the mean of all values, and a log-sum-exp so low
            that it has no part beside any other segment.
    """

    def attend_block(_: None, block: tuple[jax.Array, ...]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        q, visible, positions = block
        scores = jnp.where(_sees(mask, visible, positions, q), _scores(q, k), jnp.finfo(jnp.float32).min)
        maximum = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - maximum)
        total = weights.sum(axis=-1, keepdims=True)
        return None, (_einsum("bkrs,bksd->bkrd", weights.astype(v.dtype), v) / total, maximum + jnp.log(total))

    _, (out, log_sum_exp) = _scan(attend_block, None, (_split(q), *_split_mask(mask, q.shape[3])))
    return _join(out, q.shape), _join(log_sum_exp, q.shape)


def _forward(
    q: Float[Array, "batch heads queries head_dim"],
    k: Float[Array, "batch kv_heads keys head_dim"],
    v: Float[Array, "batch kv_heads keys head_dim"],
    mask: Mask,
) -> tuple[Float[Array, "batch heads queries head_dim"], _Residuals]:
    """Return the result of ``blockwise_attention``, and what ``_backward`` needs."""
    means, log_sum_exp = attend(_group(q, k), k, v, mask)
    out = means.astype(q.dtype).reshape(q.shape)
    return out, _Residuals(q, k, v, mask, out, log_sum_exp.reshape(*q.shape[:3], 1))


def _backward(
    saved: _Residuals, change: Float[Array, "batch heads queries head_dim"]
) -> tuple[
    Float[Array, "batch heads queries head_dim"],
    Float[Array, "batch kv_heads keys head_dim"],
    Float[Array, "batch kv_heads keys head_dim"],
    None,
]:
    """Return the gradients by the queries, keys and values, from that by the result."""
    q, k, v, mask, out, log_sum_exp = saved
    # The mean of the gradients by a query's weights, by these weights.
    mean = jnp.sum(out.astype(jnp.float32) * change.astype(jnp.float32), axis=-1, keepdims=True)

    def add(
        sums: tuple[jax.Array, jax.Array], block: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        q, change, log_sum_exp, mean, visible, positions = block
        weights = jnp.exp(jnp.where(_sees(mask, visible, positions, q), _scores(q, k) - log_sum_exp, -jnp.inf))
        by_weight = _einsum("bkrd,bksd->bkrs", change, v)
        by_score = (weights * (by_weight - mean) * q.shape[-1] ** -0.5).astype(q.dtype)
        dk = _einsum("bkrs,bkrd->bksd", by_score, q)
        dv = _einsum("bkrs,bkrd->bksd", weights.astype(v.dtype), change)
        return (sums[0] + dk, sums[1] + dv), _einsum("bkrs,bksd->bkrd", by_score, k).astype(q.dtype)

    blocks = [_split(_group(x, k)) for x in (q, change, log_sum_exp, mean)]
    zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    (dk, dv), dq = _scan(add, zeros, (*blocks, *_split_mask(mask, q.shape[2])))
    return _join(dq, _group(q, k).shape).reshape(q.shape), dk.astype(k.dtype), dv.astype(v.dtype), None


blockwise_attention.defvjp(_forward, _backward)


def _scan(
    function: Callable[[Carry, tuple[jax.Array, ...]], tuple[Carry, Any]], start: Carry, blocks: tuple[jax.Array, ...]
) -> tuple[Carry, Any]:
    """Apply ``function`` to one block after the other. A single block needs no loop."""
    return jax.lax.scan(function, start, blocks, unroll=len(blocks[0]) == 1)


def _einsum(subscripts: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, *operands, preferred_element_type=jnp.float32)


def _scores(
    q: Float[Array, "batch kv_heads rows head_dim"], k: Float[Array, "batch kv_heads keys head_dim"]
) -> Float[Array, "batch kv_heads rows keys"]:
    return _einsum("bkrd,bksd->bkrs", q, k) * q.shape[-1] ** -0.5


def _sees(
    mask: Mask,
    visible: Bool[Array, "#batch #block n"],
    positions: Int[Array, " block"],
    q: Float[Array, "batch kv_heads rows head_dim"],
) -> Bool[Array, "#batch 1 #rows keys"]:
    """Return which keys the rows of a block see, from what ``_split_mask`` returns of it."""
    seen = replace(mask, visible=visible).dense(positions) if isinstance(mask, AttentionMask) else visible
    group = q.shape[2] // len(positions)
    return (seen if seen.shape[1] == 1 else jnp.tile(seen, (1, group, 1)))[:, None]


def _split_mask(mask: Mask, queries: int) -> tuple[Bool[Array, " blocks #batch #block n"], Int[Array, " blocks block"]]:
    """Return, for each block, the groups or the keys that its queries see, and their positions."""
    count, size = query_blocks(queries)
    visible = mask.visible if isinstance(mask, AttentionMask) else mask
    if visible.shape[1] == 1:
        blocks = jnp.broadcast_to(visible, (count, *visible.shape))
    else:
        padded = jnp.pad(visible, ((0, 0), (0, count * size - queries), (0, 0)))
        blocks = jnp.moveaxis(padded.reshape(visible.shape[0], count, size, -1), 1, 0)
    return blocks, jnp.arange(count * size).reshape(count, size)


def _group(
    x: Float[Array, "batch heads queries n"], k: Float[Array, "batch kv_heads keys head_dim"]
) -> Float[Array, "batch kv_heads group queries n"]:
    """Split the heads into groups, those of each key head."""
    batch, heads, *rest = x.shape
    return x.reshape(batch, k.shape[1], heads // k.shape[1], *rest)


def _split(x: Float[Array, "batch kv_heads group queries n"]) -> Float[Array, "blocks batch kv_heads rows n"]:
    """Return blocks of rows, which are a block's queries in every head of a key head. Zeros fill up the last block.

    Products of such arrays have one axis of each kind. XLA transposes weights for products that have several.
    """
    *outer, queries, n = x.shape
    count, size = query_blocks(queries)
    padded = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, count * size - queries), (0, 0)))
    blocks = jnp.moveaxis(padded.reshape(*outer, count, size, n), 3, 0)
    return blocks.reshape(count, *outer[:2], -1, n)


def _join(
    x: Float[Array, "blocks batch kv_heads rows n"], shape: tuple[int, ...]
) -> Float[Array, "batch kv_heads group queries n"]:
    """Undo ``_split`` for queries of this shape."""
    batch, kv_heads, group, queries, _ = shape
    blocks = x.reshape(len(x), batch, kv_heads, group, -1, x.shape[-1])
    return jnp.moveaxis(blocks, 0, 3).reshape(batch, kv_heads, group, -1, x.shape[-1])[:, :, :, :queries]
