"""Result of an evaluation: accuracy over all questions and by category, what it took, and what was run."""

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llava_cot_jax.evaluation.statistics import estimate_accuracy

SAMPLED_TOKENS = ("candidates", "judge_reasons")
"""Names of the counts of tokens that were sampled; all others were only read."""


def summarize(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what scored rows say together.

    Args:
        rows: Rows of all questions, as ``scored_row`` returns them; at least one.
    """
    categories = sorted({row["category"] for row in rows if row["category"] is not None})
    parts = {name: [row for row in rows if row["category"] == name] for name in categories}
    return {
        "accuracy": {"all": _accuracy(rows), "categories": {name: _accuracy(part) for name, part in parts.items()}},
        "matches": dict(Counter(row["match"] for row in rows)),
        **mean_costs(rows),
    }


def mean_costs(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the tokens and FLOPs that an answered question took on average, by their parts.

    Args:
        rows: Rows of all questions, as an evaluation stores them.
    """
    answered = [row for row in rows if "error" not in row]
    return {
        "tokens_per_question": _means([row["tokens"] for row in answered]),
        "flops_per_question": _means([row["flops"] for row in answered]),
    }


def _accuracy(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    estimate = estimate_accuracy([row["right"] for row in rows], [cluster_of(row) for row in rows])
    return {**asdict(estimate), "unanswered": sum("error" in row for row in rows)}


def cluster_of(row: Mapping[str, Any]) -> Hashable:
    """Return the group of a question: its images, by their digests where the row has these, or without any, itself."""
    return tuple(row.get("image_digests") or row["images"]) or row["id"]


def _means(counts: Sequence[Mapping[str, int]]) -> dict[str, float]:
    """Return the mean of each part over the answered questions, and of their sum."""
    names = dict.fromkeys(name for each in counts for name in each)
    means = {name: sum(each.get(name, 0) for each in counts) / len(counts) for name in names}
    return {**means, "total": sum(means.values())} if means else {}


def print_result(result: Mapping[str, Any], console: Console) -> None:
    """Print a result as a table, and what is to be known beside it.

    Args:
        result: Content of the result's file.
        console: Console to print on.
    """
    every, categories = result["accuracy"]["all"], result["accuracy"]["categories"]
    shares_images = any(each["clusters"] < each["questions"] for each in (every, *categories.values()))
    table = Table()
    table.add_column("category", no_wrap=True)
    for name in ("questions", "right", "accuracy", "standard error", *(["clustered"] * shares_images)):
        table.add_column(name, justify="right")

    def add_row(name: str, each: Mapping[str, Any]) -> None:
        shares = [each["accuracy"], each["standard_error"], *([each["clustered_standard_error"]] * shares_images)]
        table.add_row(Text(name), str(each["questions"]), str(each["right"]), *map(told_share, shares))

    for name, each in categories.items():
        add_row(name, each)
    table.add_section()
    add_row("all", every)
    console.print(f"{result['benchmark']} with {result['run']['search']}", soft_wrap=True, markup=False)
    console.print(table)
    for note in _notes(result, shares_images):
        console.print(note, soft_wrap=True)


def _notes(result: Mapping[str, Any], shares_images: bool) -> Iterator[str]:
    """Yield what is to be known beside the table."""
    every = result["accuracy"]["all"]
    if shares_images:
        yield "Clustered is the standard error where questions about the same images are not independent."
    if unanswered := every["unanswered"]:
        says = "has no answer, and counts" if unanswered == 1 else "have no answer, and count"
        yield (
            f"{unanswered} of {every['questions']} questions {says} as wrong: the rows with the key error in "
            "answers.jsonl say why; delete these to ask them again."
        )
    yield from cost_notes(result)


def cost_notes(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a question took on average, if any was answered.

    Args:
        result: Content of the result's file.
    """
    tokens, flops = result["tokens_per_question"], result["flops_per_question"]
    if tokens:
        sampled = sum(tokens.get(name, 0) for name in SAMPLED_TOKENS)
        took = f"{tokens['total']:,.0f} tokens, of which {sampled:,.0f} were generated, and {flops['total']:.3g} FLOPs"
        yield f"On average, a question took {took}."


def told_share(share: float | None) -> str:
    """Return a share as a table shows it."""
    return "unknown" if share is None else f"{share:.1%}"
