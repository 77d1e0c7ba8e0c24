"""Compile the search with the whole 11B for TPUs, on a machine without one, and print its memory.

    pip install -e '.[plan]' && python tests/evidence/compile_search.py | tee tests/evidence/compile_search.txt

The figures come from the compiler: nothing here was run on a TPU. First the loop that draws candidates, alone: what it
keeps beyond its arguments is small, and every cache is aliased. Then the whole search, vision tower and judge and all,
as ``Reasoner`` compiles it: whether it fits, and for how many questions at a time.
"""

import datetime
import functools
import importlib.metadata
import re
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llava_cot_jax.benchmark.workload import Workload
from llava_cot_jax.inference.decoding import View
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.kv_cache import Prefix, empty
from llava_cot_jax.model.parameters import nest
from llava_cot_jax.model.sharding import make_mesh, on_mesh, partition
from llava_cot_jax.model.text_decoder import IMAGE_TOKEN_MULTIPLE, see
from llava_cot_jax.planning import slices
from llava_cot_jax.planning.programs import abstract_weights, lowered_search
from llava_cot_jax.search.program import write_candidates
from llava_cot_jax.search.strategies import Judge, StageBeam

CONFIG = MllamaConfig.llama32_11b()
BUDGET = 1024
WORK = Workload(prompt=256, stages=(BUDGET,) * 4, judge_words=200)

GB = 1e9


def main() -> None:
    slices.prepare()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "libtpu"))
    print(f"{datetime.date.today()}; {versions}; compiled for TPUs, run on none")
    print(f"11B, bfloat16, one image of 4 tiles a question, {BUDGET} tokens a stage, top_k 50, top_p 0.9\n")
    chips = {
        "v6e": ("v6e-1", "bfloat16"),
        "v5p": ("v5p:1x1x1", "bfloat16"),
        "v5e x 4": ("v5e-4", "bfloat16"),
        "v5e int8": ("v5e-1", "int8"),
    }
    wanted = sys.argv[1:] or ["loop", *chips]
    for name, (topology, dtype) in chips.items():
        slice_ = slices.parse(topology)
        mesh = make_mesh(tensor=slice_.chips, devices=slice_.devices())
        if name == "v6e" and "loop" in wanted:
            candidate_loop(mesh, questions=4, candidates=10)
        if name not in wanted:
            continue
        memory = slice_.generation.usable
        print(f"\nthe whole search on {name}, {memory / GB:.1f} GB a chip; of each chip")
        for candidates, verdict in (
            ((10, "token"), (10, "rationale"), (4, "token")) if name == "v6e" else ((10, "token"),)
        ):
            fill = memory if name == "v6e" and verdict == "token" else None
            most(mesh, candidates, verdict, fill, dtype)


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
    compiled, _ = report(
        loop.lower(
            nest(abstract_weights(CONFIG, "bfloat16", mesh)), **jax.tree.map(lambda x: placed(x, everywhere), shapes)
        )
    )
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


def most(mesh: Mesh, candidates: int, verdict: str, memory: float | None, dtype: Any) -> None:
    """One question at a time; and, with a memory to fill, how many at most: told from two, then tried, one by one."""

    def tried(questions: int) -> float | None:
        print(f"{candidates} candidates, {verdict} verdict, {questions} at a time", flush=True)
        return whole(mesh, questions, candidates, verdict, dtype)

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


def whole(mesh: Mesh, questions: int, candidates: int, verdict: str, dtype: Any) -> float | None:
    """Compile the whole search: its bytes on a chip, None where it does not fit."""
    plan = StageBeam(candidates, Judge(verdict), budget=BUDGET).plan()  # type: ignore[arg-type]
    return report(lowered_search(CONFIG, plan, WORK, questions, dtype, mesh))[1]


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
