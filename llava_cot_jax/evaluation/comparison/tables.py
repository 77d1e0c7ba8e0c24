"""Tables of a comparison in the terminal."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llava_cot_jax.evaluation.comparison.lines import Line, lines_of, what_was_asked
from llava_cot_jax.evaluation.paired import POWER
from llava_cot_jax.evaluation.results import SAMPLED_TOKENS, told_share

_WIDTH = 120
"""Number of columns of a table that is written to a file or a pipe."""


def print_comparison(lines: Sequence[Line], console: Console) -> None:
    """Print the tables of a comparison, and what is to be known beside them.

    Args:
        lines: Lines of the comparison's file.
        console: Console to print on. Where it is no terminal, it is made wide enough.
    """
    if not console.is_terminal:
        console.width = max(console.width, _WIDTH)
    methods, pairs, equal = (list(lines_of(lines, kind)) for kind in ("method", "pair", "equal_flops"))
    (about,) = lines_of(lines, "about")
    devices = " and ".join(dict.fromkeys(each["device"] for each in about["environments"]))
    _say(console, f"{what_was_asked(about)}, on {devices or 'no device'}")
    console.print(_method_table(methods))
    if any(line["unanswered"] for line in methods):
        _say(console, "Questions without an answer count as wrong. Tokens and FLOPs are those of the others.")
    console.print(_pair_table(pairs))
    for note in _pair_notes(pairs):
        _say(console, note)
    if equal:
        console.print(_equal_table(equal))
        _say(
            console, "The accuracy of a family at the FLOPs of a method lies between two of its numbers of candidates."
        )


def _say(console: Console, sentence: str) -> None:
    console.print(sentence, soft_wrap=True, markup=False)


def _table(title: str, names: Sequence[str], left: int) -> Table:
    """Return a table without rows, of whose columns the first ``left`` have texts, and the others numbers."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for i, name in enumerate(names):
        table.add_column(name, justify="left" if i < left else "right", no_wrap=True)
    return table


def _method_table(methods: Sequence[Line]) -> Table:
    has_seconds = any("seconds_per_question" in line for line in methods)
    names = ("method", "accuracy", "generated", "tokens", "FLOPs", *(["seconds"] * has_seconds))
    table = _table("Methods, and what a question took", names, 1)
    for line in methods:
        tokens, flops = line["tokens_per_question"], line["flops_per_question"]
        cells = [
            f"{told_share(line['accuracy'])} ± {told_share(_standard_error(line))}",
            f"{sum(tokens.get(name, 0) for name in SAMPLED_TOKENS):,.0f}" if tokens else "none",
            f"{tokens['total']:,.0f}" if tokens else "none",
            f"{flops['total']:.3g}" if flops else "none",
        ]
        if has_seconds:
            cells.append(_seconds(line))
        table.add_row(Text(line["method"]), *cells)
    return table


def _standard_error(line: Line) -> float | None:
    """Return the standard error that is clustered by image where images are shared."""
    error: float | None = line["standard_error"]
    if line["clusters"] < line["questions"]:
        error = line["clustered_standard_error"]
    return error


def _seconds(line: Line) -> str:
    if line["derived"]:
        return "derived"
    seconds = line["seconds_per_question"]
    return "unknown" if seconds is None else f"{seconds:.3g}"


def _pair_table(pairs: Sequence[Line]) -> Table:
    names = ("first", "second", "difference", "alone right", "p", "Holm's p", "needed")
    table = _table("Pairs: first less second", names, 2)
    for line in pairs:
        needed = line["questions_needed"]
        table.add_row(
            *(Text(line["first"]), Text(line["second"]), _difference(line)),
            f"{line['only_first']} : {line['only_second']}",
            *(f"{line['p_value']:.2g}", f"{line['holm_p_value']:.2g}"),
            "none" if needed is None else f"{needed:,}",
        )
    return table


def _pair_notes(pairs: Sequence[Line]) -> Iterator[str]:
    count = len(pairs)
    yield (
        f"p is that of McNemar's exact test on the questions that one method alone answers right; Holm's allows for "
        f"{count} {'pair that was' if count == 1 else 'pairs that were'} tested. Needed is how many questions "
        f"would show a difference of this size with a power of {POWER:.0%}; none where there is no difference."
    )
    if any(line["clusters"] < line["questions"] for line in pairs):
        yield "Standard errors are clustered by image; the test takes questions as independent."


def _equal_table(equal: Sequence[Line]) -> Table:
    names = ("method", "family", "accuracy of the family", "method less family")
    table = _table("Accuracy at the FLOPs of a method", names, 2)
    for line in equal:
        told = [Text(line["method"]), Text(line["family"])]
        if line["between"] is None:
            table.add_row(*told, "outside what was measured")
        else:
            table.add_row(*told, told_share(line["accuracy"]), _difference(line))
    return table


def _difference(line: Mapping[str, Any]) -> str:
    """Return a difference with its standard error."""
    return f"{line['difference']:+.1%} ± {told_share(line['standard_error'])}"
