"""Table of the measures of verifiers in the terminal."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDTH = 120
"""Least number of columns of the table."""

_Measures = Mapping[str, Any]
"""Measures of a stage, or differences between two verifiers in it, as the result has them."""


@dataclass(frozen=True)
class _Row:
    """Measure in the table.

    Attributes:
        label: Name of the measure.
        told: Function that returns it as text from the measures of a stage.
        difference: Function that returns it from differences; empty where they do not have it.
    """

    label: str
    told: Callable[[_Measures], str]
    difference: Callable[[_Measures], str] = lambda _: ""


def _mean_row(label: str, key: str, form: str) -> _Row:
    """Return the row of a mean with its standard error."""

    def told(measures: _Measures) -> str:
        if (mean := measures.get(key)) is None:
            return "none" if key in measures else ""
        return f"{mean['mean']:{form}}{_told_error(mean, form)}"

    def difference(measures: _Measures) -> str:
        if (found := measures.get(key)) is None:
            return ""
        return f"{found['difference']:+{form}}{_told_error(found, form)}"

    return _Row(label, told, difference)


def _told_error(estimate: Mapping[str, Any], form: str) -> str:
    error = estimate["standard_error"]
    return "" if error is None else f" ± {error:{form.removeprefix('+')}}"


def _count_row(label: str, key: str) -> _Row:
    """Return the row of the number of values of which a mean is taken."""
    return _Row(label, lambda measures: f"{measures[key]['count']:,}" if measures[key] else "0")


_ROWS = (
    _Row("questions", lambda measures: f"{measures['questions']:,}", lambda measures: f"{measures['questions']:,}"),
    _mean_row("rank correlation", "rank_correlation", ".2f"),
    _count_row("clear pairs", "clear_pairs"),
    _mean_row("accuracy, clear pairs", "clear_pairs", ".1%"),
    _mean_row("by log-probability", "clear_pairs_by_log_prob", ".1%"),
    _count_row("all pairs", "all_pairs"),
    _mean_row("accuracy, all pairs", "all_pairs", ".1%"),
    _mean_row("by log-probability", "all_pairs_by_log_prob", ".1%"),
    _mean_row("value of the chosen", "chosen_value", ".1%"),
    _mean_row("of a random one", "random_value", ".1%"),
    _mean_row("of the best one", "best_value", ".1%"),
    _mean_row("chosen less random", "chosen_less_random", "+.1%"),
    _Row("calibration error", lambda measures: f"{measures['calibration']['expected_calibration_error']:.3f}"),
    _Row("Brier score", lambda measures: f"{measures['calibration']['brier_score']:.3f}"),
    _Row("outside yes and no", lambda measures: f"{measures['other_probability']['mean']:.2g}"),
    _Row("its 95th percentile", lambda measures: f"{measures['other_probability']['percentile_95']:.2g}"),
)


_LEFT_OUT = (
    ("unanswered", "question", "questions", "answer"),
    ("unscored", "set of candidates", "sets of candidates", "scores"),
)
"""Counts of what is left out, and the words for one of it, for several, and for what it lacks."""


def print_measures(result: Mapping[str, Any], console: Console) -> None:
    """Print a result as a table with a column for each stage, and what is to be known beside it.

    Args:
        result: Content of the result's file.
        console: Console to print on. It is made wide enough.
    """
    console.width = max(console.width, _WIDTH)
    verifiers = result["verifiers"]
    parts = list(dict.fromkeys(part for verifier in verifiers for part in verifier["parts"]))
    has_names = len(verifiers) > 1
    table = Table()
    for name in ("measure", *(["values"] * has_names)):
        table.add_column(name, overflow="fold")
    for part in parts:
        table.add_column(Text(part), justify="right", overflow="fold")
    for row in _ROWS:
        label = row.label
        for name, cells in _lines(row, result):
            table.add_row(Text(label), *([Text(name)] * has_names), *(Text(cells.get(part, "")) for part in parts))
            label = ""
        if has_names:
            table.add_section()
    console.print(table)
    for note in _notes(result):
        console.print(note, soft_wrap=True, markup=False)


def _lines(row: _Row, result: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the name of each verifier, and below it what it differs from, with the text of each stage."""
    differences = {each["values"]: each for each in result["differences"]}
    for verifier in result["verifiers"]:
        yield verifier["values"], {part: row.told(measures) for part, measures in verifier["parts"].items()}
        if each := differences.get(verifier["values"]):
            cells = {part: row.difference(measures) for part, measures in each["parts"].items()}
            if any(cells.values()):
                yield f"less {each['less']}", cells


def _notes(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is to be known beside the table."""
    yield (
        f"Clear pairs are two candidates of a question whose values differ by {result['clear_difference']:g} at least. "
        "Standard errors are clustered by image."
    )
    for verifier in result["verifiers"]:
        for key, one, many, lacks in _LEFT_OUT:
            if count := verifier[key]:
                counted = f"1 {one} has" if count == 1 else f"{count:,} {many} have"
                yield f"In {verifier['values']}, {counted} no {lacks}."
    for each in result["differences"]:
        if not each["parts"]:
            yield f"{each['values']} has no question with the candidates and values of {each['less']}: no difference."
