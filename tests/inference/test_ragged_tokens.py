"""Tests of ragged token sequences: padding and concatenation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_cot_jax.inference.ragged_tokens import concat, pad

ROWS = st.lists(st.lists(st.integers(1, 9), max_size=4), min_size=3, max_size=3)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(parts=st.lists(ROWS, min_size=1, max_size=4), kept=st.lists(st.booleans(), min_size=3, max_size=3))
def test_concat_is_concatenation_of_lists(parts, kept):
    """The first piece is emptied where not ``kept``, and tokens beyond a piece's length do not show."""
    pieces = [pad(rows, capacity=4) for rows in parts]
    noisy = [jax.tree.map(np.asarray, piece) for piece in pieces]
    for piece, rows in zip(noisy, parts, strict=True):
        tokens = piece.tokens.copy()
        for row, ids in zip(tokens, rows, strict=True):
            row[len(ids) :] = 99
        object.__setattr__(piece, "tokens", tokens)
    joined = concat([noisy[0].where(jnp.array(kept)), *noisy[1:]], capacity=16)
    for i in range(3):
        want = sum([rows[i] for rows in parts[1:]], parts[0][i] if kept[i] else [])
        assert joined.tokens[i, : joined.lengths[i]].tolist() == want


def test_concat_broadcasts_a_piece_to_all_sequences():
    joined = concat((pad([[7, 8]])[0], pad([[1], [], [2, 3]])), capacity=5)
    assert [row[:n].tolist() for row, n in zip(joined.tokens, joined.lengths, strict=True)] == [
        [7, 8, 1],
        [7, 8],
        [7, 8, 2, 3],
    ]
