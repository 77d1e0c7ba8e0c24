"""Rows of the shapes world for a judge: two texts for one stage of an answer, one of them true, one false.

What is wrong is what a model gets wrong: a thing misread, missed, imagined or put elsewhere, and all
that follows from it; a slip while counting; a result that the steps do not give; another question.
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
    KINDS,
    QUESTIONS,
    SHAPES,
    Layout,
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

Change = Literal["colour", "shape", "cell", "missing", "added"]


@dataclass(frozen=True)
class JudgeRow:
    """Two texts for a stage, to choose between.

    Attributes:
        image: the picture, RGB.
        question: what is asked about it.
        context: the true stages before this one, tags included, joined by blank lines; empty for the summary.
        stage: one of ``STAGES``.
        texts: the stage, tags included, once true and once false.
        better: which of them is true, 1 or 2.
    """

    image: Image.Image
    question: str
    context: str
    stage: str
    texts: tuple[str, str]
    better: Literal[1, 2]


@dataclass(frozen=True)
class JudgeRows:
    """Pairs by index, about the pictures and first questions of ``ShapesRows``.

    The stage goes round with the index, so that 16 rows in order have every stage of every kind of
    question. No layout is in two splits.

    Attributes:
        split, seed, size: as for ``ShapesRows``.

    Raises:
        UserError: as for ``ShapesRows``.
    """

    split: Split
    seed: int = 0
    size: int | None = None

    def __post_init__(self) -> None:
        ShapesRows(self.split, self.seed, self.size)

    @property
    def fingerprint(self) -> str:
        """Changes whenever a row does."""
        return f"judge-{self._rows.fingerprint}"

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> JudgeRow:
        """The row at ``index``, which counts from 0; IndexError beyond the last."""
        scene = self._rows.scene(index)
        question, layout = scene.questions[0], scene.layout
        stages = answer_stages(question, layout)
        stage = STAGES[index // len(KINDS) % len(STAGES)]
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


def _corrupt(stage: str, question: Question, layout: Layout, draw: np.random.Generator) -> str:
    """A false body of the stage."""
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
    """That of a question which differs in one thing that it names."""
    others = [
        other
        for other in QUESTIONS[question.kind]
        if sum(a != b for a, b in zip(astuple(other), astuple(question), strict=True)) == 1
    ]
    return pick(others, draw).summary


def _wrong_reasoning(question: Question, layout: Layout, draw: np.random.Generator) -> str:
    """One that misreads a thing, slips in counting, or ends in another result than its steps give."""
    if isinstance(question, Tally) and draw.integers(3) == 0:
        return _miscount(question, layout, draw)
    if draw.integers(2):
        return conclude(question.steps(layout), _wrong_answer(question, layout, draw))
    # Nothing is left out: what remained might all be true.
    return _misread(question.reasoning, question, layout, ("colour", "shape", "cell", "added"), draw)


def _wrong_answer(question: Question, layout: Layout, draw: np.random.Generator) -> str:
    """Another answer to the question: of a thing's name, one word is another."""
    answer = question.answer(layout)
    if question.kind in BALANCED:
        return pick([other for other in BALANCED[question.kind] if other != answer], draw)
    word = pick(answer.split(), draw)
    return answer.replace(word, _other(COLOURS if word in COLOURS else SHAPES, word, draw))


def _miscount(question: Tally, layout: Layout, draw: np.random.Generator) -> str:
    """A reasoning that leaves a thing out of a count, or counts one that does not belong, and goes on from there."""
    things = list(layout.values())
    while True:
        counters = question.counters(layout)
        i, j = int(draw.integers(len(things))), int(draw.integers(len(question.values)))
        for counts in counters[i:]:
            counts[j] += -1 if question.values[j] in things[i] else 1
        if question.result(counters[-1]) in BALANCED[question.kind]:
            return conclude(question.visit(layout, counters), question.result(counters[-1]))


def _misread(
    describe: Callable[[Layout], str],
    question: Question,
    layout: Layout,
    changes: Sequence[Change],
    draw: np.random.Generator,
) -> str:
    """What ``describe`` says of a layout with one change, about which the question could still be asked."""
    while True:
        misread = _changed(layout, pick(changes, draw), draw)
        if _is_usual(misread, question) and describe(misread) != describe(layout):
            return describe(misread)


def _is_usual(layout: Layout, question: Question) -> bool:
    """Whether a row could have this layout and question: what no row has would give a false text away."""
    if not FEWEST <= len(layout) <= MOST or not question.admits(layout):
        return False
    return question.kind not in BALANCED or question.answer(layout) in BALANCED[question.kind]


def _changed(layout: Layout, change: Change, draw: np.random.Generator) -> Layout:
    """The layout after the change of a random thing, or with one more."""
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
