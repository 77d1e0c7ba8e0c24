"""Where things lie in the folder of a run, and where they are after it was moved."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_cot_jax.paths import is_remote, reading_errors
from llava_cot_jax.training.settings import check_setting_names

CONFIGURATION = "config.yaml"
"""All settings of the run; ``train --config`` takes it."""

CHECKPOINTS = "checkpoints"
"""A folder for each step."""

MODEL = "model"
"""What lies beside the weights of an exported model."""


def is_run(folder: Path) -> bool:
    """Whether this is the folder of a run."""
    with reading_errors(folder):
        return (folder / CHECKPOINTS).is_dir()


def relocated(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The settings that a run stored, with its paths as they are now that ``folder`` is the folder of the run.

    A path that is no longer there is looked for where it lay as seen from the run's folder, so that a run that was
    moved together with its data or with the checkpoint it started from finds them.

    Args:
        settings: all of a run's.
        folder: of the run, absolute.
    """
    check_setting_names(settings, folder)
    found, before = dict(settings), Path(settings["output"])
    for name in ("data", "checkpoint"):
        path = Path(settings[name])
        if not path.is_absolute() or not before.is_absolute() or is_remote(folder) or _is_there(path):
            continue  # a name, a path in a bucket, or one that is still right
        shared = Path(os.path.commonpath((path, before)))
        above = len(before.relative_to(shared).parts)
        # What has the root alone in common did not move together; nor is there anything above the root.
        if shared != Path(shared.anchor) and above < len(folder.parts):
            moved = folder.parents[above - 1] / path.relative_to(shared) if above else folder / path.relative_to(shared)
            found[name] = str(moved if _is_there(moved) else path)
    return found


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:  # that of a colleague, say
        return False
