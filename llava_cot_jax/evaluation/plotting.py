"""Plots of evaluations: the check that they can be drawn, their colours, and their files as PNG and SVG."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from llava_cot_jax.errors import UserError
from llava_cot_jax.files import atomic_path
from llava_cot_jax.paths import writing_errors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FORMS = ("png", "svg")
"""Forms of a plot, which are the endings of its files."""

LINE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c564b")
"""Colours of lines: those of Okabe and Ito, which colour-blind people tell apart, and a brown."""

LINE_MARKERS = "osD^vPX"
"""Marks of lines, one fewer than colours, so that both together tell more of them apart."""


def check_plots(option: str) -> None:
    """Check that plots can be drawn.

    Args:
        option: Option that needs one, for the message.

    Raises:
        UserError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            f"{option} draws a plot with matplotlib, which is not installed: pip install 'llava-cot-jax[plots]'"
        )


def save_figure(figure: Figure, stem: Path) -> dict[str, Path]:
    """Write a figure into a file of each form, whose bytes depend on nothing else.

    Args:
        figure: The figure.
        stem: Path of the files without their endings.

    Returns:
        The file of each form.

    Raises:
        UserError: A file cannot be written.
    """
    from matplotlib import rc_context

    paths = {form: stem.with_name(f"{stem.name}.{form}") for form in _FORMS}
    for form, path in paths.items():
        # The names in an SVG are made of a salt, which is another one each time by default.
        with writing_errors(path), atomic_path(path) as beside, rc_context({"svg.hashsalt": stem.name}):
            figure.savefig(beside, format=form, dpi=150, metadata={"Date": None} if form == "svg" else None)
    return paths
