"""What a prepared data set says of itself."""

import json
from pathlib import Path
from typing import Any

from llava_cot_jax.errors import UserError
from llava_cot_jax.paths import access

DESCRIPTION = "prepared.json"
"""The file that says what a prepared directory holds, and of what it was made."""

CONTENT = {"fingerprint", "settings", "splits", "sources", "unnamed_images"}


def turns_name(split: str) -> str:
    """The file of a split's conversations: a line of JSON for each record, in their order."""
    return f"{split}.turns.jsonl"


def read_description(directory: Path) -> dict[str, Any]:
    """What DESCRIPTION says.

    Raises:
        UserError: there is none, or none that can be read.
    """
    path = directory / DESCRIPTION
    with access(path):
        if not path.exists():
            raise UserError(
                f"{directory} is no prepared data set (there is no {DESCRIPTION}): make one with llava_cot_jax.prepare"
            )
        text = path.read_bytes()
    try:
        description: dict[str, Any] = json.loads(text)
    except ValueError as fault:
        raise UserError(f"{path} cannot be read, it may be damaged: {fault}") from fault
    if not isinstance(description, dict) or not description.keys() >= CONTENT:
        raise UserError(f"{path} does not describe a prepared data set: prepare the data anew")
    return description
