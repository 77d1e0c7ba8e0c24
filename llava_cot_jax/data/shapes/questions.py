"""Questions about a picture of the shapes world, and their staged answers.

The texts have forms that a model of a million parameters can learn: a caption that lists every shape in order, and a
reasoning that visits every shape with a running counter. Counts are written in words, because Llama 3's tokenizer
splits " 1" into two tokens, the second of which also occurs in the cell a1; with digits, counting was learned much
later.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import ClassVar, Literal, NamedTuple

from llava_cot_jax.stage_format import STAGES

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle", "star")
CELLS = tuple(row + column for row in "abc" for column in "123")
"""Cells of the grid in reading order: rows a to c from the top, columns 1 to 3 from the left."""

NUMBERS = ("zero", "one", "two", "three", "four", "five")

DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
"""Steps down and to the right that lead to the neighbour in each direction."""

Attribute = Literal["name", "colour", "shape"]
QuestionKind = Literal["look_up", "count", "compare", "relation"]


class Thing(NamedTuple):
    """A coloured shape."""

    colour: str
    shape: str

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


GridLayout = Mapping[str, Thing]
"""Content of a picture: the things by their cells, in the order of ``CELLS``."""


@dataclass(frozen=True)
class ShapesQuestion(ABC):
    """A question with exactly one true answer for every layout that it admits.

    The fields of a subclass are the values that the question names.
    """

    kind: ClassVar[QuestionKind]

    @property
    @abstractmethod
    def text(self) -> str: ...

    @property
    @abstractmethod
    def summary(self) -> str: ...

    def admits(self, layout: GridLayout) -> bool:
        """Whether the layout has everything that the question presupposes."""
        return True

    @abstractmethod
    def steps(self, layout: GridLayout) -> str:
        """Return the reasoning without its result."""

    @abstractmethod
    def answer(self, layout: GridLayout) -> str: ...

    def reasoning(self, layout: GridLayout) -> str:
        return conclude(self.steps(layout), self.answer(layout))


@dataclass(frozen=True)
class LookUp(ShapesQuestion):
    """A question for the content of a cell."""

    kind = "look_up"
    attribute: Attribute
    cell: str

    @property
    def text(self) -> str:
        return f"{_what(self.attribute)} is at {self.cell}?"

    @property
    def summary(self) -> str:
        return f"find {_sought(self.attribute)} at {self.cell}"

    def admits(self, layout: GridLayout) -> bool:
        return self.cell in layout

    def steps(self, layout: GridLayout) -> str:
        return f"{self.cell} {layout[self.cell].name}"

    def answer(self, layout: GridLayout) -> str:
        return getattr(layout[self.cell], self.attribute)


class Tally(ShapesQuestion):
    """A question that is answered by counting the things of one or two colours or shapes."""

    @property
    @abstractmethod
    def values(self) -> tuple[str, ...]: ...

    @abstractmethod
    def result(self, counts: Sequence[int]) -> str:
        """Return the answer that follows from the final counts, one for each value."""

    def counters(self, layout: GridLayout) -> list[list[int]]:
        """Return the running counts of each value after each thing, [things, values]."""
        things = list(layout.values())
        return [[sum(value in thing for thing in things[: i + 1]) for value in self.values] for i in range(len(things))]

    def visit(self, layout: GridLayout, counters: Sequence[Sequence[int]]) -> str:
        """List each thing with its relevant attribute and the counters after it.

        Args:
            layout: Content of the picture.
            counters: Running counts, [things, values].
        """
        seen = "colour" if self.values[0] in COLOURS else "shape"
        return " ".join(
            " ".join([cell, getattr(thing, seen), *(NUMBERS[n] for n in counts)])
            for (cell, thing), counts in zip(layout.items(), counters, strict=True)
        )

    def steps(self, layout: GridLayout) -> str:
        return self.visit(layout, self.counters(layout))

    def answer(self, layout: GridLayout) -> str:
        return self.result(self.counters(layout)[-1])


@dataclass(frozen=True)
class Count(Tally):
    """A question for the number of things of a colour or shape."""

    kind = "count"
    value: str

    @property
    def values(self) -> tuple[str, ...]:
        return (self.value,)

    @property
    def text(self) -> str:
        return f"How many {_group_name(self.value)} are there?"

    @property
    def summary(self) -> str:
        return f"count the {_group_name(self.value)}"

    def result(self, counts: Sequence[int]) -> str:
        return NUMBERS[counts[0]]


@dataclass(frozen=True)
class Compare(Tally):
    """A question whether there are more things of one colour or shape than of another."""

    kind = "compare"
    more: str
    fewer: str

    @property
    def values(self) -> tuple[str, ...]:
        return (self.more, self.fewer)

    @property
    def text(self) -> str:
        return f"Are there more {_group_name(self.more)} than {_group_name(self.fewer)}?"

    @property
    def summary(self) -> str:
        return f"compare the {_group_name(self.more)} and the {_group_name(self.fewer)}"

    def result(self, counts: Sequence[int]) -> str:
        return "yes" if counts[0] > counts[1] else "no"


@dataclass(frozen=True)
class Relation(ShapesQuestion):
    """A question for the content of the cell next to a thing that occurs once in the picture."""

    kind = "relation"
    attribute: Attribute
    direction: str
    colour: str
    shape: str

    @property
    def text(self) -> str:
        return f"{_what(self.attribute)} is directly {self.direction} the {self.colour} {self.shape}?"

    @property
    def summary(self) -> str:
        return f"find {_sought(self.attribute)} {self.direction} the {self.colour} {self.shape}"

    def admits(self, layout: GridLayout) -> bool:
        once = list(layout.values()).count(Thing(self.colour, self.shape)) == 1
        return once and self._places(layout)[1] in layout

    def steps(self, layout: GridLayout) -> str:
        anchor, beside = self._places(layout)
        side = self.direction.removesuffix(" of")
        return f"{self.colour} {self.shape} {anchor} {side} {beside} {layout[beside].name}"

    def answer(self, layout: GridLayout) -> str:
        return getattr(layout[self._places(layout)[1]], self.attribute)

    def _places(self, layout: GridLayout) -> tuple[str, str]:
        """Return the cell of the named thing and its neighbour, which may lie outside the grid."""
        anchor = next(cell for cell, thing in layout.items() if thing == (self.colour, self.shape))
        down, right = DIRECTIONS[self.direction]
        return anchor, chr(ord(anchor[0]) + down) + chr(ord(anchor[1]) + right)


ATTRIBUTES: tuple[Attribute, ...] = ("name", "colour", "shape")

QUESTIONS: dict[QuestionKind, tuple[ShapesQuestion, ...]] = {
    "look_up": tuple(LookUp(attribute, cell) for attribute in ATTRIBUTES for cell in CELLS),
    "count": tuple(Count(value) for value in COLOURS + SHAPES),
    "compare": tuple(Compare(*pair) for values in (COLOURS, SHAPES) for pair in permutations(values, 2)),
    "relation": tuple(
        Relation(attribute, direction, colour, shape)
        for attribute in ATTRIBUTES
        for direction in DIRECTIONS
        for colour in COLOURS
        for shape in SHAPES
    ),
}
"""All questions of each kind."""

QUESTION_KINDS = tuple(QUESTIONS)

BALANCED: dict[QuestionKind, tuple[str, ...]] = {"count": NUMBERS[:4], "compare": ("yes", "no")}
"""Answers that are drawn equally often. For the other kinds of question, symmetry alone makes them equally frequent."""


def caption(layout: GridLayout) -> str:
    """Return the caption, which describes a layout completely: every cell with its thing, in order."""
    return " ".join(f"{cell} {thing.name}" for cell, thing in layout.items())


def tag(stage: str, body: str) -> str:
    """Return a stage of an answer with its tags, as LLaVA-CoT writes it."""
    return f"<{stage}> {body} </{stage}>"


def conclude(steps: str, answer: str) -> str:
    """Return the reasoning with these steps and their result."""
    return f"{steps} so {answer}"


def answer_stages(question: ShapesQuestion, layout: GridLayout) -> dict[str, str]:
    """Return the four stages of the true answer by name, in order and tags included."""
    bodies = (question.summary, caption(layout), question.reasoning(layout), question.answer(layout))
    return {stage: tag(stage, body) for stage, body in zip(STAGES, bodies, strict=True)}


def _what(attribute: Attribute) -> str:
    return "What" if attribute == "name" else f"What {attribute}"


def _sought(attribute: Attribute) -> str:
    return "what is" if attribute == "name" else f"the {attribute}"


def _group_name(value: str) -> str:
    return f"{value} shapes" if value in COLOURS else f"{value}s"
