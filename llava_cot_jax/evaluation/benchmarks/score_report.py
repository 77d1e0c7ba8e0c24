"""Scores of VLMEvalKit as a table, with what is to be known beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llava_cot_jax.evaluation.benchmarks.kit_install import INSTALL_KIT, INSTALL_PACKAGES, kit_fault
from llava_cot_jax.evaluation.benchmarks.kit_scores import KIT_FOLDER
from llava_cot_jax.evaluation.benchmarks.predictions import MODEL_NAME
from llava_cot_jax.evaluation.benchmarks.question_tables import PublishedSet
from llava_cot_jax.evaluation.results import cost_notes


def print_scores(result: Mapping[str, Any], questions: PublishedSet, folder: Path, console: Console) -> None:
    """Print the scores of a published benchmark.

    Args:
        result: Content of the result's file.
        questions: The questions.
        folder: Folder of the evaluation.
        console: Console to print on.
    """
    console.print(f"{result['benchmark']} with {result['run']['search']}", soft_wrap=True, markup=False)
    if scores := result["scores"]:
        caption, columns, rows = score_table(scores)
        console.print(caption, soft_wrap=True, markup=False)
        table = Table()
        for number, name in enumerate(columns):
            table.add_column(Text(name), justify="right" if number else "left", no_wrap=True)
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
    for note in (*_notes(result, questions, folder), *cost_notes(result)):
        console.print(note, soft_wrap=True, markup=False)


def score_table(scores: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """Return caption, columns and rows of the kit's first table, which is turned where it is wider than it is long.

    Args:
        scores: Scores as they stand in a result.
    """
    rows: list[dict[str, Any]] = next(iter(scores["tables"].values()))
    names = list(rows[0])
    cells = [[_shown(row[name], scores["largest"]) for name in names] for row in rows]
    if len(names) > len(rows) + 1:
        names, *cells = map(list, zip(names, *cells, strict=True))
    by = scores["by"] if isinstance(scores["by"], str) else f"{scores['by']['model']} at {scores['by']['url']}"
    return f"{scores['scorer']}, {by}, scores from 0 to {scores['largest']}", names, cells


def _shown(cell: str | float | None, largest: int) -> str:
    if isinstance(cell, float):
        return f"{cell:.4f}" if largest == 1 else f"{cell:.2f}"
    return "" if cell is None else str(cell)


def _notes(result: Mapping[str, Any], questions: PublishedSet, folder: Path) -> Iterator[str]:
    """Yield what is to be known beside the table."""
    asked, total, unanswered = (result["questions"][name] for name in ("asked", "of", "unanswered"))
    scores, scorer = result["scores"], questions.benchmark.scorer
    if asked < total:
        yield f"These are {asked:,} of {total:,} questions: their score is not that of the benchmark."
    if not result["published"]:
        yield f"The file is not the published one of {result['dataset']}: its MD5 is {result['md5']}."
    if unanswered:
        yield (
            f"{unanswered} of {asked} questions have no answer, and count as wrong: the rows with the key error in "
            "answers.jsonl say why; delete these to ask them again."
        )
    if scores and (judge := scores.get("judge_requests")):
        yield (
            f"The judge was asked {judge['asked']} questions: {judge['requests']} requests, of which {judge['kept']} "
            f"had been answered before, and {judge['retries']} more tries."
        )
        if judge["unread"]:
            yield f"{judge['unread']} rows have no reply of the judge that could be read: {scorer.unread}."
    if not scores:
        dataset = result["dataset"]
        predictions = folder / KIT_FOLDER / f"{MODEL_NAME}_{dataset}.xlsx"
        arguments = quote(str(predictions)) + ("" if scorer.needs_judge else " --judge exact_matching")
        yield f"There are no scores: {kit_fault()}. To install it: {INSTALL_KIT} && {INSTALL_PACKAGES}"
        yield f"To score elsewhere: LMUData=FOLDER_OF_{dataset}.tsv vlmutil eval {arguments}"
