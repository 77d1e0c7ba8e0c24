"""Attention by blocks of queries, and its gradients, against those of torch in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from llava_cot_jax.model.attention import AttentionMask
from llava_cot_jax.model.blockwise_attention import QUERY_BLOCK, blockwise_attention, query_blocks
from llava_cot_jax.model.layers import attention
from tests.model.test_attention import CASES, arrays, attended, by_implementation, seen_by_hand

QUERIES = (1, 7, QUERY_BLOCK, QUERY_BLOCK + 1, 3 * QUERY_BLOCK)


def by_torch(seen: np.ndarray, *given: jax.Array) -> list[np.ndarray]:
    """Return the values and the gradients by q, k and v, as ``attended`` does."""
    q, k, v, change = (torch.tensor(np.asarray(x, np.float64), requires_grad=True) for x in given)
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).mT * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~torch.tensor(seen)[:, None], -1e30)
    out = scores.softmax(-1) @ v.repeat_interleave(group, 1)
    return [x.detach().numpy() for x in (out, *torch.autograd.grad(out, (q, k, v), change))]


def assert_near(got: list[np.ndarray], want: list[np.ndarray], share: float) -> None:
    for a, b, name in zip(got, want, ("values", "dq", "dk", "dv"), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=share * np.abs(b).max(), err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_masks_of_every_kind(case):
    """In float32, within 1e-5 of the largest: see ``assert_same`` of the kernels."""
    mask = CASES[case]
    given, some = arrays(mask, 4, 2, 16)
    got = attended(by_implementation("xla"), mask, *given)
    want = by_torch(seen_by_hand(mask, *some.shape), *given)
    assert all(np.isfinite(x).all() for x in got)
    got[0], want[0] = (x * some[:, None, :, None] for x in (got[0], want[0]))
    assert_near(got, want, 1e-5)


def dense(queries: int, dtype: str = "float32") -> tuple[list[jax.Array], np.ndarray]:
    """Return arrays for an arbitrary mask, and the mask, by which the first query sees nothing."""
    rng = np.random.default_rng(queries)
    shapes = [(2, 6, queries, 8), (2, 2, 50, 8), (2, 2, 50, 8), (2, 6, queries, 8)]
    given = [rng.normal(size=shape) for shape in shapes]
    seen = rng.random((2, queries, 50)) < 0.3
    seen[:, 0] = False
    given[3][:, :, 0] = 0  # who calls discards it
    return [jnp.asarray(x, dtype) for x in given], seen


@pytest.mark.parametrize("queries", QUERIES)
def test_any_mask_and_any_number_of_queries(queries):
    """A query that sees no key has the mean of all values, and no part in the gradients."""
    given, seen = dense(queries)
    got = attended(blockwise_attention, jnp.asarray(seen), *given)
    assert_near(got, by_torch(seen, *given), 1e-5)
    np.testing.assert_array_equal(got[1][:, :, 0], 0)


@pytest.mark.parametrize("queries", [5, 2 * QUERY_BLOCK + 1])
def test_a_mask_that_all_rows_or_all_queries_share(queries):
    given, seen = dense(queries)
    seen[:, 0] = True
    for shared in (seen[:1], seen[:, :1], seen[:1, :1]):
        want = by_torch(np.broadcast_to(shared, seen.shape).copy(), *given)
        assert_near(attended(attention, jnp.asarray(shared), *given), want, 1e-5)


def test_bfloat16_is_rounded_where_it_is_multiplied_and_returned_alone():
    """Weights, gradients by scores and results have 8 digits, which are right to 2**-9. Sums of them are float32.

    The errors of n terms of a sum add up to sqrt(n) times one's, while the sum itself is as large as sqrt(n) terms, so
    that some of 2**-9 are what each of three products in a row adds.
    """
    given, seen = dense(2 * QUERY_BLOCK + 1, "bfloat16")
    got = attended(blockwise_attention, jnp.asarray(seen), *given)
    assert_near(got, by_torch(seen, *given), 3 * 2**-8)


@pytest.mark.parametrize("queries", QUERIES)
def test_blocks_hold_all_queries_and_little_else(queries):
    count, size = query_blocks(queries)
    assert size <= QUERY_BLOCK and 0 <= count * size - queries < 8 * count
    assert count == -(-queries // QUERY_BLOCK)


def test_no_more_scores_are_held_than_those_of_a_block():
    """The temporaries of a training step of many queries are far from the scores of all."""
    tokens, heads = 16 * QUERY_BLOCK, 4
    x = jax.ShapeDtypeStruct((1, heads, tokens, 16), jnp.float32)
    mask = AttentionMask(jnp.ones((1, 1, 1), bool), jnp.zeros((1, tokens), jnp.int32), causal=True)

    def gradients(q, k, v, change):
        return jax.vjp(lambda *x: blockwise_attention(*x, mask), q, k, v)[1](change)

    memory = jax.jit(gradients).lower(x, x, x, x).compile().memory_analysis()
    scores = 4 * heads * tokens**2
    assert memory.temp_size_in_bytes < 5 * scores / 16 + 10 * 4 * heads * tokens * 16
