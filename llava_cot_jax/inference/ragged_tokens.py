"""Token sequences of different lengths, put together on the device in shapes that do not depend on the lengths."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RaggedTokens:
    """Token sequences, each of its own length.

    Attributes:
        tokens: int32, the tokens; those beyond a sequence's length have no meaning.
        lengths: int32, number of tokens of each sequence.
    """

    tokens: Int[Array, "*batch capacity"]
    lengths: Int[Array, "*batch"]

    @property
    def capacity(self) -> int:
        """Largest length that a sequence can have."""
        return self.tokens.shape[-1]

    def __getitem__(self, index: Any) -> "RaggedTokens":
        """Return the sequences at an index of the leading axes."""
        return RaggedTokens(self.tokens[index], self.lengths[index])

    def where(self, kept: Bool[Array, "*#batch"]) -> "RaggedTokens":
        """Return the sequences, emptied where ``kept`` is False."""
        return RaggedTokens(self.tokens, jnp.where(kept, self.lengths, 0))


def pad(sequences: Sequence[Sequence[int]], shape: tuple[int, ...] | None = None, capacity: int = 1) -> RaggedTokens:
    """Return lists of token ids, padded, on the device.

    Args:
        sequences: Token ids of each sequence.
        shape: Leading axes, along which the sequences are laid out in order; by default [sequences].
        capacity: Least capacity; the longest sequence's length where that is more.
    """
    width = max([capacity, *map(len, sequences)])
    tokens = np.zeros((len(sequences), width), np.int32)
    for i, sequence in enumerate(sequences):
        tokens[i, : len(sequence)] = sequence
    lengths = np.array([len(sequence) for sequence in sequences], np.int32)
    shape = lengths.shape if shape is None else shape
    return RaggedTokens(jax.device_put(tokens.reshape(*shape, width)), jax.device_put(lengths.reshape(shape)))


def concat(pieces: Sequence[RaggedTokens], capacity: int) -> RaggedTokens:
    """Concatenate the sequences of each batch entry.

    Args:
        pieces: Sequences, of leading axes that broadcast to one shape.
        capacity: Capacity of the result, into which they must fit.
    """
    shape = jnp.broadcast_shapes(*(piece.lengths.shape for piece in pieces))
    tokens = jnp.zeros((*shape, capacity), jnp.int32)
    start = jnp.zeros(shape, jnp.int32)
    for piece in pieces:
        index = jnp.arange(capacity) - start[..., None]  # into the piece
        inside = (index >= 0) & (index < piece.lengths[..., None])
        source = jnp.broadcast_to(piece.tokens, (*shape, piece.capacity))
        tokens = jnp.where(inside, jnp.take_along_axis(source, jnp.clip(index, 0, piece.capacity - 1), axis=-1), tokens)
        start = start + piece.lengths
    return RaggedTokens(tokens, start)
