"""Where things lie in the folder of a run."""

from pathlib import Path

CONFIGURATION = "config.yaml"
"""All settings of the run; ``train --config`` takes it."""

CHECKPOINTS = "checkpoints"
"""A folder for each step."""

MODEL = "model"
"""What lies beside the weights of an exported model."""


def is_run(folder: Path) -> bool:
    """Whether this is the folder of a run."""
    return (folder / CHECKPOINTS).is_dir()
