"""Rows of the shapes world for a judge: two texts for one stage of an answer, one true and one false.

False texts have the mistakes of a model: a thing that is misread, missed, imagined or in another cell, with all
consequences; a slip in counting; a result that does not follow from the steps; a summary of another question.
"""

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Literal

import numpy as np
from PIL import Image

from llava_cot_jax.data.shapes.questions import (
    BALANCED,
    CELLS,
    COLOURS,
    QUESTION_KINDS,
    QUESTIONS,
    SHAPES,
    GridLayout,
    Question,
    Tally,
    Thing,
    answer_stages,
    caption,
    conclude,
    tag,
)
from llava_cot_jax.data.shapes.rows import FEWEST, MOST, ShapesRows, Split, draw_picture, pick
from llava_cot_jax.stages import STAGES

LayoutChange = Literal["colour", "shape", "cell", "missing", "added"]


@dataclass(frozen=True)
class JudgeRow:
    """A pair of texts for a stage, to choose between.

    Attributes:
        image: Picture, RGB.
        question: Text of the question about the picture.
        context: True stages before this one, tags included, joined by blank lines; empty for the summary.
        stage: Name of the stage, one of ``STAGES``.
        texts: Two texts of the stage, tags included, one true and one false.
        better: Number of the true text, 1 or 2.
    """

    image: Image.Image
    question: str
    context: str
    stage: str
    texts: tuple[str, str]
    better: Literal[1, 2]


@dataclass(frozen=True)
class JudgeRows:
    """Pairs of texts by index, about the pictures and first questions of ``ShapesRows``.

    The stage changes with the index, so that 16 rows in order have every stage of every kind of question. No layout is
    in two splits.

    Attributes:
        split: ``train``, ``validation`` or ``test``.
        seed: Seed of the rows.
        size: Number of rows; None takes that of ``SIZES``. A row does not depend on it.

    Raises:
        UserError: The split is unknown, the seed is negative, or the size is less than one.
    """

    split: Split
    seed: int = 0
    size: int | None = None

    def __post_init__(self) -> None:
        ShapesRows(self.split, self.seed, self.size)

    @property
    def fingerprint(self) -> str:
        """Identification of the content, which changes whenever a row does."""
        return f"judge-{self._rows.fingerprint}"

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> JudgeRow:
        """Make the row at ``index``.

        Raises:
            IndexError: There is no row at ``index``.
        """
        scene = self._rows.scene(index)
        question, layout = scene.questions[0], scene.layout
        stages = answer_stages(question, layout)
        stage = STAGES[index // len(QUESTION_KINDS) % len(STAGES)]
        draw = self._rows.generator(index, purpose=1)
        right, wrong = stages[stage], tag(stage, _corrupt(stage, question, layout, draw))
        context = "\n\n".join(stages[earlier] for earlier in STAGES[: STAGES.index(stage)])
        picture = draw_picture(layout, scene.draw)
        if draw.integers(2):
            return JudgeRow(picture, question.text, context, stage, (wrong, right), 2)
        return JudgeRow(picture, question.text, context, stage, (right, wrong), 1)

    @property
    def _rows(self) -> ShapesRows:
        return ShapesRows(self.split, self.seed, self.size)


def _corrupt(stage: str, question: Question, layout: GridLayout, draw: np.random.Generator) -> str:
    """Make a false body of the stage."""
    match stage:
        case "SUMMARY":
            return _wrong_summary(question, draw)
        case "CAPTION":
            return _misread(caption, question, layout, ("colour", "shape", "cell", "missing", "added"), draw)
        case "REASONING":
            return _wrong_reasoning(question, layout, draw)
        case _:
            return _wrong_answer(question, layout, draw)


def _wrong_summary(question: Question, draw: np.random.Generator) -> str:
    """Return the summary of a question that differs from this one in one value."""
    others = [
        other
        for other in QUESTIONS[question.kind]
        if sum(a != b for a, b in zip(astuple(other), astuple(question), strict=True)) == 1
    ]
    return pick(others, draw).summary


def _wrong_reasoning(question: Question, layout: GridLayout, draw: np.random.Generator) -> str:
    """Make a reasoning that misreads a thing, slips in counting, or ends in a result that its steps do not give."""
    if isinstance(question, Tally) and draw.integers(3) == 0:
        return _miscount(question, layout, draw)
    if draw.integers(2):
        return conclude(question.steps(layout), _wrong_answer(question, layout, draw))
    # No thing is left out, because all remaining steps might be true.
    return _misread(question.reasoning, question, layout, ("colour", "shape", "cell", "added"), draw)


def _wrong_answer(question: Question, layout: GridLayout, draw: np.random.Generator) -> str:
    """Make a wrong answer to the question. In the name of a thing, one word is changed."""
    answer = question.answer(layout)
    if question.kind in BALANCED:
        return pick([other for other in BALANCED[question.kind] if other != answer], draw)
    word = pick(answer.split(), draw)
    return answer.replace(word, _other(COLOURS if word in COLOURS else SHAPES, word, draw))


def _miscount(question: Tally, layout: GridLayout, draw: np.random.Generator) -> str:
    """Make a reasoning that misses a thing in a count, or counts a wrong one, and continues with the wrong counts."""
    things = list(layout.values())
    while True:
        counters = question.counters(layout)
        i, j = int(draw.integers(len(things))), int(draw.integers(len(question.values)))
        for counts in counters[i:]:
            counts[j] += -1 if question.values[j] in things[i] else 1
        if question.result(counters[-1]) in BALANCED[question.kind]:
            return conclude(question.visit(layout, counters), question.result(counters[-1]))


def _misread(
    describe: Callable[[GridLayout], str],
    question: Question,
    layout: GridLayout,
    changes: Sequence[LayoutChange],
    draw: np.random.Generator,
) -> str:
    """Describe the layout after one change with which the question could still be asked."""
    while True:
        misread = _changed(layout, pick(changes, draw), draw)
        if _is_usual(misread, question) and describe(misread) != describe(layout):
            return describe(misread)


def _is_usual(layout: GridLayout, question: Question) -> bool:
    """Whether a row could have this layout and question. An impossible layout would reveal a false text."""
    if not FEWEST <= len(layout) <= MOST or not question.admits(layout):
        return False
    return question.kind not in BALANCED or question.answer(layout) in BALANCED[question.kind]


def _changed(layout: GridLayout, change: LayoutChange, draw: np.random.Generator) -> GridLayout:
    """Return the layout after a change of one random thing, or with one more thing."""
    cell = pick(list(layout), draw)
    free = pick([cell for cell in CELLS if cell not in layout], draw)
    things = dict(layout)
    thing = things.pop(cell)
    match change:
        case "colour":
            things[cell] = thing._replace(colour=_other(COLOURS, thing.colour, draw))
        case "shape":
            things[cell] = thing._replace(shape=_other(SHAPES, thing.shape, draw))
        case "cell":
            things[free] = thing
        case "added":
            things |= {cell: thing, free: Thing(pick(COLOURS, draw), pick(SHAPES, draw))}
        case "missing":
            pass
    return {cell: things[cell] for cell in CELLS if cell in things}


def _other(values: Sequence[str], value: str, draw: np.random.Generator) -> str:
    return pick([other for other in values if other != value], draw)
