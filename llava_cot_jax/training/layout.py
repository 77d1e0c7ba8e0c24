"""Layout of the folder of a run, what it needs from elsewhere, and the present paths of a run that was moved."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_cot_jax.paths import as_path, is_remote, reading_errors
from llava_cot_jax.training.settings import TrainSettings, check_setting_names, map_names

CONFIGURATION = "config.yaml"
"""Name of the file with all settings of the run, which ``train --config`` takes."""

CHECKPOINTS = "checkpoints"
"""Name of the folder with a folder for each checkpoint, named by its step."""

MOVABLE = ("data", "validation_data", "checkpoint")
"""Settings that name what a run needs from elsewhere."""

MODEL_FILES = "model"
"""Name of the folder with the files of the model other than its weights."""


def is_run(folder: Path) -> bool:
    """Whether ``folder`` is the folder of a run."""
    with reading_errors(folder):
        return (folder / CHECKPOINTS).is_dir()


def kept_model_files(settings: TrainSettings) -> Path | None:
    """Return the folder with the model's files of a run that can go on without the checkpoint that it started from.

    That is a run with a checkpoint of its own that holds all of the model's weights. None stands for any other.
    """
    if not settings.random_init and (settings.lora.rank or settings.frozen_params):
        return None
    folder = as_path(settings.output)
    with reading_errors(folder):
        checkpoints, files = folder / CHECKPOINTS, folder / MODEL_FILES
        begun = checkpoints.is_dir() and any(path.name.isdigit() for path in checkpoints.iterdir())
        return files if begun and (files / "config.json").exists() else None


def relocated(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the settings that a run stored, with the present paths of the data and the checkpoint it started from.

    If a stored path no longer exists, it is looked for at the same place relative to the run's folder, so that a run
    that was moved together with its data or its checkpoint finds them.

    Args:
        settings: All settings of the run.
        folder: Present folder of the run, absolute.

    Raises:
        UserError: The settings have former names.
    """
    check_setting_names(settings, folder)
    found, before = dict(settings), Path(settings["output"])

    def present(name: str) -> str:
        path = Path(name)
        if not path.is_absolute() or not before.is_absolute() or is_remote(folder) or _exists(path):
            return name  # a name, a path in a bucket, or a path that is still right
        shared = Path(os.path.commonpath((path, before)))
        above = len(before.relative_to(shared).parts)
        # Paths that have only the root in common did not move together; and nothing is above the root.
        if shared == Path(shared.anchor) or above >= len(folder.parts):
            return name
        moved = folder.parents[above - 1] / path.relative_to(shared) if above else folder / path.relative_to(shared)
        return str(moved if _exists(moved) else path)

    return found | {name: map_names(present, found[name]) for name in MOVABLE if found.get(name) is not None}


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:  # a colleague's folder, for example
        return False
