"""Tables of a comparison, and their print in the terminal."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llava_cot_jax.evaluation.comparison.lines import Line, lines_of, what_was_asked
from llava_cot_jax.evaluation.paired import POWER
from llava_cot_jax.evaluation.results import SAMPLED_TOKENS, told_share

_WIDTH, _LEAST_WIDTH = 120, 80
"""Numbers of columns of a table that is written to a file or a pipe, and of one on a narrow terminal."""


@dataclass(frozen=True)
class ComparisonTable:
    """Table of a comparison.

    Attributes:
        title: Text above the table.
        columns: Names of the columns.
        names: Number of the columns that name a row, which come first; the others have numbers.
        rows: Texts of each row.
        notes: Sentences to be known beside the table.
    """

    title: str
    columns: Sequence[str]
    names: int
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]


def comparison_tables(lines: Sequence[Line]) -> list[ComparisonTable]:
    """Return the tables of methods, of pairs and, where there are such lines, of accuracies at equal FLOPs.

    Args:
        lines: Lines of the comparison's file.
    """
    methods, pairs, equal = (list(lines_of(lines, kind)) for kind in ("method", "pair", "equal_flops"))
    return [_method_table(methods), _pair_table(pairs), *([_equal_table(equal)] if equal else [])]


def print_comparison(lines: Sequence[Line], console: Console) -> None:
    """Print the tables of a comparison, and what is to be known beside them.

    Args:
        lines: Lines of the comparison's file.
        console: Console to print on. Where it is no terminal, or a very narrow one, it is made wide enough.
    """
    console.width = max(console.width, _LEAST_WIDTH if console.is_terminal else _WIDTH)
    (about,) = lines_of(lines, "about")
    devices = " and ".join(dict.fromkeys(each["device"] for each in about["environments"]))
    _say(console, f"{what_was_asked(about)}, on {devices or 'no device'}")
    for table in comparison_tables(lines):
        console.print(_printed(table))
        for note in table.notes:
            _say(console, note)


def _say(console: Console, sentence: str) -> None:
    console.print(sentence, soft_wrap=True, markup=False)


def _printed(table: ComparisonTable) -> Table:
    """Return a table as it is printed. Where it has no room, names are folded, and no number is cut."""
    printed = Table(title=table.title, title_justify="left", title_style="bold")
    for i, name in enumerate(table.columns):
        is_name = i < table.names
        printed.add_column(name, justify="left" if is_name else "right", no_wrap=not is_name, overflow="fold")
    for row in table.rows:
        printed.add_row(*map(Text, row))
    return printed


def _method_table(methods: Sequence[Line]) -> ComparisonTable:
    has_seconds = any("seconds_per_question" in line for line in methods)
    columns = ("method", "accuracy", "generated", "tokens", "FLOPs", *(["seconds"] * has_seconds))
    notes = []
    if any(line["unanswered"] for line in methods):
        notes.append("Questions without an answer count as wrong. Tokens and FLOPs are those of the others.")
    rows = [_method_row(line, has_seconds) for line in methods]
    return ComparisonTable("Methods, and what a question took", columns, 1, rows, notes)


def _method_row(line: Line, has_seconds: bool) -> list[str]:
    tokens, flops = line["tokens_per_question"], line["flops_per_question"]
    return [
        line["method"],
        f"{told_share(line['accuracy'])} ± {told_share(standard_error_of(line))}",
        f"{sum(tokens.get(name, 0) for name in SAMPLED_TOKENS):,.0f}" if tokens else "none",
        f"{tokens['total']:,.0f}" if tokens else "none",
        f"{flops['total']:.3g}" if flops else "none",
        *([_seconds(line)] if has_seconds else []),
    ]


def standard_error_of(line: Line) -> float | None:
    """Return the standard error of a method, which is clustered by image where images are shared."""
    error: float | None = line["standard_error"]
    if line["clusters"] < line["questions"]:
        error = line["clustered_standard_error"]
    return error


def _seconds(line: Line) -> str:
    if line["derived"]:
        return "derived"
    seconds = line["seconds_per_question"]
    return "unknown" if seconds is None else f"{seconds:.3g}"


def _pair_table(pairs: Sequence[Line]) -> ComparisonTable:
    columns = ("first", "second", "difference", "alone right", "p", "Holm's p", "needed")
    rows = [
        [
            *(line["first"], line["second"], _difference(line), f"{line['only_first']} : {line['only_second']}"),
            *(f"{line['p_value']:.2g}", f"{line['holm_p_value']:.2g}"),
            "none" if (needed := line["questions_needed"]) is None else f"{needed:,}",
        ]
        for line in pairs
    ]
    return ComparisonTable("Pairs: first less second", columns, 2, rows, list(_pair_notes(pairs)))


def _pair_notes(pairs: Sequence[Line]) -> Iterator[str]:
    count = len(pairs)
    yield (
        f"p is that of McNemar's exact test on the questions that one method alone answers right; Holm's allows for "
        f"{count} {'pair that was' if count == 1 else 'pairs that were'} tested. Needed is how many questions "
        f"would show a difference of this size with a power of {POWER:.0%}; none where there is no difference."
    )
    if any(line["clusters"] < line["questions"] for line in pairs):
        yield "Standard errors are clustered by image; the test takes questions as independent."


def _equal_table(equal: Sequence[Line]) -> ComparisonTable:
    columns = ("method", "family", "accuracy of the family", "method less family")
    rows = [
        [line["method"], line["family"], "outside what was measured", ""]
        if line["between"] is None
        else [line["method"], line["family"], told_share(line["accuracy"]), _difference(line)]
        for line in equal
    ]
    note = "The accuracy of a family at the FLOPs of a method lies between two of its numbers of candidates."
    return ComparisonTable("Accuracy at the FLOPs of a method", columns, 2, rows, [note])


def _difference(line: Mapping[str, Any]) -> str:
    """Return a difference with its standard error."""
    return f"{line['difference']:+.1%} ± {told_share(line['standard_error'])}"
