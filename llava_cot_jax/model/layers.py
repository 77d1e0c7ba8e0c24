"""Layers of both halves of the model: projections, norms, RoPE, attention, rematerialisation.

Weights are oriented [out, in], as published. Norms, RoPE and softmax work in float32 and return the dtype of their
input.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int

from llava_cot_jax.model.attention import AttentionMask, select_kernel
from llava_cot_jax.model.blockwise_attention import attend, blockwise_attention
from llava_cot_jax.model.choices import RematPolicy
from llava_cot_jax.model.config import TextConfig
from llava_cot_jax.model.parameters import Params
from llava_cot_jax.model.sharding import constrain, traced_platform

P = ParamSpec("P")
R = TypeVar("R")


def apply_remat(layer: Callable[P, R], policy: RematPolicy) -> Callable[P, R]:
    """Return ``layer`` with rematerialisation: its backward pass recomputes what ``policy`` does not save.

    With the policy "none" that is what ``recomputed`` says of parts of the layer.
    """
    if policy == "none":
        return layer
    policies = jax.checkpoint_policies
    saveable = policies.nothing_saveable if policy == "full" else policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(layer, policy=saveable)


def recomputed(function: Callable[P, R]) -> Callable[P, R]:
    """Return ``function``, whose backward pass computes it again from its arguments: no activation of it is saved.

    This is for elementwise functions, norms, and the linear layer after them, whose own product is not computed again.
    It holds within a loop over layers; elsewhere the compiler may find that it has the values already.
    """
    return jax.checkpoint(function, prevent_cse=False)


def is_stacked(layers: Params) -> bool:
    """Whether the arrays of these layers carry a leading ``layers`` axis."""
    return layers["0"]["input_layernorm"]["weight"].ndim == 2


@jax.named_scope("embed")
def embed(ids: Int[Array, " batch *tokens"], w: Params) -> Float[Array, " batch *tokens width"]:
    """Look up rows of an embedding table, ``weight`` [rows, width].

    Each device finds the columns that it holds, for every id of its replica. Of these it hands on to each neighbour
    along ``fsdp`` what that one's batch needs, and the neighbours along ``tensor`` put the width together. Left to
    itself, the partitioner gathers the rows of the whole batch on every device.
    """
    within = [None] * (ids.ndim - 1)
    found = constrain(w["weight"][ids], "replica", *within, "columns")
    return constrain(constrain(found, "batch", *within, "part"), "batch", *within, None)


def linear(
    x: Float[Array, "*batch in"], w: Params, adapted: Bool[Array, "*batch"] | Literal[True] | None = True
) -> Float[Array, "*batch out"]:
    """Apply a linear layer: ``weight`` [out, in], and whatever else it has of a bias, an adapter and a scale.

    ``bias`` is [out]. An adapter is ``lora_a`` [rank, in] and ``lora_b`` [out, rank]. It adds x A^T B^T, which is
    little work as long as B A is never computed (Hu et al., arXiv 2106.09685), and it is added where ``adapted`` is
    true. With a ``scale`` [out] the weight is int8 (see ``quantization``).
    """
    is_int8 = "scale" in w
    y = int8_linear(x, w).astype(x.dtype) if is_int8 else product(x, w["weight"])
    if "lora_a" in w and adapted is not None:
        update = product(product(x, w["lora_a"]), w["lora_b"])
        y = y + (update if adapted is True else jnp.where(adapted[..., None], update, 0))
    return y + w["bias"] if "bias" in w else y


def product(
    x: Float[Array, "*batch in"], weight: Float[Array, "out in"], dtype: DTypeLike | None = None
) -> Float[Array, "*batch out"]:
    """Return x W^T, accumulated and returned in ``dtype``; None is the dtype that both promote to."""
    if traced_platform() != "cpu":
        return jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=dtype)
    # The gradient of the weights is a sum over all axes of a batch. Where there are several, XLA transposes for it on a
    # CPU both of what it multiplies.
    rows = jnp.einsum("ni,oi->no", x.reshape(-1, x.shape[-1]), weight, preferred_element_type=dtype)
    return rows.reshape(*x.shape[:-1], len(weight))


def int8_linear(x: Float[Array, "*batch in"], w: Params) -> Float[Array, "*batch out"]:
    """Apply an int8 ``weight`` [out, in] with its ``scale`` [out]. The result is float32."""
    return product(x, w["weight"].astype(x.dtype), jnp.float32) * w["scale"]


def rms_norm(x: Float[Array, "*batch width"], w: Params, eps: float) -> Float[Array, "*batch width"]:
    """Apply RMSNorm over the last axis. It is scaled after the cast back, as in the reference."""

    def norm(x: jax.Array, weight: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
        return weight * y.astype(x.dtype)

    return recomputed(norm)(x, w["weight"])


def layer_norm(x: Float[Array, "*batch width"], w: Params, eps: float) -> Float[Array, "*batch width"]:
    """Apply LayerNorm over the last axis."""

    def norm(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
        return (y * weight.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)

    return recomputed(norm)(x, w["weight"], w["bias"])


def rope_frequencies(config: TextConfig) -> Float[np.ndarray, " half_head_dim"]:
    """Return the angle per position of each pair of entries of a head, float32, in radians.

    With ``rope_scaling``, wavelengths beyond the context of the first training are stretched by ``factor``, short ones
    are kept, and those between are blended (Llama 3.1, "apply_scaling").
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


@jax.named_scope("rope")
def rope_cos_sin(
    positions: Int[Array, "batch tokens"], config: TextConfig
) -> tuple[Float[Array, "batch tokens half_head_dim"], Float[Array, "batch tokens half_head_dim"]]:
    """Return the cosines and sines of RoPE at ``positions``, float32: bfloat16 cannot tell position 256 from 257."""
    angles = positions.astype(jnp.float32)[..., None] * rope_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


@jax.named_scope("rope")
def apply_rope(
    x: Float[Array, "batch heads tokens head_dim"],
    cos: Float[Array, "batch tokens half_head_dim"],
    sin: Float[Array, "batch tokens half_head_dim"],
) -> Float[Array, "batch heads tokens head_dim"]:
    """Apply half-split RoPE with the results of ``rope_cos_sin``."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]  # [batch, 1, tokens, head_dim / 2]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def split_heads(
    x: Float[Array, "batch tokens heads_x_head_dim"], heads: int
) -> Float[Array, "batch {heads} tokens head_dim"]:
    """Split the last axis into heads."""
    return jnp.swapaxes(x.reshape(*x.shape[:2], heads, -1), 1, 2)


def merge_heads(x: Float[Array, "batch heads tokens head_dim"]) -> Float[Array, "batch tokens heads_x_head_dim"]:
    """Undo ``split_heads``."""
    return jnp.swapaxes(x, 1, 2).reshape(x.shape[0], x.shape[2], -1)


def attention(
    q: Float[Array, "batch heads queries head_dim"],
    k: Float[Array, "batch kv_heads keys head_dim"],
    v: Float[Array, "batch kv_heads keys head_dim"],
    mask: AttentionMask | Bool[Array, "#batch #queries keys"],
) -> Float[Array, "batch heads queries head_dim"]:
    """Apply grouped-query attention. All attention of whole sequences and of images goes through this function.

    It has gradients in reverse mode alone.

    Args:
        q: Queries.
        k: Keys; each key head serves heads / kv_heads consecutive query heads.
        v: Values.
        mask: Which keys each query sees. A query that sees none gets some finite mean of the values, which the caller
            discards.

    Returns:
        Means of the values, in the dtype of ``q``.
    """
    if isinstance(mask, AttentionMask) and (kernel := select_kernel(q, mask)) is not None:
        return kernel(q, k, v, mask)
    return blockwise_attention(q, k, v, mask)


class KVSegment(NamedTuple):
    """Segment of the keys and values that a batch of queries attends to.

    A segment's row, of which there are ``groups``, is shared by batch / groups consecutive sequences.
    """

    keys: Float[Array, "groups kv_heads capacity head_dim"]
    values: Float[Array, "groups kv_heads capacity head_dim"]
    mask: Bool[Array, " groups #tokens capacity"]  # whether a token sees a key


def cascade_attention(
    q: Float[Array, "batch heads tokens head_dim"], segments: Sequence[KVSegment]
) -> Float[Array, "batch heads tokens head_dim"]:
    """Attend to keys that lie in several segments as if they lay in one.

    Each segment's softmax is taken by itself. Their log-sum-exps say how to mix them, which is exact.

    Args:
        q: Queries.
        segments: Keys and values. In all segments together, each query sees at least one key.

    Returns:
        Means of the values, in the dtype of ``q``.
    """
    means, log_sum_exps = zip(*(_attend_segment(q, *segment) for segment in segments), strict=True)
    maximum = functools.reduce(jnp.maximum, log_sum_exps)
    weights = [jnp.exp(each - maximum) for each in log_sum_exps]
    mixed = sum(weight * mean for weight, mean in zip(weights, means, strict=True))
    return (mixed / sum(weights)).astype(q.dtype)


def _attend_segment(
    q: Float[Array, "batch heads tokens head_dim"],
    k: Float[Array, "groups kv_heads capacity head_dim"],
    v: Float[Array, "groups kv_heads capacity head_dim"],
    mask: Bool[Array, " groups #tokens capacity"],
) -> tuple[Float32[Array, "batch heads tokens head_dim"], Float32[Array, "batch heads tokens 1"]]:
    """Return the means of a segment's values, and the log-sum-exp of the scores, in float32.

    The sequences that share a row are further heads of its key heads.
    """
    batch, heads, tokens, head_dim = q.shape
    groups, kv_heads = k.shape[:2]
    apart = groups, batch // groups, kv_heads, heads // kv_heads, tokens
    shared = jnp.swapaxes(q.reshape(*apart, head_dim), 1, 2).reshape(groups, kv_heads, -1, tokens, head_dim)

    def ungroup(x: jax.Array) -> jax.Array:
        x = x.reshape(groups, kv_heads, batch // groups, heads // kv_heads, tokens, -1)
        return jnp.swapaxes(x, 1, 2).reshape(batch, heads, tokens, -1)

    means, log_sum_exp = attend(shared, k, v, mask)
    return ungroup(means), ungroup(log_sum_exp)
