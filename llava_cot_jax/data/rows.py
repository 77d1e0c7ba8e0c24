"""Rows of a data set, each a conversation with the images that it is about, if any."""

import hashlib
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Protocol

from llava_cot_jax.processing.images import ImageSource
from llava_cot_jax.processing.probe import Probe


@dataclass(frozen=True)
class ProbeTarget:
    """Question of the verifier about an answer, and the reply that is trained.

    Attributes:
        probe: The question, and the two texts of the reply.
        value: Probability to train of the first text, which says that the answer is right; the second has the rest.
        weight: Weight of the answer among all that are asked about.
    """

    probe: Probe
    value: float
    weight: float


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Attributes:
        question: Text of the question, without ``<image>`` markers that stand for images.
        answer: Text of the answer.
        images: Number of images of the row that come before the text of this question.
        system: Text of the system's turn before the question, or empty. Only the first turn of a row may have one.
        target: What the verifier is to say of the answer, and all that is trained of the turn, which is the only one of
            its row. None trains the answer itself.
    """

    question: str
    answer: str
    images: int = 0
    system: str = ""
    target: ProbeTarget | None = None


@dataclass(frozen=True)
class Row:
    """One row of a data set.

    Attributes:
        id: Name of the row for messages. It may repeat within a data set.
        source: Data set that the row comes from, such as ``chartqa``.
        images: Images that the conversation is about, in the order in which its turns have them.
        turns: Turns of the conversation, at least one.
    """

    id: str
    source: str
    images: tuple[ImageSource, ...]
    turns: tuple[Turn, ...]


class Rows(Protocol):
    """Rows by index, in a fixed order. The object can be pickled, so that worker processes can read from it."""

    @property
    def fingerprint(self) -> str:
        """Identification of the content, which changes whenever a row does."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row:
        """Read the row at ``index``.

        Raises:
            IndexError: There is no row at ``index``.
            UserError: The record is damaged. The message names it.
        """

    def turns(self, index: int) -> tuple[Turn, ...]:
        """Read the conversation of a row alone, without the cost of its images."""


@dataclass(frozen=True)
class FirstRows:
    """``Rows`` that are the first of another data set.

    Attributes:
        rows: Data set to take the rows from.
        count: Maximum number of rows.
    """

    rows: Rows
    count: int

    @property
    def fingerprint(self) -> str:
        """Identification of the content, which changes whenever a row does."""
        return f"{self.rows.fingerprint}-first-{len(self)}"

    def __len__(self) -> int:
        return min(self.count, len(self.rows))

    def __getitem__(self, index: int) -> Row:
        """Read the row at ``index``.

        Raises:
            IndexError: There is no row at ``index``.
            UserError: The record is damaged. The message names it.
        """
        return self.rows[self._checked(index)]

    def turns(self, index: int) -> tuple[Turn, ...]:
        """Read the conversation of a row alone, without the cost of its images."""
        return self.rows.turns(self._checked(index))

    def _checked(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"there is no row {index} of {len(self)}")
        return index


@dataclass(frozen=True)
class Mixture:
    """``Rows`` of several data sets, one after the other, with the weight of each.

    Attributes:
        parts: Data sets.
        weights: Number of times that each row of a data set comes in an epoch.
    """

    parts: tuple[Rows, ...]
    weights: tuple[float, ...]

    @property
    def fingerprint(self) -> str:
        """Identification of the content, which changes whenever a row does. The weights are no part of it."""
        return hashlib.sha256("\0".join(part.fingerprint for part in self.parts).encode()).hexdigest()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Row:
        """Read the row at ``index``.

        Raises:
            IndexError: There is no row at ``index``.
            UserError: The record is damaged. The message names it.
        """
        part, inside = self._locate(index)
        return part[inside]

    def turns(self, index: int) -> tuple[Turn, ...]:
        """Read the conversation of a row alone, without the cost of its images."""
        part, inside = self._locate(index)
        return part.turns(inside)

    @cached_property
    def _starts(self) -> list[int]:
        """Index of the first row of each data set, and the number of all rows."""
        return list(accumulate(map(len, self.parts), initial=0))

    def _locate(self, index: int) -> tuple[Rows, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"there is no row {index} of {len(self)}")
        number = bisect_right(self._starts, index) - 1
        return self.parts[number], index - self._starts[number]


def data_sets_of(*rows: Rows | None) -> list[Rows]:
    """Return the data sets that rows are made of, each of one kind; None stands for no rows."""
    return [part for each in rows if each for part in (each.parts if isinstance(each, Mixture) else (each,))]


def asks_verifier(part: Rows) -> bool:
    """Whether the rows of a data set train what the verifier says of an answer, rather than the answer itself."""
    return part.turns(0)[0].target is not None
