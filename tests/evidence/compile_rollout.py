"""Compile ``rollout`` with the whole 11B for a v5e-8 and a v6e-8, and print its memory and its floor in chip-hours.

    pip install -e '.[plan]' && python tests/evidence/compile_rollout.py | tee tests/evidence/compile_rollout.txt

The figures come from the compiler and from arithmetic; nothing runs on a TPU.
"""

import datetime
import importlib.metadata

import jax
import jax.numpy as jnp
from compile_search import CONFIG, report  # type: ignore[import-not-found]
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llava_cot_jax.benchmark.inputs import endless_tables, random_search_inputs
from llava_cot_jax.benchmark.workload import Workload
from llava_cot_jax.model.sharding import make_mesh
from llava_cot_jax.planning import slices
from llava_cot_jax.planning.programs import abstract_params
from llava_cot_jax.planning.rollout_plan import estimate_rollouts
from llava_cot_jax.search.program import ACCELERATOR_CHUNK
from llava_cot_jax.search.rollout_search import RolloutTables, search_rollouts
from llava_cot_jax.search.scorers import Verifier
from llava_cot_jax.search.strategies import StageBeam

CANDIDATES, CONTINUATIONS, SLOTS, QUESTIONS = 4, 16, 4, 10_000
"""Numbers of candidates, of continuations of each, of questions at a time, and of all questions."""

SPEC = StageBeam(CANDIDATES, Verifier(), max_new_tokens=(128, 256, 512, 64)).to_spec()

WORK = Workload(prompt_tokens=256)


def main() -> None:
    slices.enable_tpu_compiler()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "libtpu"))
    print(f"{datetime.date.today()}; {versions}; compiled for TPUs, run on none")
    longest = ", ".join(map(str, SPEC.max_new_tokens))
    print(
        f"11B, bfloat16, {SLOTS} questions with an image, {CANDIDATES} candidates, {CONTINUATIONS} continuations each,"
    )
    print(f"stages of at most {longest} tokens")
    for name in ("v5e-8", "v6e-8"):
        slice_ = slices.parse_topology(name)
        chip = slice_.generation.chip
        found = estimate_rollouts(CONFIG, SPEC, CONTINUATIONS, chip, questions=QUESTIONS, slots=SLOTS, work=WORK)
        print(
            f"{name}, {slice_.generation.usable_hbm_bytes / 1e9:.1f} GB a chip, mesh tensor: 8\n  {found}", flush=True
        )
        report(lower_rollouts(make_mesh(tensor=8, devices=slice_.devices())))


def lower_rollouts(mesh: Mesh) -> jax.stages.Lowered:
    def given() -> tuple:
        stages, scorers = endless_tables(CONFIG, WORK, SPEC)
        tables = RolloutTables(jnp.zeros((1, 2, CONFIG.text.vocab_size), jnp.uint8), scorers.verifier)
        return random_search_inputs(CONFIG, WORK, SLOTS), stages, scorers, tables

    everywhere = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), jax.eval_shape(given))
    params = unflatten_dict(abstract_params(CONFIG, "bfloat16", mesh), sep=".")
    static = {"config": CONFIG, "spec": SPEC, "prefill_chunk": ACCELERATOR_CHUNK, "mesh": mesh}
    return search_rollouts.lower(params, *shapes, **static, continuations=CONTINUATIONS)


if __name__ == "__main__":
    main()
