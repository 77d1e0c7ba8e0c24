"""Pairs for preference training, written from the values of candidates, in the forms that other trainers read.

LLaMA-Factory reads rows of ShareGPT's form with ``ranking: true`` (its data/README.md): ``conversations``, ``chosen``
and ``rejected``, each message with ``from`` and ``value``, and ``images``, one for each ``<image>``. TRL reads
conversational rows with an explicit prompt (its dataset_formats): ``prompt``, ``chosen`` and ``rejected``, lists of
messages with ``role`` and ``content``, whose parts have a ``type``, and ``images``.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from llava_cot_jax.checks import check_number
from llava_cot_jax.errors import UserError
from llava_cot_jax.files import write_bytes
from llava_cot_jax.paths import is_remote, reading_errors, writing_errors
from llava_cot_jax.question_files import json_lines
from llava_cot_jax.stages import join_stages
from llava_cot_jax.values.job import VALUES

MIN_DIFFERENCE = 0.35
"""Least difference of two values that makes a pair: about twice its standard error with 16 continuations of each."""

IMAGE_MARKER = "<image>"
"""Text that stands for an image in the question of a row for LLaMA-Factory."""


def read_values(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a folder of values, but for those of questions without an answer.

    Raises:
        UserError: There is no such folder, or a line is no row of values.
    """
    path = folder / VALUES
    with reading_errors(path):
        content = path.read_bytes()
    for place, row in json_lines(path, content):
        if "error" in row:
            continue
        if missing := {"question", "images", "stages"} - row.keys():
            raise UserError(f"{place} has no {min(missing)}: give a folder that rollout has written")
        yield row


def write_pairs(folder: Path, path: Path, form: str, min_difference: float) -> int:
    """Write the pairs of a folder of values, a JSON object a line. Return their number.

    Paths of images are relative to the folder of the file.

    Args:
        folder: Folder of values.
        path: File to write.
        form: Name of a form in ``PAIR_FORMS``.
        min_difference: Least difference of the values of a pair, above 0.

    Raises:
        UserError: The values cannot be read, or the file cannot be written.
    """
    check_number("min_difference", min_difference)
    if not 0 < min_difference <= 1:
        raise UserError(f"min_difference is {min_difference}; it must be above 0 and at most 1")
    if is_remote(path) != is_remote(folder):
        raise UserError(f"{path} and {folder} are not on one disk: write the pairs beside the values, and copy both")
    lines, relative = [], Path(os.path.relpath(folder, path.parent))
    for row in read_values(folder):
        images = [str(relative / image) for image in row["images"]]
        for chosen, rejected in _pairs_of(row, min_difference):
            made = PAIR_FORMS[form](row["question"], images, chosen, rejected)
            lines.append(json.dumps(made, ensure_ascii=False) + "\n")
    with writing_errors(path):
        write_bytes(path, "".join(lines).encode(errors="replace"))
    return len(lines)


def _pairs_of(row: Mapping[str, Any], min_difference: float) -> Iterator[tuple[str, str]]:
    """Yield the pairs of a row: two answers up to the end of the same stage, the better one first, each pair once."""
    for stage in row["stages"]:
        values: dict[str, list[float]] = {}  # equal candidates share the mean of their values
        for candidate in stage["candidates"]:
            values.setdefault(candidate["text"], []).append(candidate["value"])
        means = {text: sum(each) / len(each) for text, each in values.items()}
        before = [stage["before"]] if stage["before"] else []
        for pair in combinations(means, 2):
            better, worse = sorted(pair, key=means.__getitem__, reverse=True)
            if means[better] - means[worse] >= min_difference:
                yield join_stages([*before, better]), join_stages([*before, worse])


def _llama_factory(question: str, images: list[str], chosen: str, rejected: str) -> dict[str, Any]:
    markers = "".join(f"{IMAGE_MARKER}\n" for _ in images)
    return {
        "conversations": [{"from": "human", "value": f"{markers}{question}"}],
        "chosen": {"from": "gpt", "value": chosen},
        "rejected": {"from": "gpt", "value": rejected},
        "images": images,
    }


def _trl(question: str, images: list[str], chosen: str, rejected: str) -> dict[str, Any]:
    def said(text: str) -> list[dict[str, Any]]:
        return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]

    asked = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    return {
        "prompt": [{"role": "user", "content": asked}],
        "chosen": said(chosen),
        "rejected": said(rejected),
        "images": images,
    }


PAIR_FORMS: dict[str, Callable[[str, list[str], str, str], dict[str, Any]]] = {
    "llama_factory": _llama_factory,
    "trl": _trl,
}
"""Functions of a question, its images and two answers that make a row of a pair, by the names of the forms."""
