"""Questions of published benchmarks, read from their files and asked as VLMEvalKit reads and asks them."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

from llava_cot_jax.checks import check_choice, shown
from llava_cot_jax.errors import UserError
from llava_cot_jax.evaluation.benchmarks.kit_install import check_kit_packages
from llava_cot_jax.evaluation.benchmarks.published import (
    MM_VET_CAPABILITIES,
    OPTION_COLUMNS,
    PROMPTS,
    PUBLISHED_BENCHMARKS,
    PublishedBenchmark,
)
from llava_cot_jax.evaluation.question_sets import (
    LONGEST_REFERENCE,
    EvaluationSet,
    lettered_question,
    listed_texts,
    with_seeds,
)
from llava_cot_jax.files import short_digest
from llava_cot_jax.paths import as_path, reading_errors
from llava_cot_jax.question_files import QuestionRow, unique_rows

if TYPE_CHECKING:
    from pandas import DataFrame

_READ_AT_ONCE = 1 << 20
"""Number of bytes of a file that are hashed at a time."""

_INDEX_PARTS = 6
"""Number of parts of a HallusionBench index, of which three name the set, the figure and the question."""

_ROTATION = 1_000_000
"""Difference between the indices of a question and of the same one with its options rotated once."""


@dataclass(frozen=True)
class PublishedSet(EvaluationSet):
    """Questions of a published benchmark. Their right answers are in the table alone, for VLMEvalKit.

    Attributes:
        benchmark: The benchmark.
        prompts: Name of the prompts they are asked with, one of ``PROMPTS``.
        md5: MD5 of the file.
        table: All rows of the file, without their images.
        total: Number of questions that the file has.
    """

    benchmark: PublishedBenchmark
    prompts: str
    md5: str
    table: DataFrame
    total: int

    @property
    def is_published(self) -> bool:
        """Whether the file is the published one, byte for byte."""
        return self.md5 in self.benchmark.md5s

    def categories(self) -> dict[str | int, str]:
        """Return the category of each row that has one, by its index."""
        if "category" not in self.table:
            return {}
        cells = zip(_indices(self.table), self.table["category"], strict=True)
        return {index: str(cell) for index, cell in cells if not _is_missing(cell)}


def read_published(name: str, data: str, limit: int | None, prompts: str, seed: int) -> PublishedSet:
    """Read the first questions of a published benchmark's file.

    The file is a table with tabs, which pandas reads with its defaults, since VLMEvalKit does so: a cell that says NA,
    None or null is missing, and a column of numbers has numbers, so that an option may be asked as 7.0. Its images are
    in base64, in a list of such, or that of the row whose index the cell has. A row without an image is not asked.

    Args:
        name: Name of the benchmark in ``PUBLISHED_BENCHMARKS``.
        data: Path of the file.
        limit: Number of questions to take from the beginning; None takes all. One that is asked in rotations counts
            once, and has all of them.
        prompts: Name of the prompts, one of ``PROMPTS``.
        seed: Seed of the draws.

    Raises:
        UserError: The packages that read it are not installed, or the file is not that of the benchmark.
    """
    check_choice("prompts", prompts, PROMPTS)
    check_kit_packages(f"--benchmark {name}")
    benchmark, path = PUBLISHED_BENCHMARKS[name], as_path(data)
    md5, sha256 = _digests(path)
    table = _read_table(path)
    if missing := [column for column in benchmark.scorer.columns if column not in table]:
        raise UserError(f"{path} has no column {missing[0]}, so that it is no file of {name}")
    files = _images(table, path)
    if not files:
        raise UserError(f"{path} has no row with an image, so that there is nothing to ask")
    table = table.drop(columns="image")
    _check_values(benchmark, table.iloc[sorted(files)], limit, path)
    rows = []
    for number, (index, cells) in enumerate(zip(_indices(table), table.to_dict("records"), strict=True)):
        if number in files:
            images = files[number][: 1 if prompts == "llava_cot" else None]
            names, sources = [name for name, _ in images], [content for _, content in images]
            question = ask_as(prompts, benchmark, cells)
            rows.append((f"{path}, row {number + 1}", QuestionRow(index, question, None, names, [*sources])))
    questions = with_seeds(unique_rows(path, rows), seed)
    asked = _first_whole(questions, limit) if benchmark.is_circular else questions[:limit]
    return PublishedSet(
        rows=asked,
        digest=sha256[:16],
        name=name,
        known=[None] * len(asked),
        sha256=sha256,
        benchmark=benchmark,
        prompts=prompts,
        md5=md5,
        table=table,
        total=len(questions),
    )


def ask_as(prompts: str, benchmark: PublishedBenchmark, cells: Mapping[str, Any]) -> str:
    """Return the text with which a row of a benchmark is asked.

    Args:
        prompts: Name of the prompts: ``vlmevalkit`` are those of its classes, and ``llava_cot`` those of LLaVA-CoT's
            own evaluation, which differ with AI2D.
        benchmark: The benchmark.
        cells: The row's cells by their columns.
    """
    texts = {name: str(cell) for name, cell in cells.items() if not _is_missing(cell)}
    question = texts.get("question", "nan")
    if benchmark.scorer.columns != OPTION_COLUMNS:
        return question
    options = {letter: texts[letter] for letter in ascii_uppercase if letter in texts}
    if prompts == "llava_cot" and benchmark.dataset.startswith("AI2D"):
        listed = "".join(f"{letter}. {option}\n" for letter, option in options.items())
        return f"Look at the diagram carefully, and answer this.\n{question}\n{listed}Answer with the option alone."
    return lettered_question(texts | {"question": question}, options)


def _first_whole(questions: Sequence[QuestionRow], limit: int | None) -> list[QuestionRow]:
    """Return the first questions with all their rotations, which a file may have far below them.

    VLMEvalKit takes a question for right where all rotations are that it finds, so that one would do.
    """
    groups = [int(row.id) % _ROTATION for row in questions]
    first = set(list(dict.fromkeys(groups))[:limit])
    return [row for row, group in zip(questions, groups, strict=True) if group in first]


def _is_missing(cell: Any) -> bool:
    return isinstance(cell, float) and cell != cell


def _digests(path: Path) -> tuple[str, str]:
    """Return MD5 and SHA-256 of a file."""
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    with reading_errors(path), path.open("rb") as file:
        while content := file.read(_READ_AT_ONCE):
            md5.update(content)
            sha256.update(content)
    return md5.hexdigest(), sha256.hexdigest()


def _read_table(path: Path) -> DataFrame:
    import pandas

    try:
        with reading_errors(path), path.open("rb") as file:
            table = pandas.read_csv(file, sep="\t")
    except (pandas.errors.ParserError, pandas.errors.EmptyDataError, UnicodeDecodeError) as fault:
        raise UserError(f"{path} is no table with tabs: {' '.join(str(fault).split())}") from None
    return table


def _indices(table: DataFrame) -> list[str | int]:
    """Return the index of each row: whole numbers where all are."""
    texts = [str(index) for index in table["index"]]
    return [int(text) for text in texts] if all(text.lstrip("-").isdecimal() for text in texts) else [*texts]


def _images(table: DataFrame, path: Path) -> dict[int, list[tuple[str, bytes]]]:
    """Return name and content of the images of each row that has some, by the row's number.

    Rows with the same image share it. An image is named by its digest, so that they are known to do so.
    """
    cells = [None if _is_missing(cell) else str(cell) for cell in table["image"]]
    by_index = {str(index): cell for index, cell in zip(table["index"], cells, strict=True) if cell is not None}
    files: dict[str, tuple[str, bytes]] = {}
    images: dict[str, list[tuple[str, bytes]]] = {}
    found = {}
    for number, cell in enumerate(cells):
        if cell is None:
            continue
        place = f"{path}, row {number + 1}"
        if len(cell) <= LONGEST_REFERENCE:
            cell = by_index.get(cell, cell)
            if len(cell) <= LONGEST_REFERENCE:
                raise UserError(f"{place} has the image of row {shown(cell)}, which has none")
            by_index[str(table["index"].iloc[number])] = cell  # for the rows below that name this one
        if cell not in images:
            images[cell] = [_decoded(encoded, place, files) for encoded in listed_texts(cell, place)]
        found[number] = images[cell]
    return found


def _decoded(encoded: str, place: str, files: dict[str, tuple[str, bytes]]) -> tuple[str, bytes]:
    """Return name and content of an image, which is the one in ``files`` where that has it."""
    try:
        content = base64.b64decode(encoded)
    except ValueError as fault:
        raise UserError(f"{place}: its image is not in base64: {fault}") from None
    name = f"image-{short_digest(content)}"
    return files.setdefault(name, (name, content))


def _check_values(benchmark: PublishedBenchmark, asked: DataFrame, limit: int | None, path: Path) -> None:
    """Check that VLMEvalKit can score the first rows, of those that are asked, before their answers are generated.

    Raises:
        UserError: It cannot.
    """
    if not benchmark.scorer.needs_judge and asked["answer"].isna().any():
        raise UserError(f"{path} has rows without a right answer, so that VLMEvalKit would count any answer as wrong")
    if benchmark.is_circular and not all(isinstance(index, int) for index in _indices(asked)):
        raise UserError(f"{path} has an index that is no whole number, so that its rotations are not known")
    if benchmark.dataset == "HallusionBench":
        for index in asked["index"]:
            if len(str(index).split("_")) < _INDEX_PARTS:
                raise UserError(
                    f"{path} has the index {shown(index)}, whose parts between underscores do not name set, figure and "
                    "question"
                )
    if benchmark.dataset == "MMVet":
        _check_capabilities([str(category) for category in asked["category"]], limit, path)


def _check_capabilities(categories: Sequence[str], limit: int | None, path: Path) -> None:
    """Check that each capability of MM-Vet is needed by a question, without which VLMEvalKit divides by zero."""
    first = {
        name: next((number for number, category in enumerate(categories, 1) if name in category), None)
        for name in MM_VET_CAPABILITIES
    }
    if absent := [name for name, number in first.items() if number is None]:
        raise UserError(f"{path} has no question of the capability {absent[0]}, so that VLMEvalKit cannot score it")
    least = max(number for number in first.values() if number is not None)
    if limit is not None and limit < least:
        raise UserError(
            f"limit is {limit}; VLMEvalKit scores MM-Vet only with questions of all capabilities, so that it must be "
            f"at least {least}"
        )
