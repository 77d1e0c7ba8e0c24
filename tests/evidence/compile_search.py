"""Compile the search with the whole 11B for TPUs, on a machine without one, and print its memory.

    pip install -e '.[plan]' && python tests/evidence/compile_search.py | tee tests/evidence/compile_search.txt

The figures come from the compiler: nothing here was run on a TPU. First the loop that draws candidates, alone: what it
keeps beyond its arguments is small, and every cache is aliased. Then the whole search, vision tower and judge and all,
as ``Reasoner`` compiles it: whether it fits, and for how many questions at a time.
"""

import os

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

import datetime
import functools
import importlib.metadata
import re
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llava_cot_jax.benchmark.workload import Workload, request, tables
from llava_cot_jax.model.cache import Prefix, empty
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.parameters import nest, parameters
from llava_cot_jax.model.quantization import is_quantized
from llava_cot_jax.model.sharding import make_mesh, on_mesh, parameter_sharding, partition
from llava_cot_jax.model.text import IMAGE_TOKEN_MULTIPLE, see
from llava_cot_jax.search.decode import View
from llava_cot_jax.search.program import search, write_candidates
from llava_cot_jax.search.strategies import Judge, StageBeam

CONFIG = MllamaConfig.llama32_11b()
BUDGET, CHUNK = 1024, 256
WORK = Workload(prompt=256, stages=(BUDGET,) * 4, judge_words=200)

GB = 1e9


def main() -> None:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "libtpu"))
    print(f"{datetime.date.today()}; {versions}; compiled for TPUs, run on none")
    print(f"11B, bfloat16, one image of 4 tiles a question, {BUDGET} tokens a stage, top_k 50, top_p 0.9\n")
    chips = {
        "v6e": ("v6e:1x1", {"chips_per_host_bounds": [1, 1, 1]}, 1, 31.25 * 2**30),
        "v5p": ("v5p:1x1x1", {"chips_per_host_bounds": [1, 1, 1]}, 1, 95 * 2**30),
        "v5e x 4": ("v5e:2x2", {}, 4, 15.75 * 2**30),
        "v5e int8": ("v5e:1x1", {"chips_per_host_bounds": [1, 1, 1]}, 1, 15.75 * 2**30),
    }
    wanted = sys.argv[1:] or ["loop", *chips]
    for name, (topology, options, tensor, memory) in chips.items():
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
        mesh = make_mesh(tensor=tensor, devices=devices[:tensor])
        if name == "v6e" and "loop" in wanted:
            candidate_loop(mesh, questions=4, candidates=10)
        if name not in wanted:
            continue
        print(f"\nthe whole search on {name}, {memory / GB:.1f} GB a chip; of each chip")
        for candidates, verdict in (
            ((10, "token"), (10, "rationale"), (4, "token")) if name == "v6e" else ((10, "token"),)
        ):
            fill = memory if name == "v6e" and verdict == "token" else None
            most(mesh, candidates, verdict, fill, int8="int8" in name)


def candidate_loop(mesh: Mesh, questions: int, candidates: int) -> None:
    """The drawing of one stage's candidates after 2048 tokens of prompt."""
    plan = StageBeam(candidates, budget=BUDGET).plan()
    everywhere = NamedSharding(mesh, PartitionSpec())

    @functools.partial(jax.jit, donate_argnames="own")
    def loop(params, scores, prefix, own, view, reader, keys, number):
        with on_mesh(mesh):
            return write_candidates(params, CONFIG, plan, scores, prefix, own, view, reader, keys, number)

    cache = functools.partial(empty, CONFIG.text, dtype=jnp.bfloat16)
    shapes = jax.eval_shape(
        lambda: {
            "scores": jnp.zeros((questions, CONFIG.text.vocab_size), jnp.float32),
            "prefix": Prefix(cache(questions, 2048), jnp.zeros(questions, jnp.int32)),
            "own": cache(questions * candidates, BUDGET),
            "view": image_view(questions, 2048),
            "reader": jnp.zeros((13, CONFIG.text.vocab_size), jnp.uint8),
            "keys": jax.vmap(jax.random.key)(jnp.zeros(questions, jnp.uint32)),
            "number": jnp.int32(0),
        }
    )
    print(f"the loop that draws candidates, on v6e, {questions} questions of {candidates}, 2048 tokens of prompt")
    compiled, _ = report(loop.lower(abstract_params(mesh), **jax.tree.map(lambda x: placed(x, everywhere), shapes)))
    caches = 2 * sum(entry is not None for entry in shapes["own"])
    aliased = re.search(r"input_output_alias=\{(.*?)\}, entry", compiled.as_text(), re.DOTALL)
    print(f"  {len(re.findall('may-alias|must-alias', aliased[1])) if aliased else 0} of {caches} caches aliased")


def image_view(questions: int, tokens: int) -> View:
    vision, text = CONFIG.vision, CONFIG.text
    seen = vision.image_tokens + -vision.image_tokens % IMAGE_TOKEN_MULTIPLE
    images = empty(text, questions, seen, jnp.dtype(jnp.bfloat16))
    entry = next(x for x in images if x is not None)
    mask = jnp.zeros((questions, tokens, 1, vision.max_num_tiles), jnp.uint8)
    layers = tuple(entry if cross else None for cross in text.is_cross)
    return View(layers, see(CONFIG, mask), jnp.zeros(questions, jnp.int32))


def most(mesh: Mesh, candidates: int, verdict: str, memory: float | None, int8: bool) -> None:
    """One question at a time; and, with a memory to fill, how many at most: told from two, then tried, one by one."""

    def tried(questions: int) -> float | None:
        print(f"{candidates} candidates, {verdict} verdict, {questions} at a time", flush=True)
        return whole(mesh, questions, candidates, verdict, int8)

    one = tried(1)
    if one is None or memory is None:
        return
    two = tried(2)
    if two is None:
        return
    questions = max(3, 1 + int((memory - one) / (two - one)))
    if tried(questions) is None:
        while questions > 3 and tried(questions - 1) is None:
            questions -= 1
        return
    while tried(questions + 1) is not None:
        questions += 1


def whole(mesh: Mesh, questions: int, candidates: int, verdict: str, int8: bool) -> float | None:
    """Compile the whole search: its bytes on a chip, None where it does not fit."""
    plan = StageBeam(candidates, Judge(verdict), budget=BUDGET).plan()  # type: ignore[arg-type]
    everywhere = NamedSharding(mesh, PartitionSpec())
    given = jax.eval_shape(lambda: (request(CONFIG, WORK, questions), *tables(CONFIG, WORK, plan)))
    given = jax.tree.map(lambda x: placed(x, everywhere), given)
    params = abstract_params(mesh, int8)
    lowered = search.lower(params, *given, config=CONFIG, plan=plan, chunk=CHUNK, mesh=mesh)
    return report(lowered)[1]


def abstract_params(mesh: Mesh, int8: bool = False) -> Any:
    arrays = {}
    for path, p in parameters(CONFIG, "unrolled").items():
        sharding = parameter_sharding(p, mesh)
        dtype = jnp.int8 if int8 and is_quantized(path) else jnp.bfloat16
        arrays[path] = jax.ShapeDtypeStruct(p.shape, dtype, sharding=sharding)
        if dtype == jnp.int8:
            everywhere = NamedSharding(mesh, PartitionSpec())
            scale = jax.ShapeDtypeStruct(p.shape[:1], jnp.float32, sharding=everywhere)
            arrays[path.removesuffix("weight") + "scale"] = scale
    return nest(arrays)


def placed(x: Any, everywhere: NamedSharding) -> jax.ShapeDtypeStruct:
    """Caches are cut by their heads, the rest is everywhere."""
    heads = x.ndim == 4 and x.dtype == jnp.bfloat16
    spec = NamedSharding(everywhere.mesh, partition(["batch", "kv_heads", None, None])) if heads else everywhere
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spec)


def report(lowered: Any) -> tuple[Any, float | None]:
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as fault:
        needed = re.search(r"[Uu]sed ([\d.]+\w) of ([\d.]+\w)", str(fault))
        what = f"needs {needed[1]} of {needed[2]}" if needed else str(fault).splitlines()[0][:200]
        print(f"  does not fit: {what}; found out in {time.perf_counter() - began:.0f} s", flush=True)
        return None, None
    memory = compiled.memory_analysis()
    parts = {
        kind: getattr(memory, f"{field}_size_in_bytes") / GB
        for kind, field in [
            ("arguments", "argument"),
            ("results", "output"),
            ("aliased", "alias"),
            ("temporaries", "temp"),
        ]
    }
    total = parts["arguments"] + parts["results"] - parts["aliased"] + parts["temporaries"]
    figures = ", ".join(f"{kind} {size:.2f}" for kind, size in parts.items())
    print(f"  compiled in {time.perf_counter() - began:.0f} s; GB: {figures}; in all {total:.2f}", flush=True)
    return compiled, total * GB


if __name__ == "__main__":
    main()
