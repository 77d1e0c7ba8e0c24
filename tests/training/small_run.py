"""A small checkpoint for the shapes world, and the command that trains it: seconds a run."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - numpy learns bfloat16
from safetensors.numpy import save_file

from llava_cot_jax.data.shapes.tokenizer import shapes_config, shapes_tokenizer
from llava_cot_jax.model.checkpoint.auxiliary_files import write_auxiliary_files
from llava_cot_jax.model.config import MllamaConfig
from tests.demo import random_weights
from tests.processes import WITHOUT_TORCH, xla_flags


def small_config() -> MllamaConfig:
    """The shapes model with three text layers and three of the tower."""
    config = shapes_config()
    return replace(
        config,
        text=replace(config.text, num_hidden_layers=3, cross_attention_layers=(1,)),
        vision=replace(config.vision, num_hidden_layers=2, num_global_layers=1),
    )


def write_small(folder: Path) -> Path:
    """Its checkpoint, of random weights."""
    folder.mkdir(parents=True)
    config = small_config()
    write_auxiliary_files(folder, config, shapes_tokenizer(), "float32")
    save_file(random_weights(config, seed=0), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def arguments(checkpoint: Path | str, output: Path | str, **settings: Any) -> list[str]:
    """A run of few, short batches on the shapes world; settings by their dotted names, with _ for dots' sake as __."""
    defaults: dict[str, Any] = {
        "steps": 6,
        "dtype": "float32",
        "remat": "none",
        "eval_examples": 16,
        "chat.max_length": 128,
        "loader.batch_size": 8,
        "loader.num_buckets": 1,
        "loader.pad_to_multiple_of": 32,
        "loader.num_threads": 2,
        "optimizer.learning_rate": 0.003,
        "optimizer.b2": 0.98,
        "optimizer.schedule": "cosine",
    }
    given = defaults | {name.replace("__", "."): value for name, value in settings.items()}
    command = ["--output", str(output), "--checkpoint", str(checkpoint), "--data", "shapes"]
    for name, value in given.items():
        command += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return command


def environment(cache: Path, devices: int = 1, *, quick: bool = True) -> dict[str, str]:
    """Return the environment of a process with a number of devices and without torch, whose caches are in ``cache``."""
    return os.environ | {
        "XLA_FLAGS": xla_flags(devices, quick=quick),
        "PYTHONPATH": WITHOUT_TORCH,
        "XDG_CACHE_HOME": str(cache),
    }


def command(*arguments: str, cache: Path, devices: int = 1, quick: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command of the package in a process of its own, with ``arguments`` from its name on."""
    name, *rest = arguments
    return subprocess.run(
        [sys.executable, "-m", f"llava_cot_jax.{name}", *rest],
        env=environment(cache, devices, quick=quick),
        capture_output=True,
        text=True,
        timeout=600,
    )


def metrics(output: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output: Path) -> list[float]:
    """The loss of every step."""
    return [line["loss"] for line in metrics(output) if "loss" in line]


def validation_loss(output: Path) -> float:
    """The last one."""
    return float([line["validation_loss"] for line in metrics(output) if "validation_loss" in line][-1])
