"""The folder of a run: its configuration, the files of its model, checkpoints and metrics."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import yaml

from llava_cot_jax.errors import UserError
from llava_cot_jax.training.origin import Origin
from llava_cot_jax.training.settings import TrainSettings

CONFIGURATION = "config.yaml"
"""All settings of the run; ``train --config`` takes it."""

CHECKPOINTS = "checkpoints"
"""A folder for each step."""

MODEL = "model"
"""What lies beside the weights of an exported model."""


def run_identity(settings: TrainSettings, data: str) -> dict[str, Any]:
    """What must agree for a run to go on from its checkpoints, beside the shapes of what is trained.

    Args:
        settings: of the run.
        data: the fingerprint of its batches.
    """
    return {"data": data, "init_from": settings.init_from, "seed": settings.seed, "lora": asdict(settings.lora)}


def write_run_folder(folder: Path, settings: TrainSettings, origin: Origin) -> None:
    """Make the folder and write what is known before the first step. Only the first process writes.

    Raises:
        UserError: it cannot be written.
    """
    if jax.process_index() != 0:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        content = yaml.safe_dump(asdict(settings), sort_keys=False)
        (folder / CONFIGURATION).write_text(content)
        origin.write_companions(folder / MODEL)
    except OSError as fault:
        raise UserError(f"the run cannot be written to {folder}: {fault.strerror or fault}") from fault
