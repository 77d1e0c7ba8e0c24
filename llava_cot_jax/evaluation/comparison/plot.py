"""Plot of a comparison: accuracy over FLOPs, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava_cot_jax.evaluation.comparison.lines import Line, lines_of, what_was_asked
from llava_cot_jax.evaluation.plotting import LINE_COLOURS, LINE_MARKERS, save_figure


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
        colour, above = LINE_COLOURS[i % len(LINE_COLOURS)], i % 2 == 0
        axes.errorbar(
            [_flops(line) for line in members],
            [line["accuracy"] for line in members],
            errors,
            label=family,
            color=colour,
            marker=LINE_MARKERS[i % len(LINE_MARKERS)],
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
    return save_figure(figure, stem)


def _flops(line: Line) -> float:
    return float(line["flops_per_question"]["total"])
