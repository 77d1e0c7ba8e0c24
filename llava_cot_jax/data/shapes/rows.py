"""The shapes world: pictures of coloured shapes on a grid, with questions and staged answers, made from a seed.

The same kind of rows as LLaVA-CoT-100k, at no cost and in any number: a model of a million parameters
learns them in minutes on a CPU. A picture is 48 x 48 pixels: a 3 x 3 grid of cells (``shapes_questions.CELLS``)
with 3 to 5 shapes in them. What a row holds depends on split, seed and index alone.
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
    KINDS,
    QUESTIONS,
    SHAPES,
    Kind,
    Layout,
    Question,
    Thing,
    answer_stages,
    caption,
)
from llava_cot_jax.errors import UserError

Item = TypeVar("Item")
Split = Literal["train", "validation", "test"]

SIZES: dict[Split, int] = {"train": 50_000, "validation": 1_000, "test": 1_000}
"""Rows of each split, where nothing else is asked for."""

VERSION = 1
"""Part of every fingerprint: to be raised whenever the same split, seed and index give another row."""

FEWEST, MOST = 3, 5
"""How many things a picture shows."""

CELL = 16
"""Side of a cell in pixels."""

SIDE = 3 * CELL
"""Side of a picture in pixels."""

GROUND = (228, 228, 228)
PALETTE = {"red": (212, 44, 48), "green": (36, 168, 60), "blue": (52, 78, 212), "yellow": (232, 204, 44)}
COLOUR_SD, NOISE_SD = 20, 12
"""Standard deviation, of 255, of a thing's colour, and of every pixel."""

FINE = 4
"""Things are drawn and shifted in quarters of a pixel."""

JITTER = 6
"""How far a thing may lie from the middle of its cell, in quarters of a pixel."""

# Around the middle, in quarters of a pixel. The edges have slopes of 1/2, 1 and 2, which are exact in
# floating point: Pillow fills the same pixels on every machine.
OUTLINES = {
    "square": ((-20, -20), (20, -20), (20, 20), (-20, 20)),
    "triangle": ((0, -24), (24, 24), (-24, 24)),
    "star": ((0, -24), (8, -8), (24, 0), (8, 8), (0, 24), (-8, 8), (-24, 0), (-8, -8)),
}
RADIUS = 23


def split_of(layout: Layout) -> Split:
    """The one split that the layout may be drawn in, whatever the seed: half of all layouts are of ``train``."""
    shares: tuple[Split, ...] = ("train", "train", "validation", "test")
    return shares[hashlib.sha256(caption(layout).encode()).digest()[0] % len(shares)]


def draw_picture(layout: Layout, draw: np.random.Generator) -> Image.Image:
    """The picture of a layout, RGB; places, colours and pixels vary. In integers, so alike on every machine."""
    picture = Image.new("RGB", (SIDE, SIDE), GROUND)
    for cell, thing in layout.items():
        row, column = divmod(CELLS.index(cell), 3)
        right, down = draw.integers(-JITTER, JITTER + 1, 2).tolist()
        colour = _clip(np.array(PALETTE[thing.colour]) + _noise(draw, (3,), COLOUR_SD))
        picture.paste(tuple(colour.tolist()), (column * CELL, row * CELL), _stencil(thing.shape, right, down))
    return Image.fromarray(_clip(np.asarray(picture) + _noise(draw, (SIDE, SIDE, 3), NOISE_SD)))


@dataclass(frozen=True)
class Scene:
    """What a row is about.

    Attributes:
        layout: what the picture shows.
        questions: one, or now and then two.
        draw: what the picture is drawn with.
    """

    layout: Layout
    questions: tuple[Question, ...]
    draw: np.random.Generator


@dataclass(frozen=True)
class ShapesRows:
    """Rows of the shapes world; see ``data.rows.Rows``.

    The kind of the first question goes round with the index, and every eighth group of four rows has
    a second question about the same picture. No layout is in two splits.

    Attributes:
        split: ``train``, ``validation`` or ``test``.
        seed: other seeds give other rows.
        size: how many rows; by default as ``SIZES`` says. A row does not depend on it.

    Raises:
        UserError: an unknown split, a negative seed, or no rows.
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
        """Changes whenever a row does."""
        return f"shapes-{VERSION}-{self.split}-{self.seed}-{len(self)}"

    def __len__(self) -> int:
        return SIZES[self.split] if self.size is None else self.size

    def __getitem__(self, index: int) -> Row:
        """The row at ``index``, which counts from 0; IndexError beyond the last."""
        scene = self.scene(index)
        picture = draw_picture(scene.layout, scene.draw)
        return Row(f"{self.split}/{index}", "shapes", picture, _turns(scene))

    def turns(self, index: int) -> tuple[Turn, ...]:
        """The conversation alone; the picture is not drawn."""
        return _turns(self.scene(index))

    def kind(self, index: int) -> Kind:
        """What sort of question the first turn asks."""
        return KINDS[index % len(KINDS)]

    def answer(self, index: int) -> str:
        """The conclusion of the first turn, without tags."""
        scene = self.scene(index)
        return scene.questions[0].answer(scene.layout)

    def generator(self, index: int, purpose: int = 0) -> np.random.Generator:
        """Draws for one row and nothing else; each purpose has its own, the row itself 0."""
        return np.random.default_rng((self.seed, get_args(Split).index(self.split), index, purpose))

    def scene(self, index: int) -> Scene:
        """What the row at ``index`` is about."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        draw = self.generator(index)
        kind = self.kind(index)
        count = int(draw.integers(FEWEST, MOST + 1))
        # The answer before the layout: neither the number of things nor the question gives it away.
        wanted = pick(BALANCED[kind], draw) if kind in BALANCED else None
        fitting: list[Question] = []
        while not fitting:
            layout = _random_layout(count, draw)
            if split_of(layout) == self.split:
                fitting = _questions(kind, layout, wanted)
        first = pick(fitting, draw)
        if index // len(KINDS) % 8 < 7:
            return Scene(layout, (first,), draw)
        return Scene(layout, (first, _another(first, layout, draw)), draw)


def _random_layout(count: int, draw: np.random.Generator) -> Layout:
    """Any things in any cells."""
    cells = sorted(draw.permutation(len(CELLS))[:count].tolist())
    colours, shapes = draw.integers(len(COLOURS), size=count), draw.integers(len(SHAPES), size=count)
    return {CELLS[c]: Thing(COLOURS[i], SHAPES[j]) for c, i, j in zip(cells, colours, shapes, strict=True)}


def _questions(kind: Kind, layout: Layout, wanted: str | None) -> list[Question]:
    """The questions of a kind that the layout admits and, unless ``wanted`` is None, answers so."""
    admitted = [question for question in QUESTIONS[kind] if question.admits(layout)]
    return [question for question in admitted if wanted is None or question.answer(layout) == wanted]


def _another(first: Question, layout: Layout, draw: np.random.Generator) -> Question:
    """A second question about the layout: a kind at random, then an answer that some question of it has."""
    choices = (
        [question for question in _questions(kind, layout, wanted) if question != first]
        for kind in _shuffled(KINDS, draw)
        for wanted in _shuffled(BALANCED.get(kind, (None,)), draw)
    )
    return pick(next(filter(None, choices)), draw)


def pick(items: Sequence[Item], draw: np.random.Generator) -> Item:
    """One of the items, each as likely."""
    return items[int(draw.integers(len(items)))]


def _shuffled(items: Sequence[Item], draw: np.random.Generator) -> list[Item]:
    return [items[i] for i in draw.permutation(len(items))]


def _turns(scene: Scene) -> tuple[Turn, ...]:
    return tuple(Turn(q.text, "\n\n".join(answer_stages(q, scene.layout).values())) for q in scene.questions)


@cache
def _stencil(shape: str, right: int, down: int) -> Image.Image:
    """How much of each pixel of a cell the shape covers, 0 to 255; shifted by quarters of a pixel."""
    fine = Image.new("L", (CELL * FINE, CELL * FINE))
    x, y = CELL * FINE // 2 + right, CELL * FINE // 2 + down
    if shape == "circle":
        ImageDraw.Draw(fine).ellipse((x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS), fill=255)
    else:
        ImageDraw.Draw(fine).polygon([(x + i, y + j) for i, j in OUTLINES[shape]], fill=255)
    return fine.reduce(FINE)


def _noise(draw: np.random.Generator, shape: tuple[int, ...], sd: int) -> np.ndarray:
    """Integers [shape], nearly normal: a sum of four bytes has a standard deviation of 147.8."""
    total = draw.integers(256, size=(4, *shape), dtype=np.uint8).sum(axis=0, dtype=np.int32) - 510
    return (total * sd + 74) // 148


def _clip(values: np.ndarray) -> np.ndarray:
    return values.clip(0, 255).astype(np.uint8)
