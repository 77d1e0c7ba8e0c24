"""Questions whose right answers are known: those of the shapes world, and a user's own in a JSONL or TSV file."""

import ast
import base64
import csv
import hashlib
import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from llava_cot_jax.checks import check_choice, check_int, check_text, shown
from llava_cot_jax.errors import UserError
from llava_cot_jax.evaluation.benchmarks.published import PUBLISHED_BENCHMARKS
from llava_cot_jax.evaluation.matching import MATCHES, AnswerValue, MatchFunction, RightAnswer, form_of
from llava_cot_jax.files import short_digest
from llava_cot_jax.paths import as_path, reading_errors
from llava_cot_jax.question_files import QuestionRow, json_lines, question_row, unique_rows
from llava_cot_jax.question_job import QuestionSet

RIGHT_ANSWER_KEYS = ("answer", "options", "match", "category")
"""Keys that a row of a JSONL file has beside those of a question."""

SELECT_AN_OPTION = "Please select the correct answer from the options above. \n"
"""Sentence of VLMEvalKit that ends a question with options."""

LONGEST_REFERENCE = 64
"""Length, in characters, up to which the cell of an image is the index of another row."""

_TSV_COLUMNS = ("index", "question", "answer")
"""Columns that a TSV file must have."""

_SEEDS = 2**32
"""Number of seeds."""


@dataclass(frozen=True)
class KnownAnswer:
    """The right answer to a question, and the kind of the question.

    Attributes:
        right: The right answer.
        category: Kind of the question; None where there are no kinds.
    """

    right: RightAnswer
    category: str | None = None


@dataclass(frozen=True)
class EvaluationSet(QuestionSet):
    """Questions whose right answers are known.

    Attributes:
        name: Name of the benchmark, or of the user's file.
        known: What is known of each question; None where only another program knows its right answer.
        sha256: SHA-256 of the file, or of the questions, answers and pictures that were made.
    """

    name: str
    known: Sequence[KnownAnswer | None]
    sha256: str


@dataclass(frozen=True)
class Matching:
    """How answers are compared with right ones where the row of a question does not say it.

    Attributes:
        match: Name of the way to compare, or a function of the user's own; None takes that of the right answer's form.
        tolerance: Largest difference of a right number, as a share of the right answer.
    """

    match: str | MatchFunction | None = None
    tolerance: float = 0.0

    def right_answer(
        self, answers: Sequence[AnswerValue], options: Mapping[str, str] | None = None, match: str | None = None
    ) -> RightAnswer:
        """Return the right answer of a question.

        Args:
            answers: Right answers, any of which will do.
            options: Texts of the options by their letters.
            match: Way to compare that the row says.

        Raises:
            UserError: The answer cannot be compared so.
        """
        how = match or self.match or form_of(answers, options)
        return RightAnswer(tuple(answers), how, dict(options or {}), self.tolerance)


def open_benchmark(name: str, limit: int | None, matching: Matching, seed: int) -> EvaluationSet:
    """Return the questions of a benchmark or of a user's own file.

    A question without a seed of its own gets one that is made of ``seed`` and its id, so that hardly any two
    questions share their draws.

    Args:
        name: Name of a benchmark in ``BENCHMARKS``, or path of a file that ends in .jsonl or .tsv.
        limit: Number of questions to take from the beginning; None takes all.
        matching: How answers are compared where a row does not say it.
        seed: Seed of the draws.

    Raises:
        UserError: There is no such benchmark or file, or a row cannot be used.
    """
    if limit is not None:
        check_int("limit", limit)
    found = BENCHMARKS[name](limit, matching) if name in BENCHMARKS else own_questions(name, limit, matching)
    return replace(found, rows=with_seeds(found.rows, seed))


def own_questions(name: str, limit: int | None, matching: Matching) -> EvaluationSet:
    """Read the first questions of a user's own file.

    Raises:
        UserError: There is no such file, or a row cannot be used.
    """
    path = as_path(name)
    if (reader := _READERS.get(path.suffix)) is None:
        raise UserError(
            f"there is no benchmark {name}: the benchmarks are {', '.join([*BENCHMARKS, *PUBLISHED_BENCHMARKS])}, and "
            f"a file of one's own ends in {' or '.join(_READERS)}"
        )
    with reading_errors(path):
        content = path.read_bytes()
    read = list(reader(path, content, matching))
    rows = unique_rows(path, ((place, row) for place, row, _ in read))
    known = [each for _, _, each in read]
    digest = hashlib.sha256(content).hexdigest()
    return EvaluationSet(rows[:limit], short_digest(content), path.name, known[:limit], digest)


def with_seeds(rows: Sequence[QuestionRow], seed: int) -> list[QuestionRow]:
    """Return questions of which each has a seed: its own, or one that is made of ``seed`` and its id."""
    return [_seeded(row, seed) for row in rows]


def _seeded(row: QuestionRow, seed: int) -> QuestionRow:
    """Return the row with a seed."""
    if row.seed is not None:
        return row
    own = int.from_bytes(hashlib.sha256(repr(row.id).encode()).digest()[:4])
    return replace(row, seed=(seed + own) % _SEEDS)


def shapes_questions(limit: int | None, matching: Matching) -> EvaluationSet:
    """Make the first questions of the shapes world's test split, each about a picture of its own."""
    from PIL import Image

    from llava_cot_jax.data.shapes.rows import ShapesRows

    rows, known, digest = [], [], hashlib.sha256()
    made = ShapesRows("test", size=limit)
    for index in range(len(made)):
        row, answer = made[index], made.answer(index)
        (picture,) = row.images
        assert isinstance(picture, Image.Image)
        file = io.BytesIO()
        picture.save(file, "PNG")
        name, question = row.id.replace("/", "-"), row.turns[0].question
        rows.append(QuestionRow(name, question, images=[f"{name}.png"], sources=[file.getvalue()]))
        known.append(KnownAnswer(matching.right_answer([answer]), made.kind(index)))
        digest.update(repr((question, answer)).encode() + picture.tobytes())
    return EvaluationSet(rows, digest.hexdigest()[:16], "shapes", known, digest.hexdigest())


BENCHMARKS: dict[str, Callable[[int | None, Matching], EvaluationSet]] = {"shapes": shapes_questions}
"""Benchmarks by their names: functions of the number of questions and of how answers are compared."""

_Rows = Iterator[tuple[str, QuestionRow, KnownAnswer]]
"""Questions with what is known of them, each after the words that say where it is."""


def _read_jsonl(path: Path, content: bytes, matching: Matching) -> _Rows:
    """Yield the questions of JSON lines."""
    for place, row in json_lines(path, content):
        question = question_row(row, place, path.parent, RIGHT_ANSWER_KEYS)
        answer, options, match = row.get("answer"), row.get("options"), row.get("match")
        answers = answer if isinstance(answer, list) else [] if answer is None else [answer]
        yield place, question, _known(place, matching, answers, _lettered(place, options), match, row.get("category"))


def _known(
    place: str, matching: Matching, answers: list[Any], options: Mapping[str, str], match: Any, category: Any
) -> KnownAnswer:
    """Return what a row says of the right answer.

    Raises:
        UserError: A value is not of its kind.
    """
    if not answers:
        raise UserError(f"{place} has no right answer: give answer, a text, a number, or a list of these")
    try:
        for answer in answers:
            if isinstance(answer, bool) or not isinstance(answer, str | int | float):
                raise UserError(f"answer is {shown(answer)}; it must be a text or a number, or a list of these")
        if match is not None:
            check_choice("match", match, MATCHES)
        if category is not None:
            check_text("category", category)
        return KnownAnswer(matching.right_answer(answers, options, match), category)
    except UserError as fault:
        raise UserError(f"{place}: {fault}") from None


def _lettered(place: str, options: Any) -> dict[str, str]:
    """Return the options of a row by their letters: as they are named, or in the order of a list."""
    if options is None:
        return {}
    if isinstance(options, list) and 0 < len(options) <= len(ascii_uppercase):
        options = dict(zip(ascii_uppercase, options, strict=False))
    if not isinstance(options, dict) or not options:
        raise UserError(f"{place}: options is {shown(options)}; it must be a list of texts, or texts by their letters")
    return options


def _read_tsv(path: Path, content: bytes, matching: Matching) -> _Rows:
    """Yield the questions of a table in the form of VLMEvalKit's own files.

    An empty cell is missing; one that says NA or None is a text.
    """
    csv.field_size_limit(sys.maxsize)  # the cell of an image may be long
    lines = io.TextIOWrapper(io.BytesIO(content), "utf-8-sig", newline="")
    reader = csv.DictReader(lines, delimiter="\t", strict=True)
    try:
        cells = [(reader.line_num, row) for row in reader]
    except UnicodeDecodeError as fault:
        raise UserError(f"{path} is no text in UTF-8: {fault}") from None
    except csv.Error as fault:
        raise UserError(f"{path}, line {reader.line_num}: {fault}; a cell with quotes has all of them twice") from None
    if missing := [column for column in _TSV_COLUMNS if column not in (reader.fieldnames or ())]:
        raise UserError(f"{path} has no column {missing[0]}; it needs {', '.join(_TSV_COLUMNS)}")
    if not cells:
        raise UserError(f"{path} has no rows below its columns")
    for line, row in cells:
        if None in row:
            raise UserError(f"{path}, line {line} has more cells than there are columns: put a tab in quotes")
    cells = [(line, {name: cell for name, cell in row.items() if cell}) for line, row in cells]
    images = {row["index"]: row["image"] for _, row in cells if "index" in row and "image" in row}
    for line, row in cells:
        place = f"{path}, line {line}"
        options = {letter: row[letter] for letter in ascii_uppercase if letter in row}
        names, sources = _images(row, images, place, path.parent)
        index = row.get("index")
        asked = {"id": int(index) if index and index.isdecimal() else index, "question": row.get("question")}
        question = question_row(asked, place, path.parent)
        question = replace(question, question=with_options(row, options), images=names, sources=sources)
        answers = [row["answer"]] if "answer" in row else []
        yield place, question, _known(place, matching, answers, options, row.get("match"), row.get("category"))


def with_options(row: Mapping[str, str], options: Mapping[str, str]) -> str:
    """Return the text of a question, which is asked as a question of multiple choice where it has options."""
    return lettered_question(row, options) if options else row["question"]


def lettered_question(row: Mapping[str, str], options: Mapping[str, str]) -> str:
    """Return the text of a question of multiple choice as VLMEvalKit asks it: hint, question, and lettered options."""
    hint = f"Hint: {row['hint']}\n" if "hint" in row else ""
    listed = "".join(f"{letter}. {option}\n" for letter, option in options.items())
    choice = f"Options:\n{listed}{SELECT_AN_OPTION}" if options else ""
    return f"{hint}Question: {row['question']}\n{choice}"


def _images(
    row: Mapping[str, str], images: Mapping[str, str], place: str, folder: Path
) -> tuple[list[str], list[str | bytes]]:
    """Return the names and the sources of the images of a row of a table.

    An image is named by its digest, so that questions about the same one are known to share it.
    """
    cell = row.get("image")
    if cell is None:
        paths = listed_texts(row["image_path"], place) if "image_path" in row else []
        return paths, [str(folder / path) for path in paths]
    if len(cell) <= LONGEST_REFERENCE:
        if cell not in images:
            raise UserError(f"{place} has the image of row {shown(cell)}, which there is not")
        cell = images[cell]
    files: list[bytes] = []
    for encoded in listed_texts(cell, place):
        try:
            files.append(base64.b64decode(encoded, validate=True))
        except ValueError as fault:
            raise UserError(f"{place}: its image is not in base64: {fault}") from None
    return [f"image-{short_digest(file)}" for file in files], [*files]


def listed_texts(cell: str, place: str) -> list[str]:
    """Return the texts of a cell that may be a list of them, as Python writes one.

    Raises:
        UserError: It begins like a list, and is none of texts.
    """
    if not cell.startswith("["):
        return [cell]
    try:
        found = ast.literal_eval(cell)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise UserError(f"{place}: its images are no list of texts: {shown(cell)}")
    return found


_READERS = {".jsonl": _read_jsonl, ".tsv": _read_tsv}
"""Functions that read a user's own files, by the ends of their names."""
