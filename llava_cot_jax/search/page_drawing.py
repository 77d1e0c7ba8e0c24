"""Drawing of a search on a page: candidates, each joined to the one that it continues."""

from typing import Any

from llava_cot_jax.search import wording
from llava_cot_jax.search.trace import Trace

COLUMN_WIDTH, ROW_HEIGHT, NODE_RADIUS, HEADING_HEIGHT, ROUND_HEADING_HEIGHT = 108, 32, 12, 28, 20
"""Sizes in the drawing of a search, in pixels: width of a stage, height of a candidate, its circle, the headings of
stages, and the heading of a round."""


def tree_view(trace: Trace) -> dict[str, Any]:
    """Return the drawing of a search: candidates, each joined to the one that it continues.

    Stages are side by side, and the rounds of a retracing search one below the other.
    """
    columns = list(dict.fromkeys(stage.stage for stage in trace.stages))
    column_x = {name: NODE_RADIUS + (i + 0.62) * COLUMN_WIDTH for i, name in enumerate(columns)}
    middles, bottom = _middles(trace)
    places: dict[tuple[int, int] | None, tuple[float, float]] = {None: (NODE_RADIUS, middles[0])}
    for i, stage in enumerate(trace.stages):
        top = middles[stage.round] - (len(stage.candidates) - 1) * ROW_HEIGHT / 2
        for j in range(len(stage.candidates)):
            places[i, j] = (column_x[stage.stage], top + j * ROW_HEIGHT)
    won = trace.winners
    nodes = [
        {
            "number": at[1] + 1,
            "x": x,
            "y": y,
            "won": at in won,
            "line": _curve(places[trace.parent_of(*at)], (x, y)),
        }
        for at, (x, y) in places.items()
        if at is not None
    ]
    nodes.sort(key=lambda node: bool(node["won"]))  # the winners' lines are drawn over the others
    labels = [
        {"text": f"round {stage.round}", "x": places[i, 0][0], "y": places[i, 0][1] - NODE_RADIUS - 4}
        for i, stage in enumerate(trace.stages)
        if stage.round
    ]
    return {
        "width": NODE_RADIUS + (len(columns) + 0.12) * COLUMN_WIDTH,
        "height": bottom,
        "start": middles[0],
        "heads": [{"text": wording.name_title(name), "x": x, "y": 14} for name, x in column_x.items()],
        "labels": labels,
        "nodes": nodes,
        "path": " then ".join(f"{wording.stage_title(trace.stages[place])} {number + 1}" for place, number in won),
    }


def _middles(trace: Trace) -> tuple[dict[int, float], int]:
    """Return the height at which the candidates of each round, and those outside of rounds (0), lie, and the bottom."""
    most: dict[int, int] = {}
    for stage in trace.stages:
        most[stage.round] = max(most.get(stage.round, 0), len(stage.candidates))
    middles, bottom = dict[int, float](), HEADING_HEIGHT
    for number in sorted(most.keys() - {0}):
        middles[number] = bottom + ROUND_HEADING_HEIGHT + most[number] * ROW_HEIGHT / 2
        bottom += ROUND_HEADING_HEIGHT + most[number] * ROW_HEIGHT
    bottom = max(bottom, HEADING_HEIGHT + most.get(0, 0) * ROW_HEIGHT)
    middles[0] = (HEADING_HEIGHT + bottom) / 2
    return middles, bottom


def _curve(start: tuple[float, float], end: tuple[float, float]) -> str:
    """Return the SVG path of a curve from ``start`` to ``end`` that is level at both ends."""
    (x0, y0), (x1, y1) = start, end
    bend = (x0 + x1) / 2
    return f"M{x0:.0f} {y0:.0f}C{bend:.0f} {y0:.0f} {bend:.0f} {y1:.0f} {x1:.0f} {y1:.0f}"
