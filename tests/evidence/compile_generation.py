"""Compile generation with the whole 11B for one TPU v6e, on a machine without one, and print its memory.

    pip install -e '.[plan]' && python tests/evidence/compile_generation.py | tee tests/evidence/compile_generation.txt

The figures come from the compiler: nothing here was run on a TPU. Shown: that the decode loop copies neither a cache
nor a weight (temporaries are small, every cache is aliased), and that prefill, vision tower and all, fits the chip.
"""

import os

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

import datetime
import importlib.metadata
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from llava_cot_jax.model.cache import KeyValue
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.search.decode import CHUNK, State, _advance, _begin, bucket
from llava_cot_jax.search.sampling import Sampling

PROMPT, NEW = bucket(200), bucket(2048)
SAMPLING = Sampling(temperature=0.6, top_k=50, top_p=0.9)


def main() -> None:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "libtpu"))
    print(f"{datetime.date.today()}; {versions}; compiled for one v6e chip (31.25 GiB = 33.6 GB), not run on one")
    print(f"11B, bfloat16; one image of 4 tiles, a prompt of up to {PROMPT} tokens, up to {NEW} new ones, {SAMPLING}")
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v6e:1x1", chips_per_host_bounds=[1, 1, 1])
    chip = SingleDeviceSharding(topology.devices[0])

    def on_chip(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip), tree)

    config = MllamaConfig.llama32_11b()
    model = nnx.eval_shape(lambda: Mllama(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    params = on_chip(model.params)
    settings = {"config": config, "sampling": SAMPLING, "mesh": None}
    for questions in (1, 4):
        inputs, lengths, seeds = on_chip(prompts(config, questions))
        begin = {"capacity": PROMPT + NEW, **settings}
        report(f"prefill, {questions} questions", _begin.lower(params, inputs, lengths, seeds, **begin))
        state = on_chip(jax.eval_shape(lambda *a, begin=begin: _begin(*a, **begin), params, inputs, lengths, seeds))
        limit = on_chip(jax.ShapeDtypeStruct((), jnp.int32))
        loop = _advance.lower(params, state, limit, steps=CHUNK, **settings)
        report(f"decode loop, {questions} questions", loop, state)


def prompts(config: MllamaConfig, questions: int) -> tuple[dict[str, jax.ShapeDtypeStruct], Any, Any]:
    """What a processor returns for so many questions, one image each, and their lengths and seeds."""
    tiles, size = config.vision.max_num_tiles, config.vision.image_size
    inputs = {
        "input_ids": jax.ShapeDtypeStruct((questions, PROMPT), jnp.int32),
        "pixel_values": jax.ShapeDtypeStruct((questions, 1, tiles, 3, size, size), jnp.uint8),
        "aspect_ratio_ids": jax.ShapeDtypeStruct((questions, 1), jnp.int32),
        "aspect_ratio_mask": jax.ShapeDtypeStruct((questions, 1, tiles), jnp.int32),
        "cross_attention_mask": jax.ShapeDtypeStruct((questions, PROMPT, 1, tiles), jnp.uint8),
    }
    return inputs, jax.ShapeDtypeStruct((questions,), jnp.int32), jax.ShapeDtypeStruct((questions,), jnp.uint32)


def report(name: str, lowered: Any, state: State | None = None) -> None:
    began = time.perf_counter()
    try:
        memory = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as fault:
        print(f"{name}: {str(fault).splitlines()[0]}", flush=True)
        return
    gigabytes = {
        "arguments": memory.argument_size_in_bytes,
        "results": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }
    if state is not None:
        entries = jax.tree.leaves(state.cache, is_leaf=lambda x: isinstance(x, KeyValue))
        gigabytes["of it caches"] = sum(2 * entry.keys.size * entry.keys.dtype.itemsize for entry in entries)
    figures = ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in gigabytes.items())
    print(f"{name}: compiled in {time.perf_counter() - began:.0f} s; GB: {figures}", flush=True)


if __name__ == "__main__":
    main()
