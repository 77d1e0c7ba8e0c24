"""Plot of how well a verifier's scores are calibrated: reliability diagrams, with the number of candidates below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_cot_jax.evaluation.plotting import LINE_COLOURS, LINE_MARKERS, save_figure


def draw_calibration(verifiers: Sequence[Mapping[str, Any]], stem: Path) -> dict[str, Path]:
    """Draw mean value over mean score in the bins of each stage, with a line for each verifier.

    Args:
        verifiers: Verifiers of the result: for each, ``values`` (its name) and ``parts`` (its measures by stage).
        stem: Path of the files without their endings.

    Returns:
        The file of each form.

    Raises:
        UserError: A file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = dict.fromkeys(part for verifier in verifiers for part in verifier["parts"])
    figure = Figure(figsize=(1.5 + 2.6 * len(names), 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(names), sharex=True, squeeze=False, height_ratios=(3, 1))
    drawn: dict[str, Any] = {}
    for column, part in enumerate(names):
        above, below = axes[:, column]
        above.plot((0, 1), (0, 1), color="0.6", linestyle="--", linewidth=1)
        for i, verifier in enumerate(verifiers):
            if part not in verifier["parts"]:
                continue
            bins = verifier["parts"][part]["calibration"]["bins"]
            filled = [each for each in bins if each["candidates"]]
            colour = LINE_COLOURS[i % len(LINE_COLOURS)]
            (drawn[verifier["values"]],) = above.plot(
                [each["mean_score"] for each in filled],
                [each["mean_value"] for each in filled],
                color=colour,
                marker=LINE_MARKERS[i % len(LINE_MARKERS)],
                markersize=4,
            )
            edges = [bins[0]["from"], *(each["to"] for each in bins)]
            below.stairs([each["candidates"] for each in bins], edges, color=colour, fill=len(verifiers) == 1)
        above.set_title(part)
        above.set_xlim(-0.02, 1.02)  # marks at 0 and 1 stay whole
        above.set_ylim(-0.02, 1.02)
        above.grid(alpha=0.3)
        below.set_xlabel("score")
    axes[0][0].set_ylabel("mean value")
    axes[1][0].set_ylabel("candidates")
    if len(verifiers) > 1:
        figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=2, frameon=False)
    return save_figure(figure, stem)
