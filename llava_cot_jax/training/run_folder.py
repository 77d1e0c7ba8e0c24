"""Folder of a run: its configuration, the files of its model, and the description stored in each checkpoint."""

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
from llava_cot_jax.processing.probe import DEFAULT_JUDGE_PROMPTS, ProbePrompt
from llava_cot_jax.training.initial_model import InitialModel
from llava_cot_jax.training.layout import CONFIGURATION, MODEL_FILES
from llava_cot_jax.training.settings import TrainSettings

CHANGEABLE_SETTINGS = {
    "output",
    "data",  # its batches have a fingerprint of their own
    "validation_data",
    "verifier.judge_prompts",  # the fingerprint of the data's batches has their content
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
"""Settings that may change when a run is resumed, since they do not affect the result, apart from rounding."""

LATER_SETTINGS = {"lora.tokens": "all", "verifier.weight": 1.0, "verifier.targets": "soft"}
"""Settings that descriptions of earlier versions lack, each with the value by which those versions trained."""

PACKAGES = ("llava_cot_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
"""Packages whose versions are stored in each checkpoint."""


def run_description(settings: TrainSettings, data: str) -> dict[str, Any]:
    """Return the description of a run that each checkpoint stores: its settings, data, and versions of packages.

    Where an adapter for the verifier alone is trained, there is also the digest of the question to the verifier.

    Args:
        settings: Settings of the run.
        data: Fingerprint of the batches, ``Loader.fingerprint``. The index of the next batch is the step.
    """
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    description = {"settings": asdict(settings), "data": data, "versions": versions}
    if settings.lora.tokens == "probe":
        prompts = settings.verifier.judge_prompts or DEFAULT_JUDGE_PROMPTS
        description["probe"] = ProbePrompt.load(prompts).digest
    return description


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the differences of two descriptions that affect the result, as "optimizer.b2 was 0.98, now 0.9"."""
    old, new = ({**flat_settings(found["settings"]), "the data's batches": found["data"]} for found in (before, now))
    old = LATER_SETTINGS | old
    several_sets = {name for name in old.keys() | new.keys() if name.startswith("data.")}
    names = sorted((old.keys() | new.keys()) - CHANGEABLE_SETTINGS - several_sets)
    return [
        f"{name} was {old.get(name, 'not known')}, now {new.get(name, 'not known')}"
        for name in names
        if old.get(name) != new.get(name)
    ]


def changed_versions(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the packages whose versions differ in two descriptions, as "jax was 0.10.2, now 0.11.2"."""
    old, new = before["versions"], now["versions"]
    return [f"{name} was {old.get(name)}, now {new[name]}" for name in new if old.get(name) != new[name]]


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted names, with tuples as lists."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat_settings(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = list(value) if isinstance(value, tuple) else value
    return found


def make_run_folder(folder: Path) -> None:
    """Make the folder of a run, in the first process.

    Raises:
        UserError: It cannot be made.
    """
    if jax.process_index() == 0:
        with writing_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)


def write_run_folder(folder: Path, settings: TrainSettings, initial_model: InitialModel) -> None:
    """Write the configuration of a run and the files of its model other than weights, in the first process.

    Raises:
        UserError: They cannot be written.
    """
    if jax.process_index() == 0:
        with writing_errors(folder):
            text = yaml.safe_dump(asdict(settings), sort_keys=False, allow_unicode=True)
            write_text(folder / CONFIGURATION, text)
            initial_model.write_auxiliary_files(folder / MODEL_FILES)
