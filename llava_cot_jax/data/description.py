"""Description of a prepared data set, in a file of its folder."""

from pathlib import Path
from typing import Any

from llava_cot_jax.errors import UserError
from llava_cot_jax.files import read_json
from llava_cot_jax.paths import reading_errors

DESCRIPTION = "prepared.json"
"""Name of the file that describes a prepared data set: its content, and the settings that it was made with."""

CONTENT = {"fingerprint", "settings", "splits", "sources", "unnamed_images"}


def turns_name(split: str) -> str:
    """Return the name of the file of a split's conversations, with one line of JSON per record, in their order."""
    return f"{split}.turns.jsonl"


def read_description(folder: Path) -> dict[str, Any]:
    """Read the description of a prepared data set.

    Raises:
        UserError: The description is missing or damaged.
    """
    path = folder / DESCRIPTION
    with reading_errors(path):
        if not path.exists():
            raise UserError(
                f"{folder} is no prepared data set (there is no {DESCRIPTION}): make one with llava-cot prepare"
            )
    description = read_json(path)
    if not description.keys() >= CONTENT:
        raise UserError(f"{path} does not describe a prepared data set: prepare the data anew")
    return description
