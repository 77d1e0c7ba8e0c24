"""Compare float32 training state with bfloat16 state that is rounded stochastically or to the nearest value.

    python tests/evidence/precision.py | tee tests/evidence/precision.txt

The shapes model is trained from scratch for 1,000 steps as in configs/shapes_cpu.yaml, but with batches of 16 and with
upstream's b2, 0.999, with which a bfloat16 second moment that is rounded to the nearest hardly decays. All three runs
compute in float32 on the same batches. Second moments are compared entry by entry with those of the float32 run at the
same step, without the entries that are below 1e-12 in float32.
"""

import argparse
import datetime
import os
import platform
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.training.small_run import losses, metrics  # noqa: E402

PRECISIONS = ("float32", "bfloat16_stochastic", "bfloat16_nearest")
SHOWN = (1, 50, 100, 200, 400, 600, 800, 1000)


def train(precision: str, output: Path, steps: int) -> str:
    """Train a model, and return what the run prints."""
    settings = {
        "output": output,
        "steps": steps,
        "loader.batch_size": 16,
        "optimizer.precision": precision,
        "optimizer.b2": 0.999,
        "eval_every": 0,
        "checkpoints.every": steps // 2,
        "eval_generations": 512,
    }
    arguments = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "llava_cot_jax.train", "--config", ROOT / "configs/shapes_cpu.yaml", *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, check=True, text=True, stdout=subprocess.PIPE).stdout


def second_moments(output: Path, step: int) -> np.ndarray:
    """Return the second moments of all parameters, float32 [parameters]."""
    progress = ocp.load_checkpointables(output / f"checkpoints/{step}", {"progress": None})["progress"]
    leaves = jax.tree.leaves(progress["optimizer"][0]["nu"])
    return np.concatenate([np.asarray(leaf, np.float32).reshape(-1) for leaf in leaves])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="Number of steps of each run, at least 2.")
    steps = parser.parse_args().steps
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "optax"))
    print(f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, {versions}")
    with tempfile.TemporaryDirectory() as folder:
        outputs = {precision: Path(folder) / precision for precision in PRECISIONS}
        printed = {precision: train(precision, output, steps) for precision, output in outputs.items()}
        print(f"\n{'loss, mean of the 50 steps up to':34}" + "".join(f"{precision:>21}" for precision in PRECISIONS))
        curves = {precision: losses(output) for precision, output in outputs.items()}
        for step in (step for step in SHOWN if step <= steps):
            means = [np.mean(curves[precision][max(step - 50, 0) : step]) for precision in PRECISIONS]
            print(f"{step:>34}" + "".join(f"{mean:21.4f}" for mean in means))
        validations = [[line for line in metrics(o) if "validation_loss" in line][-1] for o in outputs.values()]
        for stage in ("", "_caption", "_reasoning", "_conclusion"):
            found = [validation[f"validation_loss{stage}"] for validation in validations]
            print(f"{'validation loss' + stage.replace('_', ', '):34}" + "".join(f"{loss:21.4f}" for loss in found))
        for stage in ("captions", "conclusions"):
            shares = [re.search(rf"{stage} that are the row's own: (.*)", text)[1] for text in printed.values()]
            print(f"{stage}: " + "; ".join(f"{p} {share}" for p, share in zip(PRECISIONS, shares, strict=True)))
        print("\nsecond moments over those of float32: 10%, 50% and 90% quantile, and the sum of all over theirs")
        for step in (steps // 2, steps):
            wide = second_moments(outputs["float32"], step)
            for precision in PRECISIONS[1:]:
                narrow = second_moments(outputs[precision], step)
                counted = wide > 1e-12
                ratios = np.quantile(narrow[counted] / wide[counted], [0.1, 0.5, 0.9])
                print(f"step {step:5} {precision:20}", *(f"{x:8.3f}" for x in (*ratios, narrow.sum() / wide.sum())))


if __name__ == "__main__":
    main()
