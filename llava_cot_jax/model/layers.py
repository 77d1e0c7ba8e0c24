"""What both halves of the model are made of: projections, norms, rotations, attention, checkpointing.

Weights are oriented [out, in], as published. Norms, rotations and softmax work in float32 and
give back the dtype of their input.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from llava_cot_jax.model.attention import Mask, kernel_for
from llava_cot_jax.model.choices import Checkpointing
from llava_cot_jax.model.config import TextConfig
from llava_cot_jax.model.sharding import constrain

Weights = Mapping[str, Any]
"""The parameters of a module: a nest of dicts that ends in arrays, named as published."""

P = ParamSpec("P")
R = TypeVar("R")


def checkpointed(layer: Callable[P, R], checkpointing: Checkpointing) -> Callable[P, R]:
    """``layer`` with activation checkpointing."""
    if checkpointing == "none":
        return layer
    policies = jax.checkpoint_policies
    saved = policies.nothing_saveable if checkpointing == "full" else policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(layer, policy=saved)


def is_stacked(layers: Weights) -> bool:
    """Whether the arrays of these layers carry a leading ``layers`` axis."""
    return layers["0"]["input_layernorm"]["weight"].ndim == 2


def lookup(ids: jax.Array, w: Weights) -> jax.Array:
    """The rows of a table, ``weight`` [rows, width], at int ids [batch, ...]: [batch, ..., width].

    Each device finds the columns that it holds, for every id of its replica. Of these it hands on to each
    neighbour along ``fsdp`` what that one's batch needs, and those along ``tensor`` put the width together.
    Left to itself, the partitioner gathers the rows of the whole batch on every device.
    """
    within = [None] * (ids.ndim - 1)
    found = constrain(w["weight"][ids], "replica", *within, "columns")
    return constrain(constrain(found, "batch", *within, "part"), "batch", *within, None)


def linear(x: jax.Array, w: Weights) -> jax.Array:
    """x [..., in] through ``weight`` [out, in], and what else there is of an adapter and a bias.

    An adapter is ``lora_a`` [rank, in] and ``lora_b`` [out, rank]: it adds x A^T B^T, which is little
    work as long as B A is never made (Hu et al., arXiv 2106.09685). ``bias`` is [out]. With a ``scale`` [out]
    the weight is int8 (``quantization``).
    """
    if "scale" in w:
        return scaled_product(x, w).astype(x.dtype)
    y = jnp.einsum("...i,oi->...o", x, w["weight"])
    if "lora_a" in w:
        y = y + jnp.einsum("...r,or->...o", jnp.einsum("...i,ri->...r", x, w["lora_a"]), w["lora_b"])
    return y + w["bias"] if "bias" in w else y


def scaled_product(x: jax.Array, w: Weights) -> jax.Array:
    """x [..., in] through an int8 ``weight`` [out, in] with its ``scale`` [out]: float32 [..., out]."""
    weight = w["weight"].astype(x.dtype)
    return jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=jnp.float32) * w["scale"]


def rms_norm(x: jax.Array, w: Weights, eps: float) -> jax.Array:
    """RMSNorm over the last axis; scaled after the cast back, as the reference does."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return w["weight"] * y.astype(x.dtype)


def layer_norm(x: jax.Array, w: Weights, eps: float) -> jax.Array:
    """LayerNorm over the last axis."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * w["weight"].astype(jnp.float32) + w["bias"].astype(jnp.float32)).astype(x.dtype)


def rope_frequencies(config: TextConfig) -> np.ndarray:
    """Angle per position of each pair of a head, float32 [head_dim / 2], in radians.

    With ``rope_scaling``, wavelengths beyond the first training's context are stretched by
    ``factor``, short ones kept, those between blended (Llama 3.1, "apply_scaling").
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
    frequencies = (1.0 / config.rope_theta**exponents).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)  # in the first training's context
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return ((1 - blend) * frequencies / scaling.factor + blend * frequencies).astype(np.float32)


def rotation(positions: jax.Array, config: TextConfig) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, float32 [batch, tokens, head_dim / 2], at ``positions`` [batch, tokens].

    float32 throughout: bfloat16 cannot tell position 256 from 257.
    """
    angles = positions.astype(jnp.float32)[..., None] * rope_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Half-split RoPE of x [batch, heads, tokens, head_dim]; cos and sin as ``rotation`` gives them."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]  # [batch, 1, tokens, head_dim / 2]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """[batch, tokens, heads * head_dim] -> [batch, heads, tokens, head_dim]."""
    return jnp.swapaxes(x.reshape(*x.shape[:2], heads, -1), 1, 2)


def join_heads(x: jax.Array) -> jax.Array:
    """[batch, heads, tokens, head_dim] -> [batch, tokens, heads * head_dim]."""
    return jnp.swapaxes(x, 1, 2).reshape(x.shape[0], x.shape[2], -1)


QUERY_BLOCK = 512
"""Long queries attend in blocks of so many: the scores of the tower's 6432 tokens would take 2.6 GB an image."""


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | Mask) -> jax.Array:
    """Grouped-query attention: every attention of the model enters here.

    Args:
        q: [batch, heads, queries, head_dim].
        k: [batch, kv_heads, keys, head_dim]; each serves heads / kv_heads query heads in a row.
        v: as ``k``.
        mask: which keys a query sees; as an array, bool, broadcastable to [batch, queries, keys].
            A query that sees none takes some mean of the values, which is finite; its caller discards it.

    Returns:
        [batch, heads, queries, head_dim] in the dtype of ``q``.
    """
    if isinstance(mask, Mask):
        kernel = kernel_for(q, mask)
        return attention(q, k, v, mask.dense()) if kernel is None else kernel(q, k, v, mask)
    batch, heads, queries, head_dim = q.shape
    grouped = q.reshape(batch, k.shape[1], heads // k.shape[1], queries, head_dim)
    if queries <= 2 * QUERY_BLOCK:
        return _attend(grouped, k, v, mask).reshape(q.shape)

    # Each block is computed again in the backward pass (Rabe and Staats, arXiv 2112.05682).
    attend = jax.checkpoint(lambda block: _attend(block[0], k, v, block[1]))
    blocks = _in_blocks(grouped, axis=3), _in_blocks(jnp.broadcast_to(mask, (batch, queries, k.shape[2])), axis=1)
    out = jnp.moveaxis(jax.lax.map(attend, blocks), 0, 3)  # [batch, kv_heads, group, blocks, QUERY_BLOCK, head_dim]
    return out.reshape(batch, heads, -1, head_dim)[:, :, :queries]


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """q [batch, kv_heads, group, queries, head_dim] against all of k and v."""
    scores = jnp.einsum("bkgqd,bksd->bkgqs", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgqs,bksd->bkgqd", weights, v)


Part = tuple[jax.Array, jax.Array, jax.Array]
"""Keys and values [groups, kv_heads, slots, head_dim], and which of them are seen, bool
[groups, tokens or 1, slots]: a group is as many queries' rows in a row as there are rows to a group."""


def attention_in_parts(q: jax.Array, parts: Sequence[Part]) -> jax.Array:
    """Attention over keys that lie in several places, as if they lay in one.

    Each part's softmax is taken on its own; their log-sum-exps say how to mix them, which is exact.

    Args:
        q: [rows, heads, tokens, head_dim].
        parts: where the keys are; of all parts together a query sees at least one.

    Returns:
        [rows, heads, tokens, head_dim] in the dtype of ``q``.
    """
    outs, tops, sums = zip(*(_attend_part(q, *part) for part in parts), strict=True)
    top = functools.reduce(jnp.maximum, tops)
    weights = [jnp.exp(t - top) for t in tops]
    total = sum(w * s for w, s in zip(weights, sums, strict=True))
    mixed = sum(w * out for w, out in zip(weights, outs, strict=True))
    return (mixed / total).astype(q.dtype)


def _attend_part(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The values of one part, weighted by exp(score - top) and summed; top; and the sum of the weights.

    float32: [rows, heads, tokens, head_dim], and twice [rows, heads, tokens, 1].
    """
    rows, heads, tokens, head_dim = q.shape
    groups, kv_heads = k.shape[:2]
    grouped = q.reshape(groups, rows // groups, kv_heads, heads // kv_heads, tokens, head_dim)
    scores = jnp.einsum("gnkhtd,gksd->gnkhts", grouped, k, preferred_element_type=jnp.float32) * head_dim**-0.5
    scores = jnp.where(mask[:, None, None, None], scores, jnp.finfo(jnp.float32).min)
    top = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    out = _weighted(weights.astype(v.dtype), v)

    def by_row(x: jax.Array) -> jax.Array:
        return x.reshape(rows, heads, tokens, -1)

    return by_row(out), by_row(top), by_row(weights.sum(axis=-1, keepdims=True))


def _weighted(weights: jax.Array, v: jax.Array) -> jax.Array:
    """``v`` [groups, kv_heads, slots, head_dim] by weights [groups, n, kv_heads, heads, tokens, slots], in float32."""

    def product(weights: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.einsum("gnkhts,gksd->gnkhtd", weights, v, preferred_element_type=jnp.float32)

    def wide(weights: jax.Array, v: jax.Array) -> jax.Array:
        return product(weights.astype(jnp.float32), v.astype(jnp.float32))

    # XLA's CPU backend has no product of this form that takes bfloat16 and gives float32.
    out: jax.Array = jax.lax.platform_dependent(weights, v, cpu=wide, default=product)
    return out


def _in_blocks(x: jax.Array, axis: int) -> jax.Array:
    """``axis`` filled up to whole blocks and cut into them: [blocks, ..., QUERY_BLOCK, ...]."""
    fill = [(0, -x.shape[axis] % QUERY_BLOCK if i == axis else 0) for i in range(x.ndim)]
    x = jnp.pad(x, fill)
    x = x.reshape(*x.shape[:axis], -1, QUERY_BLOCK, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)
