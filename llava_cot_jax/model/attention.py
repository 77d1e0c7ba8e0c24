"""Which keys a query sees, and the kernels that attend so without ever holding the scores.

``layers.attention`` is the door; it asks here which kernel to take. On a TPU that is splash attention,
on a GPU cuDNN's; anywhere else, and wherever no kernel does the case, there is the plain form.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, get_abstract_mesh

from llava_cot_jax.model.sharding import RULES, partition


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mask:
    """Which keys a query sees, where keys fall into groups that are seen or hidden as a whole.

        key      0 1 2 3 4 5      query i sees key j if ``sees[i, group[j]]``
        group    0 0 1 1 1 2      and, where ``causal``, j <= i:
        sees           query 0    x x . . . .      sees[0] = 1, 0, 0
                       query 1    x x x x x .      sees[1] = 1, 1, 0

    Attributes:
        sees: bool [batch or 1, queries or 1, groups].
        group: int32 [batch or 1, keys].
        causal: whether a query sees no later key; there are as many queries as keys then.
    """

    sees: jax.Array
    group: jax.Array
    causal: bool = field(default=False, metadata={"static": True})

    def members(self) -> jax.Array:
        """bool [batch or 1, keys, groups]: which group a key is in."""
        return self.group[..., None] == jnp.arange(self.sees.shape[-1])

    def dense(self) -> jax.Array:
        """The same mask key by key, bool [batch or 1, queries or 1, keys]."""
        seen = jnp.matmul(self.sees.astype(jnp.float32), self.members().astype(jnp.float32).mT) > 0
        return seen & jnp.tri(self.group.shape[-1], dtype=bool) if self.causal else seen


def causal(present: jax.Array) -> Mask:
    """Tokens that see those ``present``, bool [batch or 1, tokens], up to themselves."""
    return Mask(jnp.array([[[True, False]]]), 1 - present.astype(jnp.int32), causal=True)


Implementation = Literal["xla", "splash", "cudnn"]
"""The plain form, and the kernels for TPUs and for GPUs."""

Kernel = Callable[[jax.Array, jax.Array, jax.Array, Mask], jax.Array]

_chosen: ContextVar[Implementation | None] = ContextVar("_chosen", default=None)


@contextlib.contextmanager
def attending_with(implementation: Implementation) -> Iterator[None]:
    """The context in which a traced function attends so, whatever the platform.

    Enter it inside the function that ``jax.jit`` compiles, as ``on_mesh``: jit does not know of it.
    Off its own platform splash attention is interpreted, and cuDNN's call made by XLA.
    """
    token = _chosen.set(implementation)
    try:
        yield
    finally:
        _chosen.reset(token)


def kernel_for(q: jax.Array, mask: Mask) -> Kernel | None:
    """The kernel to attend with, over whatever mesh there is; None is the plain form.

    A single query is decoding: its scores are one row, and the plain form's. cuDNN does neither float32
    nor, in a backward pass, an odd number of queries or keys.
    """
    implementation = _chosen.get() or {"tpu": "splash", "gpu": "cudnn"}.get(_platform(), "xla")
    if implementation == "xla" or q.shape[2] == 1:
        return None
    if implementation == "splash":
        return lambda *x: _on_mesh(_splash, *x)
    narrow = q.dtype in (jnp.float16, jnp.bfloat16) and q.shape[-1] % 8 == 0
    return (lambda *x: _on_mesh(_cudnn, *x)) if narrow and not (q.shape[2] % 2 or mask.group.shape[-1] % 2) else None


def _platform() -> str:
    """Where the function being traced is to run: the devices of ``on_mesh``, else the default one."""
    device = get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _on_mesh(kernel: Kernel, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    """``kernel`` on each device's rows and heads: the compiler cannot cut a kernel by itself."""
    mesh = get_abstract_mesh()
    if mesh.empty:
        return kernel(q, k, v, mask)
    heads = partition([_cut(mesh, "batch", q.shape[0]), _cut(mesh, "kv_heads", k.shape[1])])
    of_mask = jax.tree.map(lambda x: partition([_cut(mesh, "batch", x.shape[0])]), mask)
    specs = (heads, heads, heads, of_mask)
    return jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)(q, k, v, mask)


def _cut(mesh: AbstractMesh, axis: str, size: int) -> str | None:
    """``axis``, or None where ``mesh`` does not divide its size: as ``constrain`` does."""
    return None if size % math.prod(mesh.shape[m] for m in RULES[axis]) else axis


LANES = 128
"""The blocks of splash attention are a multiple of this."""

LARGEST_BLOCK = 512

HIDDEN = -(2.0**30)
"""What is added to the score of a hidden key: a power of two, exact in bfloat16, that no score comes near."""


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    """Splash attention (TPU); arguments as for ``layers.attention``.

    The kernel knows a static mask (causal or full) and segments: a key that is hidden from every query is in
    another segment than the queries. What differs from query to query is told in more entries of a head,
    one a group: a key has 1 in its own, a query has ``HIDDEN`` in those that it does not see. The softmax
    makes an exact 0 of that. 128 entries cost what 80 do, so the vision tower pays nothing for it.
    """
    # Here, as the imports take a tenth of a second that nothing but a TPU needs.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as static_masks

    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    seen = jnp.ones((batch, keys), jnp.int32)
    if mask.sees.shape[1] == 1:
        seen = jnp.broadcast_to(jnp.take_along_axis(mask.sees[:, 0], mask.group, axis=1), seen.shape).astype(jnp.int32)
    else:
        q = _with_entries(q, jnp.where(mask.sees, 0, HIDDEN))
        k = _with_entries(k, mask.members())
    (block_q, fill_q), (block_k, fill_k) = _blocks(queries), _blocks(keys)
    q, k, v = _filled(q, fill_q), _filled(k, fill_k), _filled(v, fill_k)
    segments = splash.SegmentIds(jnp.ones((batch, queries + fill_q), jnp.int32), jnp.pad(seen, ((0, 0), (0, fill_k))))
    shape = (queries + fill_q, keys + fill_k)
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
        interpret=_platform() != "tpu",
    )
    return jax.vmap(kernel)(q, k, v, segments)[:, :, :queries]


def _with_entries(x: jax.Array, entries: jax.Array) -> jax.Array:
    """x [batch, heads, tokens, head_dim] with ``entries`` [batch or 1, tokens, n] at the end of every head."""
    shape = (*x.shape[:3], entries.shape[-1])
    return jnp.concatenate([x, jnp.broadcast_to(entries[:, None].astype(x.dtype), shape)], axis=-1)


def _blocks(tokens: int) -> tuple[int, int]:
    """The block that cuts ``tokens``, and how many tokens the last block lacks."""
    count = -(-tokens // LARGEST_BLOCK)
    block = LANES * -(-tokens // (LANES * count))
    return block, count * block - tokens


def _filled(x: jax.Array, fill: int) -> jax.Array:
    """x [batch, heads, tokens, head_dim] with ``fill`` more tokens of zeros."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, fill), (0, 0)))


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    """cuDNN's attention (GPU); arguments as for ``layers.attention``."""
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))  # [batch, tokens, heads, head_dim]
    seen = jnp.broadcast_to(mask.dense(), (q.shape[0], q.shape[1], k.shape[1]))
    implementation: Literal["cudnn", "xla"] = "cudnn" if _platform() == "gpu" else "xla"
    out = jax.nn.dot_product_attention(q, k, v, mask=seen[:, None], implementation=implementation)
    return jnp.swapaxes(out, 1, 2)
