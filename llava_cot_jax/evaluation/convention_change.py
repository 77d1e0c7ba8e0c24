"""How far the logits of a checkpoint move where its weights are computed by another convention."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from llava_cot_jax.errors import UserError
from llava_cot_jax.model.checkpoint.folder import weight_files
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.model.sharding import default_mesh
from llava_cot_jax.paths import is_remote
from llava_cot_jax.processing.messages import user_turn
from llava_cot_jax.processing.processor import Processor

QUESTION = "What does the picture show? Describe it in one sentence."

_ROOM = 1.5
"""Bytes of memory that loading a model takes for each byte of its weights, with some room."""


@dataclass(frozen=True)
class ConventionChange:
    """Difference between the logits of two conventions, at the tokens that see the picture.

    Attributes:
        share: Largest difference of a logit, as a share of the largest logit.
        same: Number of tokens after which the likeliest next token is the same.
        tokens: Number of tokens that were compared.
    """

    share: float
    same: int
    tokens: int

    def __str__(self) -> str:
        return (
            f"On one picture and question, logits move by up to {self.share:.1%} of the largest, and the likeliest "
            f"next token stays the same after {self.same} of {self.tokens} tokens."
        )


def measure_change(folder: Path, before: MllamaConfig, after: MllamaConfig) -> ConventionChange:
    """Compute the logits of a fixed picture and question by two conventions.

    Args:
        folder: Folder of the checkpoint.
        before: Configuration with one convention.
        after: Configuration with the other, with taps that give the same vision features.

    Raises:
        UserError: The checkpoint has no tokenizer, or does not fit the memory.
    """
    processor = Processor.from_pretrained(folder, after)
    _check_room(folder)
    prompt = processor.prompt(user_turn(QUESTION, images=1))
    inputs: dict[str, Any] = processor([prompt], [[gradient_picture(after.vision.image_size)]])
    model = Mllama.from_pretrained(folder, config=after, mesh=default_mesh(after))
    new = np.asarray(model(**inputs), np.float32)[0]
    model.config = before
    old = np.asarray(model(**inputs), np.float32)[0]
    sees = inputs["cross_attention_mask"][0].any(axis=(1, 2))
    old, new = old[sees], new[sees]
    same = int((old.argmax(axis=-1) == new.argmax(axis=-1)).sum())
    return ConventionChange(float(np.abs(new - old).max() / np.abs(old).max()), same, len(old))


def gradient_picture(size: int) -> Image.Image:
    """Return a fixed picture that fills one tile: a colour gradient, RGB [size, size]."""
    ramp = np.linspace(0, 255, size).astype(np.uint8)
    red, green = np.broadcast_arrays(ramp[:, None], ramp[None, :])
    return Image.fromarray(np.stack([red, green, 255 - red], axis=-1))


def _check_room(folder: Path) -> None:
    """Check that the weights fit the memory of the devices.

    Raises:
        UserError: They do not.
    """
    statistics = [device.memory_stats() or {} for device in jax.local_devices()]
    limits = [found["bytes_limit"] for found in statistics if "bytes_limit" in found]
    room = sum(limits) if limits else _available_memory()
    size = sum(file.stat().st_size for file in weight_files(folder)) if not is_remote(folder) else 0
    if room is not None and size * _ROOM > room:
        raise UserError(f"the weights take {size / 1e9:.1f} GB, and {room / 1e9:.1f} GB of memory are free")


def _available_memory() -> int | None:
    """Return the bytes of the host's memory that are free, where the system tells."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
