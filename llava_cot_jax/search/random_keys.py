"""Random keys of the draws of a search, so that each draw depends on its own key alone."""

from enum import IntEnum

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key


class Draw(IntEnum):
    """Kinds of draws in a stage. A stage's key is folded with the kind, then with the candidates that it is for.

    ``ROUND`` and ``CONTINUATION`` are not of draws. In a retracing search the former is folded in first, with the
    number of the round and the candidate before that is continued, so that the stages of each round, and of each such
    candidate, have keys of their own. The latter is folded in, with the candidate, for the continuations of each.
    """

    CANDIDATE = 0
    BRACKET = 1
    REASON = 2
    CHECK = 3
    ROUND = 4
    CONTINUATION = 5


def fold_in_each(key: Key[Array, ""], *numbers: Int[Array, " n"]) -> Key[Array, " n"]:
    """Return ``key`` folded with each of n numbers; of several arguments, with one after the other."""
    keys = jnp.broadcast_to(key, numbers[0].shape)
    for number in numbers:
        keys = jax.vmap(jax.random.fold_in)(keys, number)
    return keys
