"""Pieces of any length, put together."""

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_cot_jax.inference.ragged_tokens import join, pack

ROWS = st.lists(st.lists(st.integers(1, 9), max_size=4), min_size=3, max_size=3)


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(ROWS, min_size=1, max_size=4), kept=st.lists(st.booleans(), min_size=3, max_size=3))
def test_joined_pieces_are_the_joined_lists(parts, kept):
    """Rows of the first part where ``kept``; what stands beyond a piece's end is not taken."""
    pieces = [pack(rows, capacity=4) for rows in parts]
    noisy = [jax.tree.map(np.asarray, piece) for piece in pieces]
    for piece, rows in zip(noisy, parts, strict=True):
        tokens = piece.tokens.copy()
        for row, ids in zip(tokens, rows, strict=True):
            row[len(ids) :] = 99
        object.__setattr__(piece, "tokens", tokens)
    joined = join([noisy[0].where(np.array(kept)), *noisy[1:]], capacity=16)
    for i in range(3):
        want = sum([rows[i] for rows in parts[1:]], parts[0][i] if kept[i] else [])
        assert joined.tokens[i, : joined.length[i]].tolist() == want


def test_one_piece_for_all_rows():
    joined = join((pack([[7, 8]])[0], pack([[1], [], [2, 3]])), capacity=5)
    assert [row[:n].tolist() for row, n in zip(joined.tokens, joined.length, strict=True)] == [
        [7, 8, 1],
        [7, 8],
        [7, 8, 2, 3],
    ]
