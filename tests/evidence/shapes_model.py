"""Train the model that comes with the package again, and compare it with the shipped one.

    python tests/evidence/shapes_model.py | tee tests/evidence/shapes_model.txt

The script trains configs/shapes_cpu.yaml as a new user does, with nothing cached, exports the run, and compares the
answers of the new and the shipped model to 1000 pictures of the test split, greedily decoded, by type of question. It
then compares logits on 16 held-out rows with those of transformers.
"""

import argparse
import datetime
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from transformers import MllamaForConditionalGeneration

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from llava_cot_jax.data.chat import Chat  # noqa: E402
from llava_cot_jax.data.settings import ChatSettings  # noqa: E402
from llava_cot_jax.data.shapes.rows import QUESTION_KINDS, ShapesRows  # noqa: E402
from llava_cot_jax.data.shapes.tokenizer import shapes_config, train_tokenizer  # noqa: E402
from llava_cot_jax.evaluation.held_out import answer_held_out  # noqa: E402
from llava_cot_jax.evaluation.statistics import accuracy  # noqa: E402
from llava_cot_jax.inference.generator import Generator  # noqa: E402
from llava_cot_jax.model.checkpoint.auxiliary_files import write_auxiliary_files  # noqa: E402
from llava_cot_jax.model.mllama import Mllama  # noqa: E402
from llava_cot_jax.paths import BUNDLED_MODEL_FOLDER  # noqa: E402
from llava_cot_jax.processing.processor import Processor  # noqa: E402
from tests.parity.reference import under  # noqa: E402
from tests.training.small_run import losses, metrics  # noqa: E402

ROWS = 16
QUESTIONS = 1000
LONGEST = 128
"""Largest number of tokens of an answer, which is ``max_new_tokens`` of the shipped generation_config.json."""


def run(folder: Path, *arguments: str) -> str:
    """Run a command of the package with an empty cache, and return what it prints."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, check=True, text=True, stdout=subprocess.PIPE).stdout


def train(scratch: Path) -> Path:
    """Train the model, and return the folder of the run."""
    began = time.perf_counter()
    print(run(scratch, "llava_cot_jax.train", "--config", "configs/shapes_cpu.yaml", "--output", str(scratch / "run")))
    print(f"{time.perf_counter() - began:.0f} s in all")
    return scratch / "run"


def export(trained: Path, scratch: Path) -> Path:
    """Export the model of a run, and return the folder of the checkpoint."""
    curve = losses(trained)
    for step in range(100, len(curve) + 1, 100):
        print(f"step {step}: loss {np.mean(curve[step - 100 : step]):.4f}, mean of the last 100")
    steps = [line for line in metrics(trained) if "seconds" in line]
    print(f"a step: {np.median([line['seconds'] for line in steps]):.3f} s, the median;", end=" ")
    print(f"waited for data: {sum(line['waiting_seconds'] for line in steps):.1f} s in all\n")
    run(scratch, "llava_cot_jax.convert", str(trained), str(scratch / "made"))
    # The exported files beside the weights are copies of the shipped ones. The code must still make the same.
    (scratch / "beside").mkdir()
    write_auxiliary_files(
        scratch / "beside", shapes_config(), train_tokenizer(), "float32", generation={"max_new_tokens": LONGEST}
    )
    for path in (scratch / "beside").iterdir():
        same = path.read_bytes() == (scratch / "made" / path.name).read_bytes()
        print(f"{path.name}: {'as the code makes it' if same else 'NOT as the code makes it'}")
    return scratch / "made"


def right_answers(checkpoint: Path) -> tuple[np.ndarray, list[str]]:
    """Answer questions. Return whether each conclusion is right, bool [questions], and the answers."""
    processor = Processor.from_pretrained(checkpoint)
    generator = Generator(Mllama.from_pretrained(checkpoint, dtype="float32"))
    found = list(answer_held_out(generator, processor, ShapesRows("test"), range(QUESTIONS), LONGEST))
    return np.array([answered.agrees("CONCLUSION") for answered in found]), [answered.answer for answered in found]


def tell_accuracy(name: str, right: np.ndarray) -> None:
    """Print the share of right conclusions by type of question, with standard errors."""
    parts = {kind: right[k :: len(QUESTION_KINDS)] for k, kind in enumerate(QUESTION_KINDS)} | {"all": right}
    shares = {kind: accuracy(list(part)) for kind, part in parts.items()}
    told = ", ".join(f"{kind.replace('_', ' ')} {p:.1%} ({error:.1%})" for kind, (p, error) in shares.items())
    print(f"{name}: right conclusions of {len(right)}, with standard errors: {told}")


def compare(made: Path) -> None:
    """Compare the new model with the shipped one."""
    (first, answers), (second, others) = right_answers(BUNDLED_MODEL_FOLDER), right_answers(made)
    tell_accuracy("shipped", first)
    tell_accuracy("made now", second)
    paired = second.astype(float) - first
    error = paired.std() / math.sqrt(len(paired))
    print(f"difference, paired: {paired.mean():+.1%} (standard error {error:.1%});", end=" ")
    same = np.mean([a == b for a, b in zip(answers, others, strict=True)])
    print(f"answers that are word for word the same: {same:.1%}")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (BUNDLED_MODEL_FOLDER, made))
    equal = ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
    print(f"weights are {'the same bit for bit' if equal else 'not the same bit for bit'}")


def logits_there(folder: Path, inputs: dict[str, np.ndarray], processor: Processor) -> np.ndarray:
    """Return the logits of transformers for the same tiles, normalised."""
    vision = processor.config.vision
    mean, std = (np.reshape(x, (3, 1, 1)) for x in (vision.image_mean, vision.image_std))
    model = MllamaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad(), under(processor.config.convention, model):
        tensors = {name: torch.tensor(x) for name, x in inputs.items()}
        pixels = torch.tensor((inputs["pixel_values"] / 255 - mean) / std, dtype=torch.float32)
        return model(**tensors | {"pixel_values": pixels}, use_cache=False).logits.numpy()


def hold_to_transformers(folder: Path) -> None:
    """Compare logits on held-out rows with those of transformers."""
    processor = Processor.from_pretrained(folder)
    rows = [ShapesRows("validation")[i] for i in range(ROWS)]
    chat = Chat(processor, ChatSettings())
    inputs = processor.collate([chat.encode(row.turns).ids for row in rows], [row.images for row in rows])
    present = inputs["attention_mask"].astype(bool)
    ours = np.asarray(Mllama.from_pretrained(folder)(**inputs))[present]
    theirs = logits_there(folder, inputs, processor)[present]
    print(f"exported, {ROWS} rows: logits up to {np.abs(theirs).max():.1f} in transformers;", end=" ")
    print(f"they differ from ours by at most {np.abs(ours - theirs).max():.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", action="store_true", help="Replace the shipped model with the new one.")
    parser.add_argument(
        "--run",
        type=Path,
        help="Folder of a finished run of configs/shapes_cpu.yaml, which is taken instead of a new run.",
    )
    options = parser.parse_args()
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "transformers", "torch"))
    print(f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, {versions}\n")
    with tempfile.TemporaryDirectory() as scratch:
        made = export(options.run or train(Path(scratch)), Path(scratch))
        compare(made)
        hold_to_transformers(made)
        if options.install:
            for path in made.iterdir():
                shutil.copyfile(path, BUNDLED_MODEL_FOLDER / path.name)
            print(f"installed in {BUNDLED_MODEL_FOLDER.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
