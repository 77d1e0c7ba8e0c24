"""A page that shows whole searches: one HTML file that needs nothing outside itself."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from llava_cot_jax.files import write_text
from llava_cot_jax.processing.images import ImageSource, open_image
from llava_cot_jax.search import wording
from llava_cot_jax.search.prompts import WHOLE
from llava_cot_jax.search.trace import CandidateTrace, MatchTrace, StageTrace, Trace, VerdictTrace

TEMPLATE = Path(__file__).with_name("page.html.jinja")

TITLE = "Answers by search"

SMALL_SIDE = 200
"""Images whose longer side has fewer pixels are shown enlarged, each pixel as a square."""

ENLARGED_SIDE, LARGEST_SIDE = 240, 1024
"""Pixels that the longer side of a small image is enlarged to, and those that a large image keeps."""

UNFOLDED = 3
"""Pages of at most this many questions show all candidates at once; longer ones show winners until unfolded."""

LONG_TEXT = 500
"""Characters of a text from which on it scrolls, unless it won."""

COLUMN, ROW, RADIUS, HEAD = 108, 32, 12, 28
"""The tree of a search in pixels: distances of stages and candidates, a candidate's circle, and the headings."""


@dataclass(frozen=True)
class Entry:
    """A question of a page.

    Attributes:
        trace: the search for its answer.
        images: the images that the question is about.
        right_answer: the known answer.
        correct: whether the conclusion is right; by default, whether it equals ``right_answer`` but for case, spacing
            and punctuation at the ends.
    """

    trace: Trace
    images: Sequence[ImageSource] = ()
    right_answer: str | None = None
    correct: bool | None = None


def write_page(path: Path, entries: Sequence[Entry], facts: Mapping[str, object], title: str = TITLE) -> None:
    """Write a page of searches into one HTML file, whole or not at all. Missing folders are made.

    Args:
        path: the file.
        entries: the questions in the order of the page.
        facts: what the header says, by name: model, settings, date, versions.
        title: the heading of the page.

    Raises:
        UserError: the disk refuses the file, or an image cannot be read.
    """
    write_text(path, render_page(entries, facts, title))


def render_page(entries: Sequence[Entry], facts: Mapping[str, object], title: str = TITLE) -> str:
    """The HTML of a page; arguments and errors as for ``write_page``."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"printable": wording.printable, "short": wording.short_count}
    views = [_entry(number, entry) for number, entry in enumerate(entries, start=1)]
    known = [view["correct"] for view in views if view["correct"] is not None]
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        title=title,
        facts={name: str(value) for name, value in facts.items()},
        entries=views,
        known=len(known),
        right=sum(known),
        staged=any(entry.trace.stages[0].stage != WHOLE for entry in entries),
        unfolded=len(views) <= UNFOLDED,
    )


def _entry(number: int, entry: Entry) -> dict[str, Any]:
    """What the template shows of a question."""
    trace = entry.trace
    conclusion = wording.conclusion_of(trace)
    correct = entry.correct
    if correct is None and entry.right_answer is not None:
        correct = wording.agrees(conclusion, entry.right_answer)
    images = [_embed(open_image(image)) for image in entry.images]
    return {
        "number": number,
        "question": trace.question.strip(),
        "images": images,
        "conclusion": conclusion,
        "right_answer": entry.right_answer,
        "correct": correct,
        "stages": [_stage(stage, trace) for stage in trace.stages],
        "tree": _tree(trace) if any(len(stage.candidates) > 1 for stage in trace.stages) else None,
        "seed": trace.seed,
        "strategy": trace.strategy,
        "seconds": trace.seconds,
        "costs": _costs(trace),
        "tokens": sum(trace.tokens.values()),
        "flops": sum(trace.flops.values()),
        "total_seconds": sum(trace.seconds.values()),
    }


def _stage(stage: StageTrace, trace: Trace) -> dict[str, Any]:
    checks = {check.first: _verdict(check) for check in stage.checks}
    candidates = [_candidate(i, one, stage, checks.get(i)) for i, one in enumerate(stage.candidates)]
    rounds = wording.rounds_of(stage)
    return {
        "title": wording.stage_title(stage),
        "chosen": wording.how_chosen(stage, trace.strategy),
        "candidates": candidates,
        "winner": candidates[stage.winner],
        "rounds": [
            {"name": _round_name(i, len(rounds)), "matches": [_match(m) for m in matches], "through": through}
            for i, (matches, through) in enumerate(rounds)
        ],
    }


def _candidate(i: int, candidate: CandidateTrace, stage: StageTrace, check: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "number": i + 1,
        "won": i == stage.winner and len(stage.candidates) > 1,
        "parts": wording.split_tags(candidate.text, stage.stage),
        "long": len(candidate.text) > LONG_TEXT,
        "added": candidate.added,
        "mean": _minus(wording.log_prob(candidate.mean_log_probability)),
        "same_as": next((j + 1 for j in range(i) if stage.candidates[j].text == candidate.text), None),
        "percent": _percent(math.exp(min(candidate.mean_log_probability, 0.0))),
        "tokens": wording.counted(candidate.tokens, "token"),
        "ended": wording.ENDINGS.get(candidate.ended, candidate.ended),
        "cut": candidate.ended == "budget",
        "check": check,
    }


def _match(match: MatchTrace) -> dict[str, Any]:
    return {
        "first": match.first + 1,
        "second": match.second + 1,
        "winner": match.winner + 1,
        "side": "right" if match.margin > 0 else "left",
        "length": _percent(abs(match.margin)) / 2,
        "decided": wording.DECIDED_BY.get(match.decision, match.decision),
        "result": _minus(wording.match_result(match).replace("->", "\N{RIGHTWARDS ARROW}")),
        "verdicts": [_verdict(verdict) for verdict in match.verdicts],
    }


def _verdict(verdict: VerdictTrace) -> dict[str, Any]:
    return {
        "line": _minus(wording.verdict_result(verdict)),
        "neither": wording.neither(verdict),
        "weak": verdict.outside is not None and verdict.outside > 0.5,  # the judge hardly spoke of the candidates
        "reason": verdict.reason,
    }


def _round_name(i: int, count: int) -> str:
    return "Final" if i == count - 1 else f"Round {i + 1}"


def _costs(trace: Trace) -> list[dict[str, Any]]:
    """Tokens and FLOPs of each part of a search, with the part's share of the FLOPs in percent."""
    total = max(sum(trace.flops.values()), 1)
    return [
        {
            "part": part,
            "tokens": trace.tokens.get(part),
            "flops": trace.flops.get(part, 0),
            "percent": _percent(trace.flops.get(part, 0) / total),
        }
        for part in dict.fromkeys((*trace.flops, *trace.tokens))
        if trace.flops.get(part) or trace.tokens.get(part)
    ]


def _tree(trace: Trace) -> dict[str, Any]:
    """The tree of a search as an SVG shows it: a column of candidates for each stage, each after the last winner."""
    most = max(len(stage.candidates) for stage in trace.stages)
    height = HEAD + most * ROW
    columns = []
    before: tuple[float, float] = (RADIUS, HEAD + most * ROW / 2)
    for i, stage in enumerate(trace.stages):
        x, top = RADIUS + (i + 0.62) * COLUMN, HEAD + (most - len(stage.candidates) + 1) * ROW / 2
        places = [(x, top + j * ROW) for j in range(len(stage.candidates))]
        nodes = [
            {"number": j + 1, "x": x, "y": y, "won": j == stage.winner, "line": _curve(before, (x, y))}
            for j, (x, y) in enumerate(places)
        ]
        nodes.sort(key=lambda node: bool(node["won"]))  # the winner's line is drawn over the others
        columns.append({"title": wording.stage_title(stage), "x": x, "nodes": nodes})
        before = places[stage.winner]
    path = " then ".join(f"{wording.stage_title(stage)} {stage.winner + 1}" for stage in trace.stages)
    width = RADIUS + (len(trace.stages) - 0.38) * COLUMN + COLUMN / 2
    return {"width": width, "height": height, "start": HEAD + most * ROW / 2, "columns": columns, "path": path}


def _curve(start: tuple[float, float], end: tuple[float, float]) -> str:
    """A line that leaves ``start`` and reaches ``end`` level."""
    (x0, y0), (x1, y1) = start, end
    bend = (x0 + x1) / 2
    return f"M{x0:.0f} {y0:.0f}C{bend:.0f} {y0:.0f} {bend:.0f} {y1:.0f} {x1:.0f} {y1:.0f}"


def _embed(image: Image.Image) -> dict[str, Any]:
    """An image as a data URI with the size that it is shown at."""
    width, height = image.size
    small = max(width, height) < SMALL_SIDE
    scale = max(ENLARGED_SIDE // max(width, height), 1) if small else 1
    file = io.BytesIO()
    if small:
        image.save(file, "PNG")
    else:
        image = image.copy()
        image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
        image.save(file, "JPEG", quality=88)
    uri = f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"
    shown = {"uri": uri, "width": image.width * scale, "height": image.height * scale}
    return shown | {"small": small, "pixels": f"{width} x {height}"}


def _minus(text: str) -> str:
    """A text of numbers with real minus signs, which are as wide as digits."""
    return text.replace("-", "\N{MINUS SIGN}")


def _percent(share: float) -> float:
    """A share of 1 as a percentage that a length can be given by, whatever the share."""
    return round(100 * min(max(share, 0.0), 1.0), 1) if math.isfinite(share) else 0.0
