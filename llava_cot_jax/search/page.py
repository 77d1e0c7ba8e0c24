"""An HTML page that shows whole searches, in one file that loads nothing else."""

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
from llava_cot_jax.paths import writing_errors
from llava_cot_jax.processing.images import ImageSource, open_image
from llava_cot_jax.search import wording
from llava_cot_jax.search.prompts import WHOLE_ANSWER
from llava_cot_jax.search.trace import CandidateTrace, MatchTrace, StageTrace, Trace, VerdictTrace
from llava_cot_jax.stage_format import StageFormat

TEMPLATE = Path(__file__).with_name("page.html.jinja")

DEFAULT_TITLE = "Answers by search"

SMALL_IMAGE_SIDE = 200
"""Longer side, in pixels, below which an image is shown enlarged, each pixel as a square."""

ENLARGED_IMAGE_SIDE, LARGEST_IMAGE_SIDE = 240, 1024
"""Longer side, in pixels, of an enlarged image and of the largest image."""

MAX_UNFOLDED_QUESTIONS = 3
"""Number of questions up to which a page shows all candidates at once. Longer pages show winners until unfolded."""

LONG_TEXT_CHARACTERS = 500
"""Length of a text, in characters, above which it scrolls unless it is the winner's."""

COLUMN_WIDTH, ROW_HEIGHT, NODE_RADIUS, HEADING_HEIGHT, ROUND_HEADING_HEIGHT = 108, 32, 12, 28, 20
"""Sizes in the drawing of a search, in pixels: width of a stage, height of a candidate, its circle, the headings of
stages, and the heading of a round."""


@dataclass(frozen=True)
class PageEntry:
    """A question on a page.

    Attributes:
        trace: Trace of the search for the answer.
        images: Images that the question is about.
        right_answer: Right answer, if it is known.
        correct: Whether the conclusion is right. By default, whether it equals ``right_answer`` apart from case,
            spacing, and punctuation at the ends.
    """

    trace: Trace
    images: Sequence[ImageSource] = ()
    right_answer: str | None = None
    correct: bool | None = None


def write_page(
    path: Path, entries: Sequence[PageEntry], facts: Mapping[str, object], title: str = DEFAULT_TITLE
) -> None:
    """Write a page of searches to an HTML file, whole or not at all. Missing folders are made.

    Args:
        path: The file.
        entries: Questions in the order of the page.
        facts: Facts for the page's header, by name, such as the model and the date.
        title: Heading of the page.

    Raises:
        UserError: The file cannot be written, or an image cannot be read.
    """
    page = render_page(entries, facts, title)
    with writing_errors(path):
        write_text(path, page)


def render_page(entries: Sequence[PageEntry], facts: Mapping[str, object], title: str = DEFAULT_TITLE) -> str:
    """Return the HTML of a page. Arguments and errors are those of ``write_page``."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"printable": wording.printable, "short": wording.short_count}
    views = [_entry_view(number, entry) for number, entry in enumerate(entries, start=1)]
    known = [view["correct"] for view in views if view["correct"] is not None]
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        title=title,
        facts={name: str(value) for name, value in facts.items()},
        entries=views,
        known=len(known),
        right=sum(known),
        lead=_lead([entry.trace for entry in entries]),
        retraces=any(_retraces(entry.trace) for entry in entries),
        unfolded=len(views) <= MAX_UNFOLDED_QUESTIONS,
    )


def _lead(traces: Sequence[Trace]) -> str:
    """Return what was searched for and how, for searches by one strategy."""
    start = f"A vision-language model answered {'each question' if len(traces) > 1 else 'a question'}"
    if not traces or traces[0].stages[0].stage == WHOLE_ANSWER:
        return f"{start}. This page shows every answer that it generated, and why the winner won."
    if _retraces(traces[0]):
        return (
            f"{start} in stages and in rounds, of which there was another as long as its reasonings were weak. In each "
            "round it generated captions, and reasonings after the best of these; in the end, a conclusion after each "
            "of the best reasonings of all rounds. This page shows all of them, what each continues, and which won."
        )
    how, each = ("in stages", "stage") if traces[0].whole_text is None else ("sentence by sentence", "sentence")
    return (
        f"{start} {how}. For each {each} it generated candidates, and only the winner was continued in the next one. "
        "This page shows all of them, and why each winner won."
    )


def _retraces(trace: Trace) -> bool:
    """Whether a search had rounds of captions and reasonings, of which several are continued."""
    return any(stage.round for stage in trace.stages)


def _entry_view(number: int, entry: PageEntry) -> dict[str, Any]:
    """Return the values that the template shows for a question."""
    trace = entry.trace
    conclusion = wording.conclusion_of(trace)
    correct = entry.correct
    if correct is None and entry.right_answer is not None:
        correct = wording.agrees(conclusion, entry.right_answer)
    images = [_embedded_image(open_image(image)) for image in entry.images]
    return {
        "number": number,
        "question": trace.question.strip(),
        "images": images,
        "conclusion": conclusion,
        "right_answer": entry.right_answer,
        "correct": correct,
        "stages": [_stage_view(place, trace) for place in range(len(trace.stages))],
        "tree": _tree_view(trace) if any(len(stage.candidates) > 1 for stage in trace.stages) else None,
        "seed": trace.seed,
        "strategy": trace.strategy,
        "seconds": trace.seconds,
        "costs": _costs_view(trace),
        "tokens": sum(trace.tokens.values()),
        "flops": sum(trace.flops.values()),
        "total_seconds": sum(trace.seconds.values()),
    }


def _stage_view(place: int, trace: Trace) -> dict[str, Any]:
    stage = trace.stages[place]
    standings = wording.standings(trace, place) if len(stage.candidates) > 1 else [""]
    checks = {check.first: _verdict_view(check) for check in stage.checks}
    candidates = [
        _candidate_view(i, one, stage, standings[i], checks.get(i), trace.format)
        for i, one in enumerate(stage.candidates)
    ]
    rounds = wording.rounds_of(stage)
    return {
        "title": wording.stage_title(stage),
        "chosen": wording.how_chosen(stage, trace.strategy),
        "candidates": candidates,
        "winner": candidates[stage.winner],
        "rounds": [
            {"name": _round_name(i, len(rounds)), "matches": [_match_view(m) for m in matches], "through": through}
            for i, (matches, through) in enumerate(rounds)
        ],
    }


def _candidate_view(
    i: int,
    candidate: CandidateTrace,
    stage: StageTrace,
    standing: str,
    check: dict[str, Any] | None,
    format: StageFormat,
) -> dict[str, Any]:
    return {
        "number": i + 1,
        "standing": standing,
        "won": standing == "winner",
        "origin": wording.origin(candidate),
        "parts": wording.split_tags(candidate.text, format),
        "long": len(candidate.text) > LONG_TEXT_CHARACTERS,
        "added": candidate.added,
        "mean": _minus(wording.log_prob(candidate.mean_log_prob)),
        "score": wording.score(candidate),
        "score_percent": _percent(candidate.score or 0.0) if wording.score(candidate) else "",
        "own_score": wording.own_score(candidate, stage),
        "same_as": next((j + 1 for j in range(i) if stage.candidates[j].text == candidate.text), None),
        "percent": _percent(math.exp(min(candidate.mean_log_prob, 0.0))),
        "tokens": wording.counted(candidate.tokens, "token"),
        "ended": wording.ENDINGS.get(candidate.ended, candidate.ended),
        "cut": candidate.ended == "max_new_tokens",
        "check": check,
    }


def _match_view(match: MatchTrace) -> dict[str, Any]:
    return {
        "first": match.first + 1,
        "second": match.second + 1,
        "winner": match.winner + 1,
        "side": "right" if match.margin > 0 else "left",
        "length": _percent(abs(match.margin)) / 2,
        "decided": wording.DECIDED_BY.get(match.decision, match.decision),
        "result": _minus(wording.match_result(match).replace("->", "\N{RIGHTWARDS ARROW}")),
        "verdicts": [_verdict_view(verdict) for verdict in match.verdicts],
    }


def _verdict_view(verdict: VerdictTrace) -> dict[str, Any]:
    return {
        "line": _minus(wording.verdict_result(verdict)),
        "neither": wording.neither_share(verdict),
        "weak": verdict.other_probability is not None
        and verdict.other_probability > 0.5,  # mostly on neither candidate
        "reason": verdict.reason,
    }


def _round_name(i: int, count: int) -> str:
    return "Final" if i == count - 1 else f"Round {i + 1}"


def _costs_view(trace: Trace) -> list[dict[str, Any]]:
    """Return tokens and FLOPs of each part of a search, and its share of the FLOPs in percent."""
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


def _tree_view(trace: Trace) -> dict[str, Any]:
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


def _embedded_image(image: Image.Image) -> dict[str, Any]:
    """Return an image as a data URI, with the size at which it is shown."""
    width, height = image.size
    small = max(width, height) < SMALL_IMAGE_SIDE
    scale = max(ENLARGED_IMAGE_SIDE // max(width, height), 1) if small else 1
    file = io.BytesIO()
    if small:
        image.save(file, "PNG")
    else:
        image = image.copy()
        image.thumbnail((LARGEST_IMAGE_SIDE, LARGEST_IMAGE_SIDE))
        image.save(file, "JPEG", quality=88)
    uri = f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"
    shown = {"uri": uri, "width": image.width * scale, "height": image.height * scale}
    return shown | {"small": small, "pixels": f"{width} x {height}"}


def _minus(text: str) -> str:
    """Return ``text`` with minus signs in place of hyphens, as they are as wide as digits."""
    return text.replace("-", "\N{MINUS SIGN}")


def _percent(fraction: float) -> float:
    """Return a fraction as a percentage from 0 to 100, and 0 for one that is not finite."""
    return round(100 * min(max(fraction, 0.0), 1.0), 1) if math.isfinite(fraction) else 0.0
