"""The README's first training, as a new user runs it, and its exported checkpoint in transformers.

    python tests/evidence/shapes_training.py

runs configs/shapes_cpu.yaml with nothing cached, prints what it prints, its curve and its time, converts the run, and
compares logits on 16 held-out rows with those of transformers under the convention that the run was trained with.
"""

import datetime
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from transformers import MllamaForConditionalGeneration

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from llava_cot_jax.data.chat import Chat  # noqa: E402
from llava_cot_jax.data.processor import Processor  # noqa: E402
from llava_cot_jax.data.settings import ChatSettings  # noqa: E402
from llava_cot_jax.data.shapes import ShapesRows  # noqa: E402
from llava_cot_jax.model.mllama import Mllama  # noqa: E402
from tests.parity.reference import under  # noqa: E402
from tests.training.small_run import losses, metrics  # noqa: E402

ROWS = 16


def run(folder: Path, *arguments: str) -> str:
    """What a command of the package prints, in a process with an empty cache."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, check=True, text=True, stdout=subprocess.PIPE).stdout


def logits_there(folder: Path, inputs: dict[str, np.ndarray], processor: Processor) -> np.ndarray:
    """transformers', of the same tiles, normalised."""
    vision = processor.config.vision
    mean, std = (np.reshape(x, (3, 1, 1)) for x in (vision.image_mean, vision.image_std))
    model = MllamaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad(), under(processor.config.convention, model):
        tensors = {name: torch.tensor(x) for name, x in inputs.items()}
        pixels = torch.tensor((inputs["pixel_values"] / 255 - mean) / std, dtype=torch.float32)
        return model(**tensors | {"pixel_values": pixels}).logits.numpy()


def main() -> None:
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "transformers", "torch"))
    print(f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, {versions}\n")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        began = time.perf_counter()
        print(
            run(folder, "llava_cot_jax.train", "--config", "configs/shapes_cpu.yaml", "--output", str(folder / "run"))
        )
        print(f"{time.perf_counter() - began:.0f} s in all")
        curve = losses(folder / "run")
        for step in range(100, len(curve) + 1, 100):
            print(f"step {step}: loss {np.mean(curve[step - 100 : step]):.4f}, mean of the last 100")
        steps = [line for line in metrics(folder / "run") if "seconds" in line]
        print(f"a step: {np.median([line['seconds'] for line in steps]):.3f} s, the median;", end=" ")
        print(f"waited for data: {sum(line['waiting_seconds'] for line in steps):.1f} s in all")

        run(folder, "llava_cot_jax.convert", str(folder / "run"), str(folder / "exported"))
        processor = Processor.from_pretrained(folder / "exported")
        rows = [ShapesRows("validation")[i] for i in range(ROWS)]
        chat = Chat(processor, ChatSettings())
        inputs = processor.collate([chat.encode(row.turns).ids for row in rows], [[row.image] for row in rows])
        present = inputs["attention_mask"].astype(bool)
        ours = np.asarray(Mllama.from_pretrained(folder / "exported")(**inputs))[present]
        theirs = logits_there(folder / "exported", inputs, processor)[present]
        print(f"exported, {ROWS} rows: logits up to {np.abs(theirs).max():.1f} in transformers;", end=" ")
        print(f"they differ from ours by at most {np.abs(ours - theirs).max():.1e}")


if __name__ == "__main__":
    main()
