"""HTML page of an evaluation: its result, and each question with the search for its answer."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_cot_jax.checks import shown
from llava_cot_jax.errors import UserError
from llava_cot_jax.evaluation.benchmarks.score_report import score_table
from llava_cot_jax.hosts.question_queue import AnswerRow
from llava_cot_jax.processing.images import ImageSource
from llava_cot_jax.question_files import QuestionRow
from llava_cot_jax.search.page import PageEntry, PageTable, Unanswered, write_page
from llava_cot_jax.search.trace import Trace
from llava_cot_jax.search.wording import short_count
from llava_cot_jax.stage_format import StageFormat

_MAIN = ("search", "checkpoint", "adapter", "verifier_adapter")
"""Settings that come first."""


def write_evaluation_page(
    path: Path,
    result: Mapping[str, Any],
    questions: Sequence[QuestionRow],
    rows: Sequence[AnswerRow],
    format: StageFormat,
) -> None:
    """Write the page of an evaluation.

    Args:
        path: The HTML file.
        result: Result of the evaluation, as ``EvaluationJob.report`` returns it.
        questions: The questions.
        rows: Scored row of each question.
        format: Format of the answers.

    Raises:
        UserError: The file cannot be written, or a row has no trace.
    """
    entries = [page_entry(row, question.sources, format) for question, row in zip(questions, rows, strict=True)]
    title = f"Accuracy on {result['benchmark']}"
    write_page(path, entries, dict(facts_of(result)), title, tables=list(_tables(result)))


def _tables(result: Mapping[str, Any]) -> Iterator[PageTable]:
    """Yield the table of the accuracies, or that of a published benchmark's scores, if it has some."""
    if "accuracy" in result:
        yield accuracy_table(result)
    elif result["scores"]:
        yield PageTable(*score_table(result["scores"]))


def accuracy_table(result: Mapping[str, Any]) -> PageTable:
    """Return the table of the accuracies by category and over all questions."""
    every, categories = result["accuracy"]["all"], result["accuracy"]["categories"]
    parts = {**categories, "all": every}
    shares_images = any(each["clusters"] < each["questions"] for each in parts.values())
    columns = ["category", "questions", "right", "accuracy", "standard error", *(["clustered"] * shares_images)]
    rows, shares = [], []
    for name, each in parts.items():
        clustered = each["clustered_standard_error"]
        errors = [each["standard_error"], *([clustered] * shares_images)]
        said = ["unknown" if share is None else f"{share:.1%}" for share in (each["accuracy"], *errors)]
        rows.append([name, f"{each['questions']:,}", f"{each['right']:,}", *said])
        shares.append((each["accuracy"], each["standard_error"] if errors[-1] is None else errors[-1]))
    drawn = "clustered standard error" if shares_images else "standard error"
    return PageTable(f"Accuracy, drawn with one {drawn} to each side", columns, rows, shares)


def page_entry(row: AnswerRow, images: Sequence[ImageSource], format: StageFormat) -> PageEntry:
    """Return the question of a scored row on a page.

    Args:
        row: Scored row, with its trace.
        images: Images that the question is about.
        format: Format of the answer.

    Raises:
        UserError: The row has no trace.
    """
    error = row.get("error")
    if error is None and "trace" not in row:
        raise UserError(
            f"the answer to {shown(row['id'])} has no trace, as an earlier version wrote it: name another output for a "
            "page"
        )
    known = row.get("answer")  # of a published benchmark, VLMEvalKit alone knows what is right
    right = known if known is None or isinstance(known, list) else [known]
    return PageEntry(
        trace=Trace.from_dict(row["trace"], format) if error is None else Unanswered(row["question"], error),
        images=images,
        right_answer=" or ".join(map(str, right)) if right else None,
        correct=row.get("right"),
        category=row["category"],
        name=str(row["id"]),
        scored=row.get("scored"),
    )


def facts_of(result: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Yield what was run and what it took, by name, what matters most first."""
    run = {name: value for name, value in result["run"].items() if value is not None}
    yield from ((name, run[name]) for name in _MAIN if name in run)
    if tokens := result["tokens_per_question"].get("total"):
        yield "tokens a question", f"{tokens:,.0f}"
        yield "FLOPs a question", short_count(result["flops_per_question"]["total"])
    if devices := dict.fromkeys(each["device"] for each in result["environments"]):
        yield "device", ", ".join(devices)
    yield "seed", run["seed"]
    counted = result["accuracy"]["all"] if "accuracy" in result else result["questions"]
    if unanswered := counted["unanswered"]:
        yield "questions without an answer, which count as wrong", unanswered
    if "matches" in result:
        yield "matches", ", ".join(f"{count} {name}" for name, count in result["matches"].items())
    yield "SHA-256 of the questions", result["sha256"]
    yield from ((name.replace("_", " "), value) for name, value in run.items() if name not in (*_MAIN, "seed"))
    for number, environment in enumerate(result["environments"], 1):
        said = ", ".join(f"{name} {value}" for name, value in environment.items() if name != "device")
        yield f"versions{f' {number}' if len(result['environments']) > 1 else ''}", f"{said} on {environment['device']}"
