"""Compile the search with the whole 11B for TPUs, on a machine without one, and print its memory.

    pip install -e '.[plan]' && python tests/evidence/compile_search.py | tee tests/evidence/compile_search.txt

The figures come from the compiler; nothing runs on a TPU. The first program is the loop that samples candidates, whose
temporaries should be small and whose caches should all be aliased. The others are the whole search as ``Reasoner``
compiles it, with vision tower and judge: whether it fits, and with how many questions together.
"""

import argparse
import datetime
import functools
import importlib.metadata
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llava_cot_jax.benchmark.workload import Workload
from llava_cot_jax.costs.model_costs import padded_image_tokens
from llava_cot_jax.inference.decoding import Decoder
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.image_context import ImageContext, cross_attention_mask
from llava_cot_jax.model.kv_cache import Segment, init_cache
from llava_cot_jax.model.sharding import make_mesh, partition_spec, use_mesh
from llava_cot_jax.planning import slices
from llava_cot_jax.planning.programs import abstract_params, lower_search
from llava_cot_jax.search.program import sample_candidates
from llava_cot_jax.search.scorers import Judge
from llava_cot_jax.search.strategies import StageBeam

CONFIG = MllamaConfig.llama32_11b()
BUDGET = 1024
WORK = Workload(prompt_tokens=256, stage_tokens=(BUDGET,) * 4, judge_prompt_tokens=200)

GB = 1e9

CHIPS = {
    "v6e": ("v6e-1", "bfloat16"),
    "v5p": ("v5p:1x1x1", "bfloat16"),
    "v5e x 4": ("v5e-4", "bfloat16"),
    "v5e int8": ("v5e-1", "int8"),
}
"""Topology and dtype of the weights of each search."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["loop", *CHIPS]
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", help=f"Programs to compile: {', '.join(names)}.")
    programs = parser.parse_args().programs or names
    if unknown := set(programs) - set(names):
        parser.error(f"unknown program {min(unknown)!r}; choose from {', '.join(names)}")
    slices.enable_tpu_compiler()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "libtpu"))
    print(f"{datetime.date.today()}; {versions}; compiled for TPUs, run on none")
    print(f"11B, bfloat16, one image of 4 tiles a question, {BUDGET} tokens a stage, top_k 50, top_p 0.9\n")
    for name, (topology, dtype) in CHIPS.items():
        slice_ = slices.parse_topology(topology)
        mesh = make_mesh(tensor=slice_.chips, devices=slice_.devices())
        if name == "v6e" and "loop" in programs:
            candidate_loop(mesh, questions=4, candidates=10)
        if name not in programs:
            continue
        memory = slice_.generation.usable_hbm_bytes
        print(f"\nthe whole search on {name}, {memory / GB:.1f} GB per chip; figures per chip")
        for candidates, verdict in (
            ((10, "token"), (10, "rationale"), (4, "token")) if name == "v6e" else ((10, "token"),)
        ):
            fill = memory if name == "v6e" and verdict == "token" else None
            most(mesh, candidates, verdict, fill, dtype)


def candidate_loop(mesh: Mesh, questions: int, candidates: int) -> None:
    """Compile the loop that samples the candidates of one stage, after a prompt of 2048 tokens."""
    spec = StageBeam(candidates, max_new_tokens=BUDGET).to_spec()
    everywhere = NamedSharding(mesh, PartitionSpec())

    @functools.partial(jax.jit, donate_argnames="suffix")
    def loop(params, logits, prefix, suffix, images, stop_tables, keys, stage):
        with use_mesh(mesh):
            decoder = Decoder(params, CONFIG, images, prefill_chunk=1)
            return sample_candidates(decoder, spec, logits, (prefix,), suffix, stop_tables, keys, stage)

    cache = functools.partial(init_cache, CONFIG.text, dtype=jnp.bfloat16)
    shapes = jax.eval_shape(
        lambda: {
            "logits": jnp.zeros((questions, CONFIG.text.vocab_size), jnp.float32),
            "prefix": Segment(cache(questions, 2048), jnp.zeros(questions, jnp.int32)),
            "suffix": cache(questions * candidates, BUDGET),
            "images": image_context(questions, 2048),
            "stop_tables": jnp.zeros((4, 13, CONFIG.text.vocab_size), jnp.uint8),
            "keys": jax.vmap(jax.random.key)(jnp.zeros(questions, jnp.uint32)),
            "stage": jnp.zeros(questions, jnp.int32),
        }
    )
    print(f"the loop that samples candidates, on v6e, {questions} questions of {candidates}, 2048 tokens of prompt")
    compiled, _ = report(
        loop.lower(
            unflatten_dict(abstract_params(CONFIG, "bfloat16", mesh), sep="."),
            **jax.tree.map(lambda x: placed(x, everywhere), shapes),
        )
    )
    caches = 2 * sum(entry is not None for entry in shapes["suffix"])
    aliased = re.search(r"input_output_alias=\{(.*?)\}, entry", compiled.as_text(), re.DOTALL)
    print(f"  {len(re.findall('may-alias|must-alias', aliased[1])) if aliased else 0} of {caches} caches aliased")


def image_context(questions: int, tokens: int) -> ImageContext:
    vision, text = CONFIG.vision, CONFIG.text
    seen = padded_image_tokens(CONFIG)
    images = init_cache(text, questions, seen, jnp.dtype(jnp.bfloat16))
    entry = next(x for x in images if x is not None)
    mask = jnp.zeros((questions, tokens, 1, vision.max_num_tiles), jnp.uint8)
    layers = tuple(entry if cross else None for cross in text.is_cross)
    masks = cross_attention_mask(CONFIG, mask)
    return ImageContext(*masks, layers=layers, last_token=jnp.zeros(questions, jnp.int32))


def most(mesh: Mesh, candidates: int, verdict: str, memory: float | None, dtype: Any) -> None:
    """Compile the search for one question and, with a memory to fill, for the most questions that fit together.

    That number is estimated from the memory of one and of two questions, and then found one by one.
    """

    def tried(questions: int) -> float | None:
        print(f"{candidates} candidates, {verdict} verdict, {questions} together", flush=True)
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
    """Compile the whole search. Return its bytes per chip; None where it does not fit."""
    spec = StageBeam(candidates, Judge(verdict), max_new_tokens=BUDGET).to_spec()
    return report(lower_search(CONFIG, spec, WORK, questions, dtype, mesh))[1]


def placed(x: Any, everywhere: NamedSharding) -> jax.ShapeDtypeStruct:
    """Return the shape of an input with its sharding: KV caches by their heads, all else replicated."""
    heads = x.ndim == 4 and x.dtype == jnp.bfloat16
    spec = NamedSharding(everywhere.mesh, partition_spec(["batch", "kv_heads", None, None])) if heads else everywhere
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
