"""What can be asked about a picture of the shapes world, and the staged answers.

The forms are the ones that a model of a million parameters learns: a caption that lists every shape
in order, a reasoning that visits every one of them with a running counter, counts in words. (Llama 3
makes " 1" two tokens, the second of which is also that of the cell a1; with digits counting was
learned later by far.)
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import ClassVar, Literal, NamedTuple

from llava_cot_jax.stages import STAGES

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle", "star")
CELLS = tuple(row + column for row in "abc" for column in "123")
"""The cells of the grid in reading order: rows a to c from the top, columns 1 to 3 from the left."""

NUMBERS = ("zero", "one", "two", "three", "four", "five")

DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
"""Steps down and to the right."""

Attribute = Literal["name", "colour", "shape"]
Kind = Literal["look_up", "count", "compare", "relation"]


class Thing(NamedTuple):
    """A coloured shape."""

    colour: str
    shape: str

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


Layout = Mapping[str, Thing]
"""What a picture shows: the things by their cells, in the order of ``CELLS``."""


@dataclass(frozen=True)
class Question(ABC):
    """A question with exactly one true answer for every layout that it admits. Its fields are what it names."""

    kind: ClassVar[Kind]

    @property
    @abstractmethod
    def text(self) -> str: ...

    @property
    @abstractmethod
    def summary(self) -> str: ...

    def admits(self, layout: Layout) -> bool:
        """Whether what the question presupposes is there."""
        return True

    @abstractmethod
    def steps(self, layout: Layout) -> str:
        """The reasoning before its result."""

    @abstractmethod
    def answer(self, layout: Layout) -> str: ...

    def reasoning(self, layout: Layout) -> str:
        return conclude(self.steps(layout), self.answer(layout))


@dataclass(frozen=True)
class LookUp(Question):
    """What is in a cell?"""

    kind = "look_up"
    attribute: Attribute
    cell: str

    @property
    def text(self) -> str:
        return f"{_what(self.attribute)} is at {self.cell}?"

    @property
    def summary(self) -> str:
        return f"find {_sought(self.attribute)} at {self.cell}"

    def admits(self, layout: Layout) -> bool:
        return self.cell in layout

    def steps(self, layout: Layout) -> str:
        return f"{self.cell} {layout[self.cell].name}"

    def answer(self, layout: Layout) -> str:
        return getattr(layout[self.cell], self.attribute)


class Tally(Question):
    """A question that is answered by counting the things of one or two values (colours or shapes)."""

    @property
    @abstractmethod
    def values(self) -> tuple[str, ...]: ...

    @abstractmethod
    def result(self, counts: Sequence[int]) -> str:
        """The answer that follows from the final counts, one of each value."""

    def counters(self, layout: Layout) -> list[list[int]]:
        """The running counts of each value after each thing: [things, values]."""
        things = list(layout.values())
        return [[sum(value in thing for thing in things[: i + 1]) for value in self.values] for i in range(len(things))]

    def visit(self, layout: Layout, counters: Sequence[Sequence[int]]) -> str:
        """Every thing, what of it matters, and the counters [things, values] after it."""
        seen = "colour" if self.values[0] in COLOURS else "shape"
        return " ".join(
            " ".join([cell, getattr(thing, seen), *(NUMBERS[n] for n in counts)])
            for (cell, thing), counts in zip(layout.items(), counters, strict=True)
        )

    def steps(self, layout: Layout) -> str:
        return self.visit(layout, self.counters(layout))

    def answer(self, layout: Layout) -> str:
        return self.result(self.counters(layout)[-1])


@dataclass(frozen=True)
class Count(Tally):
    """How many are there?"""

    kind = "count"
    value: str

    @property
    def values(self) -> tuple[str, ...]:
        return (self.value,)

    @property
    def text(self) -> str:
        return f"How many {_group(self.value)} are there?"

    @property
    def summary(self) -> str:
        return f"count the {_group(self.value)}"

    def result(self, counts: Sequence[int]) -> str:
        return NUMBERS[counts[0]]


@dataclass(frozen=True)
class Compare(Tally):
    """Are there more of one kind than of another?"""

    kind = "compare"
    more: str
    fewer: str

    @property
    def values(self) -> tuple[str, ...]:
        return (self.more, self.fewer)

    @property
    def text(self) -> str:
        return f"Are there more {_group(self.more)} than {_group(self.fewer)}?"

    @property
    def summary(self) -> str:
        return f"compare the {_group(self.more)} and the {_group(self.fewer)}"

    def result(self, counts: Sequence[int]) -> str:
        return "yes" if counts[0] > counts[1] else "no"


@dataclass(frozen=True)
class Relation(Question):
    """What is in the cell next to a thing that the picture has once?"""

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

    def admits(self, layout: Layout) -> bool:
        once = list(layout.values()).count(Thing(self.colour, self.shape)) == 1
        return once and self._places(layout)[1] in layout

    def steps(self, layout: Layout) -> str:
        anchor, beside = self._places(layout)
        side = self.direction.removesuffix(" of")
        return f"{self.colour} {self.shape} {anchor} {side} {beside} {layout[beside].name}"

    def answer(self, layout: Layout) -> str:
        return getattr(layout[self._places(layout)[1]], self.attribute)

    def _places(self, layout: Layout) -> tuple[str, str]:
        """The cell of the thing that is named, and the cell that is meant: none of the grid if it lies outside."""
        anchor = next(cell for cell, thing in layout.items() if thing == (self.colour, self.shape))
        down, right = DIRECTIONS[self.direction]
        return anchor, chr(ord(anchor[0]) + down) + chr(ord(anchor[1]) + right)


ATTRIBUTES: tuple[Attribute, ...] = ("name", "colour", "shape")

QUESTIONS: dict[Kind, tuple[Question, ...]] = {
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
"""Every question there is."""

KINDS = tuple(QUESTIONS)

BALANCED: dict[Kind, tuple[str, ...]] = {"count": NUMBERS[:4], "compare": ("yes", "no")}
"""Answers that are made equally frequent; by chance they would not be. Those of the other kinds are by symmetry."""


def caption(layout: Layout) -> str:
    """Every thing with its cell, in order: says all that there is to say about a layout."""
    return " ".join(f"{cell} {thing.name}" for cell, thing in layout.items())


def tag(stage: str, body: str) -> str:
    """A stage of an answer as LLaVA-CoT writes it."""
    return f"<{stage}> {body} </{stage}>"


def conclude(steps: str, answer: str) -> str:
    """A reasoning: steps, and what they come to."""
    return f"{steps} so {answer}"


def answer_stages(question: Question, layout: Layout) -> dict[str, str]:
    """The four stages of the true answer, tags included, by name in order; a blank line joins them."""
    bodies = (question.summary, caption(layout), question.reasoning(layout), question.answer(layout))
    return {stage: tag(stage, body) for stage, body in zip(STAGES, bodies, strict=True)}


def _what(attribute: Attribute) -> str:
    return "What" if attribute == "name" else f"What {attribute}"


def _sought(attribute: Attribute) -> str:
    return "what is" if attribute == "name" else f"the {attribute}"


def _group(value: str) -> str:
    return f"{value} shapes" if value in COLOURS else f"{value}s"
