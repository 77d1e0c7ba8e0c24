"""Compile generation with the whole 11B for TPUs, on a machine without one, and print its memory and communication.

    pip install -e '.[plan]' && python tests/evidence/compile_generation.py | tee tests/evidence/compile_generation.txt

The figures come from the compiler; nothing runs on a TPU. They show that the decode loop copies neither a cache nor a
weight (temporaries are small, and every cache is aliased), that the prefill with the vision tower fits the chip, and
that over four chips no weight is gathered (the largest array that a collective moves is small).
"""

import argparse
import datetime
import importlib.metadata
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llava_cot_jax.inference.decoding import bucket
from llava_cot_jax.inference.generator import STEPS_PER_CALL, _decode_steps, _prefill_prompts
from llava_cot_jax.inference.settings import Sampling
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.parameters import parameters
from llava_cot_jax.model.sharding import make_mesh, parameter_sharding
from llava_cot_jax.planning import slices

PROMPT, NEW = bucket(200), bucket(2048)
SAMPLING = Sampling(temperature=0.6, top_k=50, top_p=0.9)
CONFIG = MllamaConfig.llama32_11b()


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    slices.enable_tpu_compiler()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "libtpu"))
    print(f"{datetime.date.today()}; {versions}; compiled for TPUs, run on none")
    print(f"11B, bfloat16; one image of 4 tiles, a prompt of up to {PROMPT} tokens, up to {NEW} new ones, {SAMPLING}")
    chip = topologies.get_topology_desc(platform="tpu", topology_name="v6e:1x1", chips_per_host_bounds=[1, 1, 1])
    print("\none v6e, 33.6 GB")
    for questions in (1, 4):
        compile_for(make_mesh(devices=chip.devices), questions)
    host = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    print("\nfour v5e, 16.9 GB each, tensor=4; per chip")
    compile_for(make_mesh(tensor=4, devices=host.devices), 1)


def compile_for(mesh: Mesh, questions: int) -> None:
    """Compile the prefill and the decode loop for a number of questions."""
    table = parameters(CONFIG, "unrolled")
    params = unflatten_dict(
        {path: abstract(p.shape, jnp.bfloat16, parameter_sharding(p, mesh)) for path, p in table.items()}, sep="."
    )
    everywhere = NamedSharding(mesh, PartitionSpec())
    inputs, lengths, seeds = jax.tree.map(lambda x: abstract(x.shape, x.dtype, everywhere), prompts(CONFIG, questions))
    settings = {"config": CONFIG, "sampling": SAMPLING, "mesh": mesh}
    begun = _prefill_prompts.lower(params, inputs, lengths, seeds, capacity=PROMPT + NEW, **settings)
    compiled = report(f"prefill, {questions} questions", begun)
    state = jax.tree.map(
        lambda x, sharding: abstract(x.shape, x.dtype, sharding), begun.out_info, compiled.output_shardings
    )
    limit = abstract((), jnp.int32, everywhere)
    report(
        f"decode loop, {questions} questions",
        _decode_steps.lower(params, state, limit, steps=STEPS_PER_CALL, **settings),
    )


def abstract(shape: tuple[int, ...], dtype: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def prompts(config: MllamaConfig, questions: int) -> tuple[dict[str, jax.ShapeDtypeStruct], Any, Any]:
    """Return the shapes of a processor's inputs for questions with an image each, and of their lengths and seeds."""
    tiles, size = config.vision.max_num_tiles, config.vision.image_size
    inputs = {
        "input_ids": jax.ShapeDtypeStruct((questions, PROMPT), jnp.int32),
        "pixel_values": jax.ShapeDtypeStruct((questions, 1, tiles, 3, size, size), jnp.uint8),
        "aspect_ratio_ids": jax.ShapeDtypeStruct((questions, 1), jnp.int32),
        "aspect_ratio_mask": jax.ShapeDtypeStruct((questions, 1, tiles), jnp.int32),
        "cross_attention_mask": jax.ShapeDtypeStruct((questions, PROMPT, 1, tiles), jnp.uint8),
    }
    return inputs, jax.ShapeDtypeStruct((questions,), jnp.int32), jax.ShapeDtypeStruct((questions,), jnp.uint32)


def report(name: str, lowered: Any) -> Any:
    began = time.perf_counter()
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    figures = ", ".join(
        f"{kind} {getattr(memory, f'{field}_size_in_bytes') / 1e9:.2f}"
        for kind, field in [
            ("arguments", "argument"),
            ("results", "output"),
            ("aliased", "alias"),
            ("temporaries", "temp"),
        ]
    )
    moved = largest_moved(compiled.as_text())
    print(f"{name}: compiled in {time.perf_counter() - began:.0f} s; GB: {figures}; {moved}", flush=True)
    return compiled


def largest_moved(program: str) -> str:
    """Return the number of collectives of a compiled program, and the size of the largest array that one returns."""
    collectives = re.findall(r"= (\w+)\[([\d,]*)\]\S* (?:all-gather|all-reduce|all-to-all|collective-permute)", program)
    if not collectives:
        return "no collectives"
    width = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1, "u8": 1, "s8": 1}
    sizes = [math.prod(map(int, shape.split(","))) * width[dtype] for dtype, shape in collectives if shape]
    return f"{len(collectives)} collectives, the largest of {max(sizes) / 1e6:.1f} MB"


if __name__ == "__main__":
    main()
