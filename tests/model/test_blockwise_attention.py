"""Attention by blocks of queries, and its gradients, against those of torch in float64."""

import json
import re

import jax
import jax.ad_checkpoint
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, NamedSharding

from llava_cot_jax.model.attention import AttentionMask
from llava_cot_jax.model.blockwise_attention import QUERY_BLOCK, blockwise_attention, query_blocks
from llava_cot_jax.model.layers import KVSegment, apply_remat, attention, cascade_attention
from llava_cot_jax.model.sharding import constrain, make_mesh, partition_spec, use_mesh
from tests.jaxprs import equations
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
    """Return arrays for an arbitrary mask, and the mask."""
    rng = np.random.default_rng(queries)
    shapes = [(2, 6, queries, 8), (2, 2, 50, 8), (2, 2, 50, 8), (2, 6, queries, 8)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes], rng.random((2, queries, 50)) < 0.3


@pytest.mark.parametrize("queries", QUERIES)
def test_any_mask_and_any_number_of_queries(queries):
    """A query that sees no key has the mean of all values, and no part in the gradients, whatever its own gradient."""
    given, seen = dense(queries)
    seen[:, 0] = False
    got = attended(blockwise_attention, jnp.asarray(seen), *given)
    *arrays, change = given
    want = by_torch(seen, *arrays, change.at[:, :, 0].set(0))
    np.testing.assert_allclose(got[0], want[0], rtol=0, atol=1e-5)
    assert_near(got, want, 1e-5)
    np.testing.assert_array_equal(got[1][:, :, 0], 0)


@pytest.mark.parametrize("queries", [5, 2 * QUERY_BLOCK + 1])
def test_a_mask_that_all_rows_or_all_queries_share(queries):
    given, seen = dense(queries)
    seen[:, 0, :3] = True
    for shared in (seen[:1], seen[:, :1], seen[:1, :1]):
        want = by_torch(np.broadcast_to(shared, seen.shape).copy(), *given)
        assert_near(attended(attention, jnp.asarray(shared), *given), want, 1e-5)


def test_of_bfloat16_all_products_and_sums_are_float32():
    x = jax.ShapeDtypeStruct((1, 2, 2 * QUERY_BLOCK, 8), jnp.bfloat16)
    program = jax.make_jaxpr(lambda q, k, v, change: gradients(q, k, v, change, CAUSAL))(x, x, x, x)
    found = list(equations(program.jaxpr))
    products = [each for each in found if each.primitive.name == "dot_general"]
    of_values = [each for each in products if {x.aval.dtype for x in each.invars} == {jnp.dtype(jnp.bfloat16)}]
    assert len(of_values) == 7 and {each.outvars[0].aval.dtype for each in products} == {jnp.dtype(jnp.float32)}
    loops = [each for each in found if each.primitive.name == "scan"]
    carried = [x.aval for each in loops for x in each.outvars[: each.params["num_carry"]]]
    assert [x.dtype for x in carried] == [jnp.float32] * 2  # the gradients by keys and by values
    assert [x.aval.dtype for x in program.jaxpr.outvars] == [jnp.bfloat16] * 3


CAUSAL = AttentionMask(jnp.ones((1, 1, 1), bool), jnp.zeros((1, 2 * QUERY_BLOCK), jnp.int32), causal=True)


def gradients(q, k, v, change, mask):
    return jax.vjp(lambda *x: blockwise_attention(*x, mask), q, k, v)[1](change)


@pytest.mark.slow
def test_gradients_of_second_order_are_finite():
    """Where a query sees no key, too."""
    given, seen = dense(9)
    seen[:, 0] = False
    twice = jax.grad(lambda *x: sum(jnp.sum(y**2) for y in gradients(*x, jnp.asarray(seen))), argnums=(0, 1, 2))
    assert all(np.isfinite(x).all() for x in twice(*given))


@pytest.mark.parametrize("mask", ["one row of groups", "groups of each row"])
def test_remat_of_products_saves_no_scores_and_no_mask(mask, capsys):
    """Nothing that is saved has an axis of keys beside one of queries."""
    queries, keys, rows = 3 * QUERY_BLOCK, 300, 1 if mask == "groups of each row" else 2
    group = jnp.zeros((1, keys), jnp.int32).at[:, 7:].set(1)
    visible = jnp.ones((rows, queries, 2), bool).at[:, 5, 0].set(False)
    q, k = jnp.ones((rows, 2, queries, 8)), jnp.ones((rows, 2, keys, 8))
    attend = apply_remat(lambda q, k, v: attention(q, k, v, AttentionMask(visible, group)), "dots")
    jax.ad_checkpoint.print_saved_residuals(lambda *x: attend(*x).sum(), q, k, k)
    shapes = [json.loads(f"[{shape}]") for shape in re.findall(r"[a-z0-9]+\[([0-9,]+)\]", capsys.readouterr().out)]
    assert shapes and not any(keys in shape and {queries, QUERY_BLOCK} & set(shape) for shape in shapes)


COLLECTIVES = re.compile(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter")


def on_mesh(mesh: Mesh, *shapes: tuple[int, ...], axes: str) -> list[jax.ShapeDtypeStruct]:
    """Return float32 arrays whose rows and heads are sharded over a mesh."""
    sharding = NamedSharding(mesh, partition_spec(["batch", axes]))
    return [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding) for shape in shapes]


def test_on_a_mesh_rows_and_heads_need_nothing_of_others():
    mesh = make_mesh(2, 1, 4)
    tokens = 2 * QUERY_BLOCK
    q, change = on_mesh(mesh, (4, 8, tokens, 16), (4, 8, tokens, 16), axes="heads")
    k, v = on_mesh(mesh, (4, 4, tokens, 16), (4, 4, tokens, 16), axes="kv_heads")

    def both(q, k, v, change):
        with use_mesh(mesh):
            return blockwise_attention(q, k, v, CAUSAL), gradients(q, k, v, change, CAUSAL)

    compiled = jax.jit(both).lower(q, k, v, change).compile()
    assert not COLLECTIVES.search(compiled.as_text())
    assert all(sharding.shard_shape((4, 8, 2, 2))[0] == 2 for sharding in jax.tree.leaves(compiled.output_shardings))


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_on_a_mesh_candidates_need_nothing_of_others(groups, tokens):
    """Also where their questions are fewer than the devices, which then all have the questions' keys."""
    mesh = make_mesh(1, 4, 2)
    (q,) = on_mesh(mesh, (8, 4, tokens, 16), axes="heads")
    rows = "batch" if groups == 4 else None
    sharding = NamedSharding(mesh, partition_spec([rows, "kv_heads"]))
    k = jax.ShapeDtypeStruct((groups, 2, 40, 16), jnp.float32, sharding=sharding)
    mask = jax.ShapeDtypeStruct((groups, 1, 40), bool, sharding=NamedSharding(mesh, partition_spec([rows])))

    def attend(q, k, mask):
        with use_mesh(mesh):
            return constrain(cascade_attention(q, [KVSegment(k, k, mask)]), "batch", "heads", None, None)

    assert not COLLECTIVES.search(jax.jit(attend).lower(q, k, mask).compile().as_text())


@pytest.mark.parametrize("queries", QUERIES)
def test_blocks_hold_all_queries_and_little_else(queries):
    count, size = query_blocks(queries)
    assert size <= QUERY_BLOCK and 0 <= count * size - queries < 8 * count
    assert count == -(-queries // QUERY_BLOCK)


def test_no_more_scores_are_held_than_those_of_a_block():
    """At a time: the scores, the weights, their gradients and those by the scores, and one more of such arrays.

    Beside them there are the queries, their gradient and the result, the change, and what is added up by keys.
    """
    tokens, heads, width = 16 * QUERY_BLOCK, 4, 16
    x = jax.ShapeDtypeStruct((1, heads, tokens, width), jnp.float32)
    mask = AttentionMask(jnp.ones((1, 1, 1), bool), jnp.zeros((1, tokens), jnp.int32), causal=True)
    compiled = jax.jit(lambda *x: gradients(*x, mask)).lower(x, x, x, x).compile()
    block, whole = 4 * heads * tokens * QUERY_BLOCK, 4 * heads * tokens * width
    assert compiled.memory_analysis().temp_size_in_bytes < 5 * block + 10 * whole < 4 * heads * tokens**2
