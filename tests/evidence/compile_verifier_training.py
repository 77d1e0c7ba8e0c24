"""Compile the verifier's training step with the whole 11B for slices of 8 chips, and print its memory.

    pip install -e '.[plan]' && python tests/evidence/compile_verifier_training.py \
      | tee tests/evidence/compile_verifier_training.txt

The figures come from the compiler; nothing runs on a TPU. Each step is that of a configuration of this project, with
the longest examples (2048 tokens, an image of 4 tiles), whose batches have the verifier's questions.
"""

import datetime
import importlib.metadata
import sys
from pathlib import Path

import jax

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from llava_cot_jax.model.sharding import make_mesh  # noqa: E402
from llava_cot_jax.planning import slices  # noqa: E402
from llava_cot_jax.planning.compiler import compile_for  # noqa: E402
from llava_cot_jax.planning.model_sizes import model_config_for  # noqa: E402
from llava_cot_jax.planning.programs import abstract_batch  # noqa: E402
from llava_cot_jax.planning.settings import DatasetSize  # noqa: E402
from llava_cot_jax.planning.training_plan import plan_training  # noqa: E402
from llava_cot_jax.train import read_arguments  # noqa: E402
from llava_cot_jax.training.program import make_program  # noqa: E402

GB = 1e9
CONFIGURATIONS = {"llava_cot_11b_verifier_v5e_8": "v5e-8", "llava_cot_11b_verifier_v6e_8": "v6e-8"}
VALUES = DatasetSize(examples=170_000)
"""10,000 questions with 4 candidates for each of 4 stages, and one whole answer, without those that are left out."""


def main() -> None:
    slices.enable_tpu_compiler()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "libtpu"))
    print(f"{datetime.date.today()}; {versions}; compiled for TPUs, run on none", flush=True)
    for name, topology in CONFIGURATIONS.items():
        settings = read_arguments(["--config", str(ROOT / f"configs/{name}.yaml")])[0]
        config, slice_ = model_config_for(settings.checkpoint, settings.convention), slices.parse_topology(topology)
        plan = plan_training(settings, config, slice_, VALUES)
        mesh = make_mesh(**plan.mesh, devices=slice_.devices())
        program = make_program(plan.settings, config, mesh, steps=100, steps_per_epoch=100)
        rows, tokens = settings.loader.batch_size, settings.chat.max_length
        batch = abstract_batch(config, rows, tokens, mesh, probes=True)

        def lower() -> jax.stages.Lowered:
            return program.step.lower(program.state, batch)  # type: ignore[attr-defined]  # noqa: B023

        compiled = compile_for(slice_, plan.mesh, lower, "the training step")
        usable = slice_.generation.usable_hbm_bytes / GB
        needed = compiled.error or f"{compiled.bytes / GB:.2f} GB"
        print(
            f"{name} on {topology}, {rows} rows of {tokens} tokens: {needed} of {usable:.2f} a "
            f"chip by the compiler, {sum(plan.memory.values()) / GB:.2f} by arithmetic; an epoch of "
            f"{VALUES.examples:,} values takes at least "
            f"{plan.roofline.step_seconds * plan.steps / settings.epochs / 3600 * slice_.chips:.0f} chip-hours",
            flush=True,
        )


if __name__ == "__main__":
    main()
