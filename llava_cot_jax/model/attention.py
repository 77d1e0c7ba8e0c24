"""Attention masks, and attention kernels, which never hold all scores.

``layers.attention`` selects its kernel here: splash attention on a TPU, cuDNN's on a GPU. Anywhere else, and where no
kernel supports the case, it is ``blockwise_attention``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jaxtyping import Array, Bool, Float, Int, Shaped

from llava_cot_jax.model.sharding import LOGICAL_AXIS_RULES, current_mesh, partition_spec, traced_platform
from llava_cot_jax.rounding import ceil_div, round_up


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionMask:
    """Mask of attention in which keys form groups, each of which a query sees or does not see as a whole.

        key       0 1 2 3 4 5      query i sees key j if ``visible[i, group[j]]``
        group     0 0 1 1 1 2      and, where ``causal``, j <= i:
        visible         query 0    x x . . . .      visible[0] = 1, 0, 0
                        query 1    x x x x x .      visible[1] = 1, 1, 0

    Attributes:
        visible: Whether a query sees a group, [batch or 1, queries or 1, groups].
        group: int32, group of each key, [batch or 1, keys].
        causal: Whether a query sees no later key. There are as many queries as keys then.
    """

    visible: Bool[Array, "batch queries groups"]
    group: Int[Array, "mask_batch keys"]
    causal: bool = field(default=False, metadata={"static": True})

    def group_one_hot(self) -> Bool[Array, "batch keys groups"]:
        """Return whether a key is in a group."""
        return self.group[..., None] == jnp.arange(self.visible.shape[-1])

    def dense(self, positions: Int[Array, " queries"] | None = None) -> Bool[Array, "batch queries keys"]:
        """Return whether a query sees a key, [batch or 1, queries or 1, keys].

        Args:
            positions: Places of the queries among the keys, where ``visible`` is that of some of them; None where it is
                that of all.
        """
        batch = max(len(self.visible), len(self.group))
        visible, in_group = (
            jnp.broadcast_to(x, (batch, *x.shape[1:])).astype(jnp.float32) for x in (self.visible, self.group_one_hot())
        )
        # A product with a batch axis, even of one row: remat "dots" saves none of these.
        seen = jax.lax.dot_general(visible, in_group, (((2,), (2,)), ((0,), (0,)))) > 0
        if not self.causal:
            return seen
        keys = jnp.arange(self.group.shape[-1])
        return seen & (keys <= (keys if positions is None else positions)[:, None])


def causal_mask(present: Bool[Array, "batch tokens"]) -> AttentionMask:
    """Return the mask of tokens that see the tokens that are ``present``, up to themselves."""
    return AttentionMask(jnp.array([[[True, False]]]), 1 - present.astype(jnp.int32), causal=True)


AttentionImplementation = Literal["xla", "splash", "cudnn"]
"""How to attend: in plain JAX (``blockwise_attention``), or with the kernel for TPUs or for GPUs."""

Kernel = Callable[[jax.Array, jax.Array, jax.Array, AttentionMask], jax.Array]

attention_implementation = jax.make_user_context(None)
"""The context ``attention_implementation(name)``, in which that implementation is used, whatever the platform.

``jax.jit`` compiles a function anew for another implementation. Off its own platform splash attention is interpreted,
and XLA stands in for cuDNN.
"""


def select_kernel(q: Float[Array, "batch heads queries head_dim"], mask: AttentionMask) -> Kernel | None:
    """Return the kernel to attend with, on the mesh of ``use_mesh``; None where none is to be used.

    A single query, in decoding, has few scores and needs no kernel. cuDNN supports neither float32 nor, in a backward
    pass, an odd number of queries or keys.
    """
    implementation = attention_implementation.value or {"tpu": "splash", "gpu": "cudnn"}.get(traced_platform(), "xla")
    if implementation == "xla" or q.shape[2] == 1:
        return None
    if implementation == "splash":
        return lambda *x: _on_mesh(_splash, *x)
    narrow = q.dtype in (jnp.float16, jnp.bfloat16) and q.shape[-1] % 8 == 0
    return (lambda *x: _on_mesh(_cudnn, *x)) if narrow and not (q.shape[2] % 2 or mask.group.shape[-1] % 2) else None


def _on_mesh(kernel: Kernel, q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask) -> jax.Array:
    """Run ``kernel`` on each device's sequences and heads, since the compiler cannot shard a kernel by itself."""
    mesh = current_mesh()
    if mesh is None:
        return kernel(q, k, v, mask)
    heads = partition_spec([_sharded_axis(mesh, "batch", q.shape[0]), _sharded_axis(mesh, "kv_heads", k.shape[1])])
    mask_spec = jax.tree.map(lambda x: partition_spec([_sharded_axis(mesh, "batch", x.shape[0])]), mask)
    specs = (heads, heads, heads, mask_spec)
    return jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)(q, k, v, mask)


def _sharded_axis(mesh: AbstractMesh, axis: str, size: int) -> str | None:
    """Return ``axis``, or None where ``mesh`` does not divide its size, as in ``constrain``."""
    return None if size % math.prod(mesh.shape[m] for m in LOGICAL_AXIS_RULES[axis]) else axis


LANES = 128
"""The block sizes of splash attention are multiples of this."""

LARGEST_BLOCK = 512

MASK_VALUE = -(2.0**30)
"""Number added to the score of a key that is not seen: a power of two, exact in bfloat16, that no score comes near."""


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask) -> jax.Array:
    """Apply splash attention (TPU). The arguments are those of ``layers.attention``.

    The kernel takes a static mask (causal or full) and segments: a key that no query sees is in another segment than
    the queries. What differs from query to query is expressed by additional features of each head, one for each group:
    a key has 1 in that of its own group, a query has ``MASK_VALUE`` in those that it does not see. The softmax turns
    this into an exact 0. 128 features cost as much as 80, so this is free in the vision tower.
    """
    # Imported here, since the imports take a tenth of a second, and only a TPU needs them.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as static_masks

    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    seen = jnp.ones((batch, keys), jnp.int32)
    if mask.visible.shape[1] == 1:
        key_visible = jnp.take_along_axis(mask.visible[:, 0], mask.group, axis=1)
        seen = jnp.broadcast_to(key_visible, seen.shape).astype(jnp.int32)
    else:
        q = _append_features(q, jnp.where(mask.visible, 0, MASK_VALUE))
        k = _append_features(k, mask.group_one_hot())
    (block_q, padding_q), (block_k, padding_k) = _block_size(queries), _block_size(keys)
    q, k, v = _pad_tokens(q, padding_q), _pad_tokens(k, padding_k), _pad_tokens(v, padding_k)
    seen = jnp.pad(seen, ((0, 0), (0, padding_k)))
    segments = splash.SegmentIds(jnp.ones((batch, queries + padding_q), jnp.int32), seen)
    shape = (queries + padding_q, keys + padding_k)
    static = static_masks.CausalMask(shape) if mask.causal else static_masks.FullMask(shape)
    kernel = splash.make_splash_mha(
        static_masks.MultiHeadMask([static] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block_q,
            block_kv=block_k,
            block_q_dkv=block_q,
            block_kv_dkv=block_k,
            block_kv_dkv_compute=block_k,
            block_q_dq=block_q,
            block_kv_dq=block_k,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=traced_platform() != "tpu",
    )
    return jax.vmap(kernel)(q, k, v, segments)[:, :, :queries]


def _append_features(
    x: Float[Array, "batch heads tokens head_dim"], features: Shaped[Array, "#batch tokens n"]
) -> Float[Array, "batch heads tokens head_dim+n"]:
    """Append features to every head."""
    shape = (*x.shape[:3], features.shape[-1])
    return jnp.concatenate([x, jnp.broadcast_to(features[:, None].astype(x.dtype), shape)], axis=-1)


def _block_size(tokens: int) -> tuple[int, int]:
    """Return the block size for ``tokens``, and by how many tokens the last block must be padded."""
    count = ceil_div(tokens, LARGEST_BLOCK)
    block = round_up(ceil_div(tokens, count), LANES)
    return block, count * block - tokens


def _pad_tokens(
    x: Float[Array, "batch heads tokens head_dim"], padding: int
) -> Float[Array, "batch heads tokens+{padding} head_dim"]:
    """Append ``padding`` tokens of zeros."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0)))


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask) -> jax.Array:
    """Apply cuDNN's attention (GPU). The arguments are those of ``layers.attention``."""
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))  # [batch, tokens, heads, head_dim]
    seen = jnp.broadcast_to(mask.dense(), (q.shape[0], q.shape[1], k.shape[1]))
    implementation: Literal["cudnn", "xla"] = "cudnn" if traced_platform() == "gpu" else "xla"
    out = jax.nn.dot_product_attention(q, k, v, mask=seen[:, None], implementation=implementation)
    return jnp.swapaxes(out, 1, 2)
