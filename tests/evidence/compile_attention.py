"""Compile the three attentions of the 11B for a TPU v5e, on a machine without one, as splash and as plain attention.

    pip install -e '.[plan]' && python tests/evidence/compile_attention.py | tee tests/evidence/compile_attention.txt

Each is the attention of one layer, with its gradients, for one example per chip: 1024 tokens of text and an image of 4
tiles. The figures come from the compiler; nothing runs on a TPU. Temporaries are those in HBM, without the results.
What the compiler keeps in the chip's 128 MB of VMEM (the scores of half of the text's heads) is not among them.
"""

import argparse
import datetime
import importlib.metadata
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from llava_cot_jax.model.attention import AttentionImplementation, AttentionMask, attention_implementation, causal_mask
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.layers import attention
from llava_cot_jax.model.sharding import make_mesh, partition_spec, use_mesh
from llava_cot_jax.planning import slices

CONFIG = MllamaConfig.llama32_11b()
TEXT, TOWER, IMAGE = 1024, 4 * 1608, 6528

MaskOf = Callable[[jax.Array], AttentionMask]


def tower(padding: jax.Array) -> AttentionMask:
    return AttentionMask(jnp.stack([jnp.ones_like(padding), ~padding], axis=-1), padding.astype(jnp.int32))


def cross(sees: jax.Array) -> AttentionMask:
    return AttentionMask(sees, jnp.minimum(jnp.arange(IMAGE) // CONFIG.vision.tile_tokens, 4)[None])


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    slices.enable_tpu_compiler()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "libtpu"))
    print(f"{datetime.date.today()}; {versions}; compiled for TPUs, run on none")
    chip = topologies.get_topology_desc(platform="tpu", topology_name="v5e:1x1", chips_per_host_bounds=[1, 1, 1])
    host = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    for name, mesh in [
        ("one v5e", make_mesh(devices=chip.devices)),
        ("four v5e, fsdp=2 x tensor=2; per chip", make_mesh(fsdp=2, tensor=2, devices=host.devices)),
    ]:
        print(f"\n{name}")
        for implementation in ("xla", "splash"):
            compile_for(mesh, implementation)


def compile_for(mesh: Mesh, implementation: AttentionImplementation) -> None:
    """Compile all three attentions, with one example per shard of the batch."""
    rows = mesh.shape["fsdp"]
    tower_heads = (CONFIG.vision.attention_heads, CONFIG.vision.attention_heads, 80)
    text_heads = (CONFIG.text.num_attention_heads, CONFIG.text.num_key_value_heads, CONFIG.text.head_dim)
    cases: list[tuple[str, tuple[int, int, int], int, int, tuple[int, ...], MaskOf]] = [
        ("tower", tower_heads, TOWER, TOWER, (rows, TOWER), tower),
        ("text", text_heads, TEXT, TEXT, (rows, TEXT), causal_mask),
        ("cross", text_heads, TEXT, IMAGE, (rows, TEXT, 5), cross),
    ]
    for name, (heads, kv_heads, head_dim), queries, keys, told, mask_of in cases:

        def abstract(dtype: jnp.dtype, *shape: int, axes: tuple[str, ...] = ("batch",)) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, partition_spec(axes)))

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, told: jax.Array, mask_of: MaskOf = mask_of) -> jax.Array:
            with use_mesh(mesh), attention_implementation(implementation):
                return attention(q, k, v, mask_of(told))

        def gradients(
            q: jax.Array, k: jax.Array, v: jax.Array, told: jax.Array, change: jax.Array, attend: Callable = attend
        ) -> tuple[jax.Array, ...]:
            out, backward = jax.vjp(lambda *x: attend(*x, told), q, k, v)
            return out, *backward(change)

        bf16 = jnp.dtype(jnp.bfloat16)
        q = abstract(bf16, rows, heads, queries, head_dim, axes=("batch", "heads"))
        k = abstract(bf16, rows, kv_heads, keys, head_dim, axes=("batch", "kv_heads"))
        arguments = (q, k, k, abstract(jnp.dtype(bool), *told))
        figures = []
        for function, given in ((attend, arguments), (gradients, (*arguments, q))):
            began = time.perf_counter()
            memory = jax.jit(function).lower(*given).compile().memory_analysis()
            took = time.perf_counter() - began
            figures.append(f"{memory.temp_size_in_bytes / 1e6:.1f} MB ({took:.0f} s)")
        print(f"{name}, {implementation}: temporaries {figures[0]} forwards, {figures[1]} with gradients", flush=True)


if __name__ == "__main__":
    main()
