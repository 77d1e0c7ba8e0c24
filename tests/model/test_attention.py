"""The kernels behind the attention door against the plain form, and the masks against what they say."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec, use_abstract_mesh

from llava_cot_jax.model.attention import (
    AttentionImplementation,
    AttentionMask,
    _block_size,
    _cudnn,
    _on_mesh,
    attention_implementation,
    causal_mask,
    select_kernel,
)
from llava_cot_jax.model.layers import attention
from llava_cot_jax.model.mllama import Mllama, hidden_states
from llava_cot_jax.model.sharding import make_mesh, use_mesh
from tests.model.test_mllama import off
from tests.tiers import EXHAUSTIVE

TILE = 30


def tokens_of(present: list[str]) -> AttentionMask:
    return causal_mask(jnp.array([[c == "x" for c in row] for row in present]))


def tower(used: list[int]) -> AttentionMask:
    """Images of four tiles, the first ``used`` in use, whose last 3 tokens are fill."""
    tile, token = np.divmod(np.arange(4 * TILE), TILE)
    padding = (tile >= np.array(used)[:, None]) | (token >= TILE - 3)
    return AttentionMask(jnp.stack([jnp.ones_like(padding), ~padding], -1), jnp.asarray(padding, jnp.int32))


def cross(sees: list[str]) -> AttentionMask:
    """20 queries a row, each seeing the tiles that a word names; some tokens at the end fill up the row."""
    rows = [row.split() for row in sees]
    tiles = max(len(word) for row in rows for word in row)
    told = np.zeros((len(rows), 20, tiles + 1), bool)
    for b, row in enumerate(rows):
        for i in range(20):
            word = row[i * len(row) // 20]
            told[b, i, : len(word)] = [c == "x" for c in word]
    group = np.minimum(np.arange(tiles * TILE + 8) // TILE, tiles)
    return AttentionMask(jnp.asarray(told), jnp.asarray(group)[None])


CASES = {
    "text": tokens_of(["x" * 40] * 2),
    "text padded on the right": tokens_of(["x" * 40, "x" * 13 + "." * 27]),
    "text padded on the left": tokens_of(["x" * 40, "." * 27 + "x" * 13]),
    "text in several blocks": tokens_of(["x" * 520, "." * 400 + "x" * 120]),
    "tower": tower([4, 3, 1]),
    "one image, and none": cross(["..xx. xx... xx...", "..... ....."]),
    "several images": cross([".... xx.. ..x. xxx.", ".... .... x.xx xxxx"]),
    "unmasked where there is no image": cross(["xxxx xx.. xx..", "xxxx"]),
}


SLOW = ("text", "text padded on the right", "one image, and none", "unmasked where there is no image")
"""Cases that others nearly contain; an interpreted kernel takes seconds to compile."""


def seen_by_hand(mask: AttentionMask, batch: int, queries: int) -> np.ndarray:
    sees, group = np.asarray(mask.visible), np.asarray(mask.group)
    seen = np.zeros((batch, queries, group.shape[1]), bool)
    for b, i, j in np.ndindex(seen.shape):
        here = sees[b % sees.shape[0], i % sees.shape[1]]
        seen[b, i, j] = here[group[b % group.shape[0], j]] and not (mask.causal and j > i)
    return seen


def arrays(
    mask: AttentionMask, heads: int, kv_heads: int, head_dim: int, dtype: str = "float32"
) -> tuple[list, np.ndarray]:
    """q, k, v and the gradient of the output, 0 for queries that see no key; and which see one, [batch, queries]."""
    batch = max(mask.visible.shape[0], mask.group.shape[0])
    keys = mask.group.shape[1]
    queries = keys if mask.causal else mask.visible.shape[1]
    rng = np.random.default_rng(0)
    shapes = [(batch, heads, queries, head_dim), *[(batch, kv_heads, keys, head_dim)] * 2]
    q, k, v = (rng.normal(size=shape) for shape in shapes)
    some = np.broadcast_to(np.asarray(mask.dense()).any(-1), (batch, queries))
    change = rng.normal(size=q.shape) * some[:, None, :, None]
    return [jnp.asarray(x, dtype) for x in (q, k, v, change)], some


def by_implementation(implementation: AttentionImplementation) -> Callable[..., jax.Array]:
    def attend(*x):
        with attention_implementation(implementation):
            return attention(*x)

    return attend


FORMS = {"splash": by_implementation("splash"), "cudnn": _cudnn}  # the door takes no float32 to cuDNN


def attended(attend, mask, q, k, v, change, mesh=None) -> list[np.ndarray]:
    """The values and the gradients by q, k, v, as float32."""

    @jax.jit
    def run(q, k, v, change, mask):
        with use_mesh(mesh):
            out, backward = jax.vjp(lambda *x: attend(*x, mask), q, k, v)
            return out, *backward(change)

    given = (q, k, v, change, mask)
    if mesh is not None:
        given = jax.device_put(given, NamedSharding(mesh, PartitionSpec()))
    return [np.asarray(x, np.float32) for x in run(*given)]


def assert_same(got, want, some):
    """Values where a query sees a key, all gradients; and that what is discarded is finite.

    The bound is over the largest of what is compared: a sum of n products in whichever order is off by about
    sqrt(n) 2**-24 of its size, 1.4e-6 for the most keys here, of 520, and three sums follow each other in a gradient.
    """
    assert all(np.isfinite(x).all() for x in got)
    got[0], want[0] = (x * some[:, None, :, None] for x in (got[0], want[0]))
    for a, b, name in zip(got, want, ("values", "dq", "dk", "dv"), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max(), err_msg=name)


@pytest.mark.parametrize("case", [name for name in CASES if "blocks" not in name])
def test_a_dense_mask_is_what_the_groups_say(case):
    mask = CASES[case]
    (q, *_), _ = arrays(mask, 1, 1, 1)
    want = seen_by_hand(mask, q.shape[0], q.shape[2])
    np.testing.assert_array_equal(np.broadcast_to(mask.dense(), want.shape), want)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "case",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES],
)
def test_a_kernel_gives_what_the_plain_form_gives(case, form):
    mask = CASES[case]
    given, some = arrays(mask, *((2, 2, 80) if case == "tower" else (4, 1, 128)))
    assert_same(attended(FORMS[form], mask, *given), attended(by_implementation("xla"), mask, *given), some)


def test_a_function_is_traced_anew_for_another_implementation():
    mask = CASES["tower"]
    (q, k, v, _), _ = arrays(mask, 2, 2, 16)
    compiled, lowered = jax.jit(attention), {}
    for name in ("xla", "splash", "xla"):
        with attention_implementation(name):
            lowered.setdefault(name, []).append(compiled.lower(q, k, v, mask).as_text())
    (plain, again), (splash,) = lowered["xla"], lowered["splash"]
    assert plain == again != splash


@pytest.mark.slow
def test_splash_in_bfloat16_is_as_near_to_float32_as_the_plain_form():
    mask = CASES["tower"]
    given, _ = arrays(mask, 2, 2, 80, "bfloat16")
    want = attended(by_implementation("xla"), mask, *(x.astype("float32") for x in given))
    splash, plain = (attended(by_implementation(name), mask, *given) for name in ("splash", "xla"))
    for i, name in enumerate(("values", "dq", "dk", "dv")):
        off_splash, off_plain = (np.sqrt(np.mean((got[i] - want[i]) ** 2)) for got in (splash, plain))
        assert off_splash < 1.5 * off_plain, name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", [pytest.param("text padded on the left", marks=pytest.mark.slow), "tower"])
@pytest.mark.parametrize("shape", [(2, 1, 4), pytest.param((4, 1, 2), marks=pytest.mark.slow)], ids=str)
def test_on_a_mesh(case, form, shape):
    """Heads cut over eight devices, and rows, but for the three of the tower, which the mesh does not divide."""
    mask = CASES[case]
    given, some = arrays(mask, 8, 4, 16)
    attend = by_implementation("splash") if form == "splash" else lambda *x: _on_mesh(_cudnn, *x)
    assert_same(
        attended(attend, mask, *given, mesh=make_mesh(*shape)), attended(by_implementation("xla"), mask, *given), some
    )


def test_each_device_attends_to_its_own_rows_and_heads():
    mask = CASES["several images"]
    given, _ = arrays(mask, 8, 4, 16)
    seen = []

    def kernel(q, k, v, mask):
        seen.append((q.shape[:2], k.shape[:2], mask.visible.shape[0], mask.group.shape[0]))
        return q

    attended(lambda *x: _on_mesh(kernel, *x), mask, *given, mesh=make_mesh(2, 1, 4))
    assert set(seen) == {((1, 2), (1, 1), 1, 1)}


def test_which_kernel():
    """The kernel follows the platform of the mesh, and is used only where it supports the case."""
    several, single = (
        CASES["several images"],
        replace(CASES["several images"], visible=CASES["several images"].visible[:, :1]),
    )
    odd = tokens_of(["x" * 41])

    def takes_kernel(platform, mask, dtype="bfloat16", head_dim=80, queries=20):
        device = jax.sharding.AbstractDevice(device_kind="any", num_cores=1, platform=platform)
        q = jnp.zeros((2, 4, queries, head_dim), dtype)
        with use_abstract_mesh(make_mesh().abstract_mesh.update(abstract_device=device)):
            return select_kernel(q, mask) is not None

    assert not takes_kernel("cpu", several)
    assert takes_kernel("tpu", several) and takes_kernel("tpu", several, "float32")
    assert takes_kernel("gpu", several) and not takes_kernel("gpu", several, "float32")
    assert not takes_kernel("gpu", several, head_dim=84) and not takes_kernel("gpu", odd, queries=41)
    assert not takes_kernel("tpu", single, queries=1) and not takes_kernel("gpu", single, queries=1)
    assert select_kernel(jnp.zeros((2, 4, 20, 80)), several) is None


def test_blocks_are_whole_and_waste_little():
    for tokens in (1, 128, 129, 600, 1024, 6432, 6528):
        block, fill = _block_size(tokens)
        assert block % 128 == 0 and block <= 512 and (tokens + fill) % block == 0
        assert fill < max(128, 128 * (tokens + fill) // block)
    assert _block_size(1024) == (512, 0) and _block_size(6432) == (512, 224) and _block_size(600) == (384, 168)


@pytest.mark.parametrize(
    ("convention", "layout", "remat", "shape"),
    [
        pytest.param("meta", "unrolled", "none", None, marks=EXHAUSTIVE),
        pytest.param("transformers_4", "stacked", "full", None, marks=EXHAUSTIVE),
        pytest.param("meta", "stacked", "dots", (1, 4, 2), marks=pytest.mark.slow),
    ],
)
def test_the_whole_model_under_splash_attention(small, batch, convention, layout, remat, shape):
    """Hidden states, and the gradient of every weight, with padding on the left of a row and the right of another."""
    config = replace(small, convention=convention)
    mesh = make_mesh(*shape) if shape else None
    params = Mllama(config, rngs=nnx.Rngs(0), layout=layout, mesh=mesh).params
    batch = {name: np.concatenate([x, x[:1]]) for name, x in batch.items()}
    batch["attention_mask"][0, -3:] = 0
    batch["attention_mask"][1, :4] = 0
    present = batch["attention_mask"][..., None]
    direction = np.random.default_rng(0).normal(size=(*present.shape[:2], config.text.hidden_size)).astype(np.float32)

    def run(implementation):
        def loss(params):
            with use_mesh(mesh), attention_implementation(implementation):
                states = hidden_states(params, config, jax.tree.map(jnp.asarray, batch), remat) * present
            return jnp.vdot(states, direction), states

        (_, states), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return states, gradients

    (states, gradients), (want_states, want_gradients) = run("splash"), run("xla")
    assert off(states, want_states) < 1e-5
    for (path, got), want in zip(
        flatten_dict(gradients, sep=".").items(), flatten_dict(want_gradients, sep=".").values(), strict=True
    ):
        scale = max(float(jnp.abs(want).max()), 1e-6)
        assert float(jnp.abs(got - want).max()) < 1e-3 * scale, path
