"""The shapes world: pictures of coloured shapes on a grid, with questions and staged answers, made from a seed.

The rows have the form of LLaVA-CoT-100k and can be made in any number; a model of a million parameters learns them in
minutes on a CPU. A picture has 48 x 48 pixels: a 3 x 3 grid of cells (``questions.CELLS``) with 3 to 5 shapes in them.
The content of a row depends on the split, the seed and the index alone.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeVar, get_args

import numpy as np
from PIL import Image, ImageDraw

from llava_cot_jax.data.rows import Row, Turn
from llava_cot_jax.data.shapes.questions import (
    BALANCED,
    CELLS,
    COLOURS,
    QUESTION_KINDS,
    QUESTIONS,
    SHAPES,
    GridLayout,
    QuestionKind,
    ShapesQuestion,
    Thing,
    answer_stages,
    caption,
)
from llava_cot_jax.errors import UserError

Choice = TypeVar("Choice")
Split = Literal["train", "validation", "test"]

SIZES: dict[Split, int] = {"train": 50_000, "validation": 1_000, "test": 1_000}
"""Default number of rows of each split."""

VERSION = 1
"""Version of the rows in their fingerprints, to be raised whenever a split, seed and index give another row."""

FEWEST, MOST = 3, 5
"""Least and greatest number of things in a picture."""

CELL = 16
"""Side of a cell, in pixels."""

SIDE = 3 * CELL
"""Side of a picture, in pixels."""

GROUND = (228, 228, 228)
PALETTE = {"red": (212, 44, 48), "green": (36, 168, 60), "blue": (52, 78, 212), "yellow": (232, 204, 44)}
COLOUR_SD, NOISE_SD = 20, 12
"""Standard deviations of a thing's colour and of every pixel, on a scale of 0 to 255."""

FINE = 4
"""Number of steps per pixel in which things are drawn and shifted."""

JITTER = 6
"""Maximum distance of a thing from the middle of its cell along each axis, in quarters of a pixel."""

# Corners relative to the middle, in quarters of a pixel. The edges have slopes of 1/2, 1 and 2, which are exact in
# floating point, so that Pillow fills the same pixels on every machine.
OUTLINES = {
    "square": ((-20, -20), (20, -20), (20, 20), (-20, 20)),
    "triangle": ((0, -24), (24, 24), (-24, 24)),
    "star": ((0, -24), (8, -8), (24, 0), (8, 8), (0, 24), (-8, 8), (-24, 0), (-8, -8)),
}
SHAPE_RADIUS = 23
"""Radius of a circle, in quarters of a pixel."""


def split_of(layout: GridLayout) -> Split:
    """Return the only split, under every seed, that may have this layout. Half of all layouts belong to ``train``."""
    shares: tuple[Split, ...] = ("train", "train", "validation", "test")
    return shares[hashlib.sha256(caption(layout).encode()).digest()[0] % len(shares)]


def draw_picture(layout: GridLayout, draw: np.random.Generator) -> Image.Image:
    """Draw a picture of a layout, RGB, with random positions, colours and noise.

    The arithmetic is in integers, so that the picture is the same on every machine.
    """
    picture = Image.new("RGB", (SIDE, SIDE), GROUND)
    for cell, thing in layout.items():
        row, column = divmod(CELLS.index(cell), 3)
        right, down = draw.integers(-JITTER, JITTER + 1, 2).tolist()
        colour = _clip(np.array(PALETTE[thing.colour]) + _noise(draw, (3,), COLOUR_SD))
        picture.paste(tuple(colour.tolist()), (column * CELL, row * CELL), _stencil(thing.shape, right, down))
    return Image.fromarray(_clip(np.asarray(picture) + _noise(draw, (SIDE, SIDE, 3), NOISE_SD)))


@dataclass(frozen=True)
class Scene:
    """Content of a row before its picture is drawn.

    Attributes:
        layout: Content of the picture.
        questions: One question, or sometimes two.
        draw: Random generator that the picture is drawn with.
    """

    layout: GridLayout
    questions: tuple[ShapesQuestion, ...]
    draw: np.random.Generator


@dataclass(frozen=True)
class ShapesRows:
    """``Rows`` of the shapes world.

    The four kinds of first question take turns along the index, and every eighth group of four rows has a second
    question about the same picture. No layout is in two splits.

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
        if self.split not in get_args(Split):
            raise UserError(f"the shapes world has no split {self.split!r}; it is one of {', '.join(get_args(Split))}")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}; it must not be negative")
        if self.size is not None and self.size < 1:
            raise UserError(f"size is {self.size}; it must be at least 1")

    @property
    def fingerprint(self) -> str:
        """Identification of the content, which changes whenever a row does."""
        return f"shapes-{VERSION}-{self.split}-{self.seed}-{len(self)}"

    def __len__(self) -> int:
        return SIZES[self.split] if self.size is None else self.size

    def __getitem__(self, index: int) -> Row:
        """Make the row at ``index``.

        Raises:
            IndexError: There is no row at ``index``.
        """
        scene = self.scene(index)
        picture = draw_picture(scene.layout, scene.draw)
        return Row(f"{self.split}/{index}", "shapes", (picture,), _turns(scene))

    def turns(self, index: int) -> tuple[Turn, ...]:
        """Make the conversation of a row alone, without drawing its picture."""
        return _turns(self.scene(index))

    def kind(self, index: int) -> QuestionKind:
        """Return the kind of the first question."""
        return QUESTION_KINDS[index % len(QUESTION_KINDS)]

    def answer(self, index: int) -> str:
        """Return the conclusion of the first turn, without tags."""
        scene = self.scene(index)
        return scene.questions[0].answer(scene.layout)

    def generator(self, index: int, purpose: int = 0) -> np.random.Generator:
        """Return the random generator of one row for one purpose. The row itself is made with purpose 0."""
        return np.random.default_rng((self.seed, get_args(Split).index(self.split), index, purpose))

    def scene(self, index: int) -> Scene:
        """Return the content of the row at ``index``.

        Raises:
            IndexError: There is no row at ``index``.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"there is no row {index} of {len(self)}")
        draw = self.generator(index)
        kind = self.kind(index)
        count = int(draw.integers(FEWEST, MOST + 1))
        # The answer is drawn before the layout, so that it depends neither on the number of things nor on the question.
        wanted = pick(BALANCED[kind], draw) if kind in BALANCED else None
        fitting: list[ShapesQuestion] = []
        while not fitting:
            layout = _random_layout(count, draw)
            if split_of(layout) == self.split:
                fitting = _fitting_questions(kind, layout, wanted)
        first = pick(fitting, draw)
        if index // len(QUESTION_KINDS) % 8 < 7:
            return Scene(layout, (first,), draw)
        return Scene(layout, (first, _another(first, layout, draw)), draw)


def _random_layout(count: int, draw: np.random.Generator) -> GridLayout:
    """Draw a layout of ``count`` random things in random cells."""
    cells = sorted(draw.permutation(len(CELLS))[:count].tolist())
    colours, shapes = draw.integers(len(COLOURS), size=count), draw.integers(len(SHAPES), size=count)
    return {CELLS[c]: Thing(COLOURS[i], SHAPES[j]) for c, i, j in zip(cells, colours, shapes, strict=True)}


def _fitting_questions(kind: QuestionKind, layout: GridLayout, wanted: str | None) -> list[ShapesQuestion]:
    """Return the questions of a kind that the layout admits, with the answer ``wanted`` unless that is None."""
    admitted = [question for question in QUESTIONS[kind] if question.admits(layout)]
    return [question for question in admitted if wanted is None or question.answer(layout) == wanted]


def _another(first: ShapesQuestion, layout: GridLayout, draw: np.random.Generator) -> ShapesQuestion:
    """Draw a second question about the layout: first its kind, then its answer, then one of the fitting questions."""
    choices = (
        [question for question in _fitting_questions(kind, layout, wanted) if question != first]
        for kind in _shuffled(QUESTION_KINDS, draw)
        for wanted in _shuffled(BALANCED.get(kind, (None,)), draw)
    )
    return pick(next(filter(None, choices)), draw)


def pick(items: Sequence[Choice], draw: np.random.Generator) -> Choice:
    """Draw one of the items, each with the same probability."""
    return items[int(draw.integers(len(items)))]


def _shuffled(items: Sequence[Choice], draw: np.random.Generator) -> list[Choice]:
    return [items[i] for i in draw.permutation(len(items))]


def _turns(scene: Scene) -> tuple[Turn, ...]:
    return tuple(
        Turn(question.text, "\n\n".join(answer_stages(question, scene.layout).values()), images=int(i == 0))
        for i, question in enumerate(scene.questions)
    )


@cache
def _stencil(shape: str, right: int, down: int) -> Image.Image:
    """Draw a mask of a cell: the share of each pixel that the shape covers, 0 to 255.

    Args:
        shape: Name of the shape.
        right: Shift to the right, in quarters of a pixel.
        down: Shift down, in quarters of a pixel.
    """
    fine = Image.new("L", (CELL * FINE, CELL * FINE))
    x, y = CELL * FINE // 2 + right, CELL * FINE // 2 + down
    if shape == "circle":
        ImageDraw.Draw(fine).ellipse((x - SHAPE_RADIUS, y - SHAPE_RADIUS, x + SHAPE_RADIUS, y + SHAPE_RADIUS), fill=255)
    else:
        ImageDraw.Draw(fine).polygon([(x + i, y + j) for i, j in OUTLINES[shape]], fill=255)
    return fine.reduce(FINE)


def _noise(draw: np.random.Generator, shape: tuple[int, ...], sd: int) -> np.ndarray:
    """Draw nearly normal integers of a shape. They are scaled sums of four bytes, whose standard deviation is 147.8."""
    total = draw.integers(256, size=(4, *shape), dtype=np.uint8).sum(axis=0, dtype=np.int32) - 510
    return (total * sd + 74) // 148


def _clip(values: np.ndarray) -> np.ndarray:
    return values.clip(0, 255).astype(np.uint8)
