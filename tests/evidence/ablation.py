"""Train the small model to answer in stages, in stages without tags, and directly, and compare the three.

    python tests/evidence/ablation.py --folder runs/miniature | tee tests/evidence/ablation.txt

This is table 3 of the LLaVA-CoT paper (arXiv:2411.10440) in small: the three configurations of configs/miniature/ take
the same compute, and each is trained from three starts. Every model answers the same 2,000 questions of the shapes
world's test split greedily. What a model got right is kept in tests/evidence/ablation.json, so that a call after an
interruption, on any machine, trains only those models that are missing; ``--tables`` trains none. The folder keeps the
runs, each of which resumes from its last checkpoint. A model takes some 12 minutes, on one idle core as on two, so that
two calls side by side, each with its ``--models``, take half the time.
"""

import argparse
import datetime
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from llava_cot_jax.data.shapes.rows import QUESTION_KINDS, ShapesRows  # noqa: E402
from llava_cot_jax.evaluation.held_out import answer_held_out  # noqa: E402
from llava_cot_jax.evaluation.paired import paired_difference  # noqa: E402
from llava_cot_jax.files import write_json  # noqa: E402
from llava_cot_jax.inference.generator import Generator  # noqa: E402
from llava_cot_jax.model.mllama import Mllama  # noqa: E402
from llava_cot_jax.paths import BUNDLED_MODEL_FOLDER  # noqa: E402
from llava_cot_jax.processing.processor import Processor  # noqa: E402

VARIANTS = ("staged", "untagged", "direct")
STARTS = {0: 42, 1: 43, 2: 44}
"""Seeds of the random weights, with the seed of the order of the examples that goes with each."""

MODELS = tuple(f"{variant}-{start}" for start in STARTS for variant in VARIANTS)

QUESTIONS = 2000
LONGEST = 128
"""Largest number of tokens of an answer."""

RECORD = ROOT / "tests" / "evidence" / "ablation.json"
"""What each model got right, as the hexadecimal digits of a number whose bits are the questions in order."""


def train(variant: str, start: int, folder: Path) -> Path:
    """Train a model, or go on where an earlier call was interrupted. Return the folder of the exported checkpoint.

    The model of the package, which tests/evidence/shapes_model.py made, is the first staged one.
    """
    if (variant, start) == ("staged", 0):
        return BUNDLED_MODEL_FOLDER
    name = f"{variant}-{start}"
    run, exported = folder / name, folder / f"{name}-exported"
    seeds = ("--seed", str(start), "--loader.seed", str(STARTS[start]))
    call("train", "--config", f"configs/miniature/{variant}.yaml", "--output", str(run), *seeds)
    if not exported.exists():
        check_finished(run)
        call("convert", str(run), str(exported))
    return exported


def check_finished(run: Path) -> None:
    """Check that a run has done all of its steps, since one that a signal ended may have the exit code 0 too."""
    steps = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["steps"]
    if not (run / "checkpoints" / str(steps)).is_dir():
        raise SystemExit(f"{run} was interrupted before step {steps}: the same command goes on")


def call(command: str, *arguments: str | Path) -> None:
    """Run a command of the package, whose output goes to standard error."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "llava_cot_jax", command, *map(str, arguments)]
    subprocess.run(words, cwd=ROOT, env=environment, check=True, stdout=sys.stderr)


def right_answers(checkpoint: Path) -> list[bool]:
    """Return whether the conclusion of each question of the test split is right."""
    rows = ShapesRows("test", size=QUESTIONS)
    generator = Generator(Mllama.from_pretrained(checkpoint, dtype="float32"))
    found = answer_held_out(generator, Processor.from_pretrained(checkpoint), rows, range(QUESTIONS), LONGEST)
    return [answer.agrees("CONCLUSION") for answer in found]


def encoded(right: list[bool]) -> str:
    """Return the bits of answers as hexadecimal digits, the first question in the highest bit."""
    return f"{int(''.join('01'[each] for each in right), 2):0{len(right) // 4}x}"


def decoded(digits: str) -> np.ndarray:
    """Undo ``encoded``, float64 [questions]."""
    return np.array([float(bit) for bit in f"{int(digits, 16):0{4 * len(digits)}b}"])


def commit() -> str:
    """Return the commit of the checkout, with a plus where files differ from it."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude", "*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def read_record() -> dict[str, Any]:
    """Return what is known of each model, one start after the other."""
    found = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    return {name: found[name] for name in MODELS if name in found}


def fill(models: Sequence[str], folder: Path) -> None:
    """Train those of the models that are missing in the record, and keep what each got right."""
    for name in models:
        if name in read_record():
            continue
        variant, _, start = name.partition("-")
        right = right_answers(train(variant, int(start), folder))
        about = {"date": str(datetime.date.today()), "commit": commit(), "jax": version("jax")}
        # Another process may have added models meanwhile.
        write_json(RECORD, read_record() | {name: about | {"right": encoded(right)}})


def show(record: dict[str, Any]) -> None:
    """Print the accuracy of each model and variant, and the differences between the variants."""
    right = {name: decoded(entry["right"]) for name, entry in record.items()}
    print(f"accuracy on {QUESTIONS} questions of the test split, greedily decoded; standard errors in brackets")
    print(f"{'model':14}{'all':>15}" + "".join(f"{kind.replace('_', ' '):>15}" for kind in QUESTION_KINDS))
    for name, bits in right.items():
        parts = [bits, *(bits[k :: len(QUESTION_KINDS)] for k in range(len(QUESTION_KINDS)))]
        cells = "".join(f"{part.mean():>7.1%} ({part.std() / math.sqrt(len(part)):.1%})" for part in parts)
        print(f"{name:14}{cells}  {record[name]['date']}, {record[name]['commit']}")
    print("\ndifferences: mean over the starts that both have; standard error over questions, and over starts")
    for first, second in (("staged", "direct"), ("staged", "untagged"), ("untagged", "direct")):
        starts = [start for start in STARTS if {f"{first}-{start}", f"{second}-{start}"} <= set(right)]
        if not starts:
            continue
        one, two = (np.stack([right[f"{name}-{start}"] for start in starts]) for name in (first, second))
        paired = paired_difference(one.mean(0).tolist(), two.mean(0).tolist(), range(QUESTIONS))
        each = (one - two).mean(1)
        between = f"{each.std(ddof=1) / math.sqrt(len(each)):.1%}" if len(each) > 1 else "unknown"
        told = ", ".join(f"{difference:+.1%}" for difference in each)
        print(f"{first} less {second}: {paired.difference:+.1%}", end=" ")
        print(f"({paired.standard_error:.1%} over questions, {between} over starts); by start: {told}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="Folder of the runs; by default one that is removed at the end.")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="Models to train; by default, all.")
    parser.add_argument("--tables", action="store_true", help="Print the tables of the record, and train nothing.")
    options = parser.parse_args()
    if not options.tables:
        with tempfile.TemporaryDirectory() as made:
            fill(options.models, options.folder or Path(made))
    show(read_record())


if __name__ == "__main__":
    main()
