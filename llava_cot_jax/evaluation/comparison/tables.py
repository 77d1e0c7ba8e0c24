"""Tables of a comparison in the terminal."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llava_cot_jax.evaluation.comparison.lines import Line, lines_of
from llava_cot_jax.evaluation.paired import CONFIDENCE, POWER
from llava_cot_jax.evaluation.results import SAMPLED_TOKENS, percent


def print_comparison(lines: Sequence[Line], console: Console) -> None:
    """Print the tables of a comparison, and what is to be known beside them.

    Args:
        lines: Lines of the comparison's file.
        console: Console to print on.
    """
    methods, pairs, equal = (list(lines_of(lines, kind)) for kind in ("method", "pair", "equal_flops"))
    (about,) = lines_of(lines, "about")
    console.print(_headline(about), soft_wrap=True, markup=False)
    console.print(_method_table(methods))
    if any(line["unanswered"] for line in methods):
        console.print(
            "Questions without an answer count as wrong; they are left out of tokens and FLOPs.", soft_wrap=True
        )
    console.print(_pair_table(pairs))
    for note in _pair_notes(pairs):
        console.print(note, soft_wrap=True)
    if equal:
        console.print(_equal_table(equal))
        console.print(
            "Accuracy of the family at the FLOPs of the method, interpolated between measured numbers of candidates.",
            soft_wrap=True,
        )


def _headline(about: Line) -> str:
    run, devices = about["run"], dict.fromkeys(each["device"] for each in about["environments"])
    on = f" on {' and '.join(devices)}" if devices else ""
    return f"{about['questions']} questions of {about['benchmark']}, {run['checkpoint']}, seed {run['seed']}{on}"


def _table(title: str, names: Sequence[str], left: int) -> Table:
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(names):
        table.add_column(name, justify="left" if i < left else "right", no_wrap=i < left)
    return table


def _method_table(methods: Sequence[Line]) -> Table:
    has_seconds = any("seconds_per_question" in line for line in methods)
    names = ("method", "accuracy", "standard error", "sampled", "tokens", "FLOPs", *(["seconds"] * has_seconds))
    table = _table("Methods, by question", names, 1)
    for line in methods:
        tokens, flops = line["tokens_per_question"], line["flops_per_question"]
        cells = [
            percent(line["accuracy"]),
            percent(_standard_error(line)),
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
    names = ("first", "second", "difference", "standard error", f"{CONFIDENCE:.0%} interval")
    tests = ("only first", "only second", "p", "Holm's p", "questions needed")
    table = _table("Pairs: first less second, on the same questions", (*names, *tests), 2)
    for line in pairs:
        needed = line["questions_needed"]
        table.add_row(
            *(Text(line["first"]), Text(line["second"])),
            *_difference_cells(line),
            *(str(line["only_first"]), str(line["only_second"])),
            *(f"{line['p_value']:.2g}", f"{line['holm_p_value']:.2g}"),
            "none differ" if needed is None else f"{needed:,}",
        )
    return table


def _pair_notes(pairs: Sequence[Line]) -> Iterator[str]:
    count = len(pairs)
    yield (
        f"p: McNemar's exact test on the questions that one method alone answers right. {count} "
        f"{'pair was' if count == 1 else 'pairs were'} tested; Holm's p allows for that. Questions needed: how many "
        f"show a difference of this size with a power of {POWER:.0%}."
    )
    if any(line["clusters"] < line["questions"] for line in pairs):
        yield "Standard errors and intervals are clustered by image; the test takes questions as independent."


def _equal_table(equal: Sequence[Line]) -> Table:
    names = ("method", "family", "FLOPs", "family's accuracy", "difference", "standard error")
    table = _table("Accuracy at equal FLOPs: method less family", (*names, f"{CONFIDENCE:.0%} interval"), 2)
    for line in equal:
        cells = (Text(line["method"]), Text(line["family"]), f"{line['flops']:.3g}")
        if line["between"] is None:
            table.add_row(*cells, "outside what was measured")
        else:
            table.add_row(*cells, percent(line["accuracy"]), *_difference_cells(line))
    return table


def _difference_cells(line: Mapping[str, Any]) -> list[str]:
    interval = line["interval"]
    told = "unknown" if interval is None else f"{interval[0]:+.1%} to {interval[1]:+.1%}"
    return [f"{line['difference']:+.1%}", percent(line["standard_error"]), told]
