"""Plot of a comparison: accuracy over FLOPs, as PNG and SVG."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from llava_cot_jax.errors import UserError
from llava_cot_jax.evaluation.comparison.lines import Line, lines_of, what_was_asked
from llava_cot_jax.files import atomic_path
from llava_cot_jax.paths import writing_errors

FORMS = ("png", "svg")
"""Forms of the plot, which are the endings of its files."""

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c564b")
"""Colours of the families: those of Okabe and Ito, which colour-blind people tell apart, and a brown."""

_MARKERS = "osD^vPX"
"""Marks of the families, one fewer than colours, so that both together tell more of them apart."""


def check_plots() -> None:
    """Check that plots can be drawn.

    Raises:
        UserError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            "--compare draws a plot with matplotlib, which is not installed: pip install 'llava-cot-jax[plots]'"
        )


def draw_comparison(lines: Sequence[Line], stem: Path) -> dict[str, Path]:
    """Draw the accuracy of each method over its FLOPs, with a line for each family, into a file of each form.

    Args:
        lines: Lines of the comparison's file.
        stem: Path of the files without their endings.

    Returns:
        The file of each form.

    Raises:
        UserError: A file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

    (about,) = lines_of(lines, "about")
    figure = Figure(figsize=(8.5, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    families: dict[str, list[Line]] = {}
    for line in lines_of(lines, "method"):
        if line["flops_per_question"]:
            families.setdefault(line["family"], []).append(line)
    for i, (family, members) in enumerate(families.items()):
        members = sorted(members, key=_flops)
        errors = [line["clustered_standard_error"] or 0.0 for line in members]
        colour, above = _COLOURS[i % len(_COLOURS)], i % 2 == 0
        axes.errorbar(
            [_flops(line) for line in members],
            [line["accuracy"] for line in members],
            errors,
            label=family,
            color=colour,
            marker=_MARKERS[i % len(_MARKERS)],
            capsize=3,
            linewidth=1.5,
            elinewidth=0.8,
        )
        for line in members:
            if line["num_candidates"] and len(members) > 1:
                place, side = (_flops(line), line["accuracy"]), (5, 5 if above else -12)
                number = str(line["num_candidates"])
                axes.annotate(number, place, side, textcoords="offset points", fontsize=8, color=colour)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda flops, _: f"{flops:g}"))
    axes.set_xlabel("FLOPs of a question")
    axes.set_ylabel("accuracy, with standard errors")
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -0.02), min(high, 1.02))  # marks at 0% and 100% stay whole
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(which="major", alpha=0.3)
    axes.set_title(what_was_asked(about))
    if families:
        figure.legend(loc="outside right upper", frameon=False)
    paths = {form: stem.with_name(f"{stem.name}.{form}") for form in FORMS}
    for form, path in paths.items():
        # The names in an SVG are made of a salt, which is another one each time by default.
        with writing_errors(path), atomic_path(path) as beside, rc_context({"svg.hashsalt": stem.name}):
            figure.savefig(beside, format=form, dpi=150, metadata={"Date": None} if form == "svg" else None)
    return paths


def _flops(line: Line) -> float:
    return float(line["flops_per_question"]["total"])
