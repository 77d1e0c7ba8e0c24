"""A row: a picture and a conversation about it, wherever it comes from."""

from dataclasses import dataclass
from typing import Protocol

from llava_cot_jax.processing.images import ImageSource

MARKER = "<image>"
"""Where a raw question says that the picture stands."""


@dataclass(frozen=True)
class Turn:
    """A question and its answer, as the row has them: perhaps with ``<image>`` markers and space around."""

    question: str
    answer: str


@dataclass(frozen=True)
class Row:
    """One row of a data set.

    Attributes:
        id: names the row to a person; may repeat within a data set.
        source: the data set that the picture comes from, such as ``chartqa``.
        image: the picture.
        turns: at least one.
    """

    id: str
    source: str
    image: ImageSource
    turns: tuple[Turn, ...]


class Rows(Protocol):
    """Rows by index, in a fixed order. Can be pickled, for worker processes to read from."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever a row does."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row:
        """The row at ``index``.

        Raises:
            UserError: the record is damaged; the message names it.
        """

    def turns(self, index: int) -> tuple[Turn, ...]:
        """The conversation alone, without the cost of reading the picture."""


@dataclass(frozen=True)
class FirstRows:
    """The first rows of a data set; see ``Rows``.

    Attributes:
        rows: the data set.
        count: how many of it at most.
    """

    rows: Rows
    count: int

    @property
    def fingerprint(self) -> str:
        """Changes whenever a row does."""
        return f"{self.rows.fingerprint}-first-{len(self)}"

    def __len__(self) -> int:
        return min(self.count, len(self.rows))

    def __getitem__(self, index: int) -> Row:
        """The row at ``index``, as ``Rows`` explains; IndexError beyond the last."""
        return self.rows[self._checked(index)]

    def turns(self, index: int) -> tuple[Turn, ...]:
        """The conversation alone."""
        return self.rows.turns(self._checked(index))

    def _checked(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return index
