"""Token pieces of any length, put together on the device in shapes that do not depend on them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pieces:
    """Rows of tokens, each of its own length.

    Attributes:
        tokens: int32 [..., capacity]; beyond a row's length they mean nothing.
        length: int32 [...].
    """

    tokens: jax.Array
    length: jax.Array

    @property
    def capacity(self) -> int:
        """The longest that a row can be."""
        return self.tokens.shape[-1]

    def __getitem__(self, index: Any) -> "Pieces":
        """Rows by any index of the leading axes."""
        return Pieces(self.tokens[index], self.length[index])

    def where(self, kept: jax.Array) -> "Pieces":
        """The same, empty where ``kept`` bool [...] is not."""
        return Pieces(self.tokens, jnp.where(kept, self.length, 0))


def pack(rows: Sequence[Sequence[int]], shape: tuple[int, ...] | None = None, capacity: int = 1) -> Pieces:
    """Pieces from lists of ids.

    Args:
        rows: the ids of each.
        shape: leading axes, to which the rows are laid out in order; by default [rows].
        capacity: at least this; the longest row's length where that is more.
    """
    width = max([capacity, *map(len, rows)])
    tokens = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    length = np.array([len(row) for row in rows], np.int32)
    shape = length.shape if shape is None else shape
    return Pieces(jax.device_put(tokens.reshape(*shape, width)), jax.device_put(length.reshape(shape)))


def join(pieces: Sequence[Pieces], capacity: int) -> Pieces:
    """The pieces of each row one after another.

    Args:
        pieces: of leading axes that broadcast to one shape.
        capacity: of the result, in which they must fit.
    """
    shape = jnp.broadcast_shapes(*(piece.length.shape for piece in pieces))
    tokens = jnp.zeros((*shape, capacity), jnp.int32)
    start = jnp.zeros(shape, jnp.int32)
    for piece in pieces:
        index = jnp.arange(capacity) - start[..., None]  # into the piece
        here = (index >= 0) & (index < piece.length[..., None])
        rows = jnp.broadcast_to(piece.tokens, (*shape, piece.capacity))
        tokens = jnp.where(here, jnp.take_along_axis(rows, jnp.clip(index, 0, piece.capacity - 1), axis=-1), tokens)
        start = start + piece.length
    return Pieces(tokens, start)
