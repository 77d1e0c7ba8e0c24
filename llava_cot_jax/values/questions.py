"""Questions whose candidates are given values: of the shapes world, of prepared data, and a user's own."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, overload

from llava_cot_jax.checks import check_choice, check_int
from llava_cot_jax.data.sources import SHAPES_DATA, VALUES_FILE, open_rows
from llava_cot_jax.errors import UserError
from llava_cot_jax.evaluation.matching import (
    DEFAULT_LETTERS,
    AnswerValue,
    MatchFunction,
    RightAnswer,
    find_number,
    find_option,
    find_yes_no,
)
from llava_cot_jax.evaluation.question_sets import EvaluationSet, KnownAnswer, Matching, own_questions, with_seeds
from llava_cot_jax.files import short_digest
from llava_cot_jax.paths import as_path, reading_errors
from llava_cot_jax.question_files import QuestionRow
from llava_cot_jax.stages import find_stages

if TYPE_CHECKING:
    from llava_cot_jax.data.rows import Rows

IMAGES = "images"
"""Folder beside the values that takes the images of the questions."""

ROW_SPLITS = ("train", "validation", "test")
"""Names of the splits of a data set."""

_OWN_FILES = (".jsonl", ".tsv")
"""Ends of the names of a user's own files."""

_LOG = logging.getLogger("llava_cot_jax.rollout")


@dataclass(frozen=True)
class RowImages(Sequence[bytes]):
    """Images of the first question of a row of a data set as the bytes of files, which are read when they are needed.

    Attributes:
        rows: Data set.
        row: Index of the row.
        length: Number of images of the question, the first ones of the row.
        split: Split that the row is of.
    """

    rows: Rows
    row: int
    length: int
    split: str

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> bytes: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[bytes]: ...

    def __getitem__(self, index: int | slice) -> bytes | Sequence[bytes]:
        """Read images.

        Raises:
            IndexError: There is no such image.
            UserError: The row is damaged.
        """
        numbers = range(self.length)[index]
        images = self.rows[self.row].images
        return _file_of(images[numbers]) if isinstance(numbers, int) else [_file_of(images[n]) for n in numbers]


def _file_of(image: object) -> bytes:
    """Return the bytes of an image of a data set; one that was drawn becomes a PNG file."""
    from PIL import Image

    if isinstance(image, Image.Image):
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()
    assert isinstance(image, bytes)
    return image


def open_questions(
    data: str, split: str | None, first: int, limit: int | None, matching: Matching, seed: int
) -> EvaluationSet:
    """Return questions whose right answers are known. Their images are named as beside the values.

    A question without a seed of its own gets one that is made of ``seed`` and its id.

    Args:
        data: "shapes", a prepared data set, or a JSONL or TSV file as ``evaluate`` takes it.
        split: Split of the data set; None is ``train``.
        first: Index of the first row.
        limit: Number of rows from there; None takes all.
        matching: How answers are compared where a row does not say it.
        seed: Seed of the draws.

    Raises:
        UserError: There is no such data set or file, a row of a file cannot be used, or there is no question.
    """
    check_int("first", first, least=0)
    if limit is not None:
        check_int("limit", limit)
    if split is not None:
        check_choice("split", split, ROW_SPLITS)
    own = PurePosixPath(data).suffix in _OWN_FILES and not as_path(data).is_dir()
    if own and split is not None:
        raise UserError(f"--split has no meaning with --data {data}, which is a file: leave it out")
    rows = slice(first, None if limit is None else first + limit)
    found = _own_rows(data, rows, matching) if own else _data_rows(data, split or "train", rows, matching)
    if not found.rows:
        raise UserError(f"{data} has no row {first}: lower --first")
    return replace(found, rows=with_seeds(found.rows, seed))


def _own_rows(name: str, rows: slice, matching: Matching) -> EvaluationSet:
    """Return some questions of a user's own file."""
    found = own_questions(name, None, matching)
    taken = [replace(row, images=list(map(_stored_name, row.images))) for row in found.rows[rows]]
    return replace(found, rows=taken, known=found.known[rows])


def _stored_name(name: str) -> str:
    """Return the name by which an image of a user's own is stored: its own, where that is one below a folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or ":" in name or len(name) > 200:
        name = short_digest(name.encode()) + ("" if len(name) > 200 else path.suffix)
    return f"{IMAGES}/{name}"


def _data_rows(data: str, split: str, rows: slice, matching: Matching) -> EvaluationSet:
    """Return the first questions of some rows of a data set. Rows without a known answer are counted and left out."""
    with reading_errors(folder := as_path(data)):
        if data != SHAPES_DATA and (folder / VALUES_FILE).exists():
            raise UserError(f"{data} has values, whose answers are the model's own: give the data that they are of")
    source = open_rows(data, split)
    right_answer = _drawn_answer(source, matching) if data == SHAPES_DATA else _stated_answer(source, matching)
    asked, known, numbers = list[QuestionRow](), list[KnownAnswer](), range(len(source))[rows]
    for index in numbers:
        if (right := right_answer(index)) is None:
            continue
        turn, name = source.turns(index)[0], f"{split}-{index}"
        ending = ".png" if data == SHAPES_DATA else ""
        names = [name] if turn.images == 1 else [f"{name}-{i + 1}" for i in range(turn.images)]
        images = [f"{IMAGES}/{each}{ending}" for each in names]
        question = "\n\n".join(text for text in (turn.system.strip(), turn.question.strip()) if text)
        asked.append(QuestionRow(name, question, images=images, sources=RowImages(source, index, turn.images, split)))
        known.append(KnownAnswer(right))
    if numbers and not asked:
        raise UserError(
            f"none of {len(numbers)} rows of {data} has a first answer with a conclusion that can be compared"
            f"{f' as --match {matching.match}' if matching.match else ''}: name another --match, or give other data"
        )
    if missing := len(numbers) - len(asked):
        _LOG.warning(
            f"{missing} of {len(numbers)} rows of {data} are left out: the first answer has no conclusion that can be "
            f"compared{f' as --match {matching.match}' if matching.match else ''}"
        )
    # The fingerprint has the name of the split, and is the same wherever the folder lies.
    return EvaluationSet(asked, source.fingerprint, source.fingerprint, known, source.fingerprint)


def _drawn_answer(rows: Rows, matching: Matching) -> Callable[[int], RightAnswer]:
    """Return a function of the index of a row of the shapes world that returns its right answer."""
    from llava_cot_jax.data.shapes.rows import ShapesRows

    assert isinstance(rows, ShapesRows)
    return lambda index: matching.right_answer([rows.answer(index)])


def _stated_answer(rows: Rows, matching: Matching) -> Callable[[int], RightAnswer | None]:
    """Return a function of the index of a prepared row that returns what its conclusion says, or None."""

    def read(index: int) -> RightAnswer | None:
        conclusion = find_stages(rows.turns(index)[0].answer).get("CONCLUSION", "")
        stated = _stated(conclusion, matching.match)
        return None if stated is None else matching.right_answer([stated])

    return read


def _stated(conclusion: str, match: str | MatchFunction | None) -> AnswerValue | None:
    """Return what a conclusion says in the way of ``match``: a letter, yes or no, a number, or its text."""
    if match == "option":
        return find_option(conclusion, DEFAULT_LETTERS)
    if match == "yes_no":
        return find_yes_no(conclusion)
    if match == "number":
        number = find_number(conclusion)
        return None if number is None else str(number)
    return conclusion.strip() or None
