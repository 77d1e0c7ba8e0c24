"""Pairs for preference training, written from the values of candidates, in the forms that other trainers read.

LLaMA-Factory reads rows of ShareGPT's form with ``ranking: true`` (its data/README.md): ``conversations``, ``chosen``
and ``rejected``, each message with ``from`` and ``value``, and ``images``, one for each ``<image>``. TRL reads
conversational rows with an explicit prompt (its dataset_formats): ``prompt``, ``chosen`` and ``rejected``, lists of
messages with ``role`` and ``content``, whose parts have a ``type``, and ``images``.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from llava_cot_jax.checks import check_number
from llava_cot_jax.data.values import asked_text
from llava_cot_jax.errors import UserError
from llava_cot_jax.files import write_lines
from llava_cot_jax.paths import is_remote, reading_errors, writing_errors
from llava_cot_jax.processing.messages import MARKER, question_text
from llava_cot_jax.question_files import json_lines
from llava_cot_jax.stage_format import StageFormat
from llava_cot_jax.stages import join_stages
from llava_cot_jax.values.job import VALUES

MIN_DIFFERENCE = 0.35
"""Least difference of two values that makes a pair: about twice its standard error with 16 continuations of each."""

PAIRS_OF = ("stages", "answers")
"""Texts that pairs are made of: candidates of a stage, or whole answers."""

_ROUNDING = 1e-9
"""Largest error of a difference of two values, such as 0.6 - 0.4, by their rounding."""

_LOG = logging.getLogger("llava_cot_jax.rollout")


def read_rows_of_values(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a folder of values, but for those of questions without an answer, each after its place.

    Raises:
        UserError: There is no such folder, or a line is no row of values.
    """
    path = folder / VALUES
    with reading_errors(path), path.open("rb") as file:
        for place, row in json_lines(path, file):
            if "error" in row:
                continue
            if missing := {"question", "images", "stages", "answers", "format"} - row.keys():
                raise UserError(f"{place} has no {min(missing)}: give a folder that rollout has written")
            yield place, row


def write_pairs(folder: Path, path: Path, form: str, min_difference: float, of: str = "stages") -> int:
    """Write the pairs of a folder of values, a JSON object a line. Return their number.

    Paths of images are relative to the folder of the file.

    Args:
        folder: Folder of values.
        path: File to write.
        form: Name of a form in ``PAIR_FORMS``.
        min_difference: Least difference of the values of a pair of candidates, above 0.
        of: "stages" for pairs of two candidates of a stage, with the answer before them; "answers" for pairs of a right
            and a wrong whole answer, of which each is in one pair.

    Raises:
        UserError: The values cannot be read, or the file cannot be written, or is one of the folder's own.
    """
    check_number("min_difference", min_difference)
    if not 0 < min_difference <= 1:
        raise UserError(f"min_difference is {min_difference}; it must be above 0 and at most 1")
    if is_remote(path) != is_remote(folder):
        raise UserError(f"{path} and {folder} are not on one disk: write the pairs beside the values, and copy both")
    target = path if is_remote(path) else path.resolve()  # a link is kept, and its file is written
    if target.parent == (folder if is_remote(folder) else folder.resolve()) and target.name.startswith(VALUES):
        raise UserError(f"{path} has the values themselves: give --pairs another name")
    count = left_out = 0
    formats: dict[str, StageFormat] = {}

    def lines() -> Iterator[bytes]:
        nonlocal count, left_out
        relative = Path(os.path.relpath(folder, path.parent))
        for place, row in read_rows_of_values(folder):
            try:
                question = asked_text(question_text(row["question"], len(row["images"])), row["format"], formats)
                images = [str(relative / image) for image in row["images"]]
                if of == "stages" and not row["stages"]:
                    raise UserError(f"{place} has whole answers alone, and no stages: give --of answers")
                pairs = list(_answer_pairs(row) if of == "answers" else _stage_pairs(row, min_difference))
            except (TypeError, LookupError, AttributeError) as fault:
                raise UserError(
                    f"{place} is damaged ({type(fault).__name__}: {fault}): let rollout finish, or remove the line"
                ) from None
            for chosen, rejected in pairs:
                if form == "llama_factory" and any(MARKER in text for text in (question, chosen, rejected)):
                    left_out += 1
                    continue
                count += 1
                made = PAIR_FORMS[form](question, images, chosen, rejected)
                yield json.dumps(made, ensure_ascii=False).encode(errors="replace") + b"\n"

    with writing_errors(path):
        write_lines(path, lines())
    if left_out:
        _LOG.warning(
            f"{left_out} pairs are left out, as {MARKER} is a word of theirs: LLaMA-Factory takes it for an image"
        )
    return count


def _answer_pairs(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the first right whole answer of a row with the first wrong one, the second with the second, and so on.

    An answer that is cut is in none, as it has no end.
    """
    right = [answer["text"] for answer in row["answers"] if answer["right"]]
    wrong = [answer["text"] for answer in row["answers"] if not answer["right"] and not answer["cut"]]
    yield from zip(right, wrong, strict=False)


def _stage_pairs(row: Mapping[str, Any], min_difference: float) -> Iterator[tuple[str, str]]:
    """Yield the pairs of a row: two answers up to the end of the same stage, the better one first, each pair once.

    A candidate without a value is in none.
    """
    for stage in row["stages"]:
        values: dict[str, list[float]] = {}  # equal candidates share the mean of their values
        for candidate in stage["candidates"]:
            if candidate["value"] is not None:
                values.setdefault(candidate["text"], []).append(candidate["value"])
        means = {text: sum(each) / len(each) for text, each in values.items()}
        before = [stage["before"]] if stage["before"] else []
        for pair in combinations(means, 2):
            better, worse = sorted(pair, key=means.__getitem__, reverse=True)
            if means[better] - means[worse] >= min_difference - _ROUNDING:
                yield join_stages([*before, better]), join_stages([*before, worse])


def _llama_factory(question: str, images: list[str], chosen: str, rejected: str) -> dict[str, Any]:
    markers = "".join(f"{MARKER}\n" for _ in images)
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
