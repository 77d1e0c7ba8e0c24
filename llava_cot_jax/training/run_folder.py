"""The folder of a run: its configuration, the files of its model, checkpoints and metrics."""

import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import yaml

from llava_cot_jax.files import write_text
from llava_cot_jax.paths import writing_errors
from llava_cot_jax.training.initial_model import Origin
from llava_cot_jax.training.layout import CONFIGURATION, MODEL
from llava_cot_jax.training.settings import TrainSettings

RUNNING = {
    "output",
    "data",  # its batches have a fingerprint of their own
    "checkpoints.every",
    "checkpoints.max_to_keep",
    "checkpoints.keep_period",
    "checkpoints.best_n",
    "eval_every",
    "eval_examples",
    "log_every",
    "eval_generations",
    "profile",
    "wandb",
    "max_nonfinite_steps",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "grad_accum_steps",
    "remat",
    "loader.num_workers",
    "loader.num_threads",
}
"""Settings of how a run runs, not of what comes out, but for rounding: they may change while it goes on."""

PACKAGES = ("llava_cot_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def describe(settings: TrainSettings, data: str) -> dict[str, Any]:
    """What is kept of a run in each checkpoint beside its arrays.

    Args:
        settings: of the run.
        data: the fingerprint of its batches; the index of the next one is the step.
    """
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    return {"settings": asdict(settings), "data": data, "versions": versions}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What comes out otherwise in two descriptions of a run: "optimizer.learning_rate was 0.003, now 0.001"."""
    old, new = ({**_flat(found["settings"]), "the data's batches": found["data"]} for found in (before, now))
    names = sorted((old.keys() | new.keys()) - RUNNING)
    return [
        f"{name} was {old.get(name, 'not known')}, now {new.get(name, 'not known')}"
        for name in names
        if old.get(name) != new.get(name)
    ]


def other_versions(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The libraries whose versions differ in two descriptions of a run, likewise."""
    old, new = before["versions"], now["versions"]
    return [f"{name} was {old.get(name)}, now {new[name]}" for name in new if old.get(name) != new[name]]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """By dotted names; lists and tuples alike."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = list(value) if isinstance(value, tuple) else value
    return found


def make_run_folder(folder: Path) -> None:
    """Make the folder. Only the first process does.

    Raises:
        UserError: it cannot be made.
    """
    if jax.process_index() == 0:
        with writing_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)


def write_run_folder(folder: Path, settings: TrainSettings, origin: Origin) -> None:
    """Write what is known before the first step. Only the first process writes.

    Raises:
        UserError: it cannot be written.
    """
    if jax.process_index() == 0:
        with writing_errors(folder):
            text = yaml.safe_dump(asdict(settings), sort_keys=False, allow_unicode=True)
            write_text(folder / CONFIGURATION, text)
            origin.write_auxiliary_files(folder / MODEL)
