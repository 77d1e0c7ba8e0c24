"""AdamW's settings, schedules and precisions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llava_cot_jax.errors import UserError
from llava_cot_jax.model.parameters import Parameter
from llava_cot_jax.training.optimizer import Optimizer, make_schedule, round_stochastically
from llava_cot_jax.training.settings import OptimizerSettings


def test_a_rounding_is_one_of_the_two_neighbours_and_right_on_average():
    x = jnp.float32([1.0, 1.001, -1.0035, 3.14159, 1e-30, 255.9, 65504.0])
    many = jax.vmap(lambda key: round_stochastically(x, key))(jax.random.split(jax.random.key(0), 20_000))
    many = np.asarray(many, np.float64)
    near = np.asarray(x.astype(jnp.bfloat16).astype(jnp.float32), np.float64)
    spacing = np.exp2(np.floor(np.log2(np.abs(np.asarray(x, np.float64)))) - 7)
    assert (np.abs(many - np.asarray(x)) < spacing).all()
    assert (np.ptp(many, axis=0)[1:5] > 0).all()  # those between two bfloat16s go both ways
    deviation = np.abs(many.mean(axis=0) - np.asarray(x, np.float64)) / spacing
    assert (deviation < 5 * 0.5 / math.sqrt(len(many))).all()
    assert (many[:, 0] == 1.0).all() and near[0] == 1.0  # what bfloat16 holds stays


def test_what_is_not_finite_stays_so():
    x = jnp.float32([jnp.inf, -jnp.inf, jnp.nan])
    for seed in range(50):
        got = np.asarray(round_stochastically(x, jax.random.key(seed)), np.float32)
        np.testing.assert_array_equal(got, np.asarray(x))


TABLE = {
    "w": Parameter((64, 32), (None, None), "normal", 1.0, ("w",)),
    "stack": Parameter((3, 16, 8), ("layers", None, None), "normal", 1.0, ("a", "b", "c"), stacked=True),
    "norm": Parameter((32,), (None,), "ones", 0.0, ("norm",)),
    "norms": Parameter((3, 32), ("layers", None), "ones", 0.0, ("x", "y", "z"), stacked=True),
}


def draw(seed: int, scale: float = 1.0) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(seed), len(TABLE))
    return {name: scale * jax.random.normal(key, p.shape) for key, (name, p) in zip(keys, TABLE.items(), strict=True)}


def run(settings: OptimizerSettings, steps: int, grads=lambda i: draw(100 + i)):
    """Parameters and state after so many steps."""
    optimizer = Optimizer(settings, lambda step: settings.learning_rate, TABLE)
    params = {name: x.astype(settings.dtype) for name, x in draw(0).items()}
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for i in range(steps):
        params, state = update(grads(i), state, params, jnp.int32(i))
    return params, state


def test_in_float32_it_is_optax_adamw():
    settings = OptimizerSettings(learning_rate=1e-2, b1=0.8, b2=0.95, eps=1e-6)
    got, _ = run(settings, 5)
    plain = optax.adamw(1e-2, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.0)
    params = draw(0)
    state = plain.init(params)

    @jax.jit  # as ours is: a compiler rounds otherwise than one operation at a time
    def step(grads, state, params):
        updates, state = plain.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for i in range(5):
        params, state = step(draw(100 + i), state, params)
    # In each of 5 steps a parameter is rounded once, and its update, of up to some learning rates, a few times.
    for name in TABLE:
        size = np.abs(params[name]).max() + 10 * 1e-2
        np.testing.assert_allclose(got[name], params[name], rtol=0, atol=5 * 2**-24 * size)


def test_weight_decay_leaves_norms_alone_in_stacks_too():
    params, _ = run(
        OptimizerSettings(learning_rate=0.1, weight_decay=0.5), 1, lambda i: jax.tree.map(jnp.zeros_like, draw(0))
    )
    for name, start in draw(0).items():
        np.testing.assert_allclose(params[name], start * (1.0 if "norm" in name else 0.95), rtol=1e-6)


def test_bfloat16_halves_the_bytes():
    for precision in ("bfloat16_stochastic", "bfloat16_nearest"):
        params, state = run(OptimizerSettings(precision=precision), 1)
        moments = [x for x in jax.tree.leaves(state) if x.size > 1]
        assert {x.dtype for x in [*params.values(), *moments]} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in run(OptimizerSettings(), 1)[0].values()} == {jnp.dtype(jnp.float32)}


def second_moments(precision: str) -> float:
    """Their mean after 1,000 steps of large gradients and 2,000 of small ones."""
    settings = OptimizerSettings(precision=precision)
    optimizer = Optimizer(settings, lambda step: 0.0, TABLE)
    params = {name: x.astype(settings.dtype) for name, x in draw(0).items()}

    def step(carry, i):
        grads = jax.tree.map(lambda p: jnp.where(i < 1000, 1.0, 0.01) * jnp.ones(p.shape), params)
        return optimizer.update(grads, carry[1], carry[0], i), None

    (_, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(3000)))((params, optimizer.init(params)))
    return float(state[0].nu["w"].astype(jnp.float32).mean())


@pytest.mark.slow
def test_second_moments_decay_with_stochastic_rounding_and_hardly_without():
    exact = second_moments("float32")
    assert second_moments("bfloat16_stochastic") == pytest.approx(exact, rel=0.02)
    nearest = second_moments("bfloat16_nearest")
    assert abs(nearest / exact - 1) > 0.5  # neither rises as it should, nor falls


@pytest.mark.parametrize("warmup", [0, 3])
def test_the_step_schedule_is_upstreams(warmup):
    rate = make_schedule(OptimizerSettings(learning_rate=1e-5, warmup_steps=warmup), steps=30, steps_per_epoch=10)
    for step in range(warmup, 30):
        assert float(rate(step)) == pytest.approx(1e-5 * 0.85 ** (step // 10))
    for step in range(warmup):
        assert float(rate(step)) == pytest.approx(1e-5 * step / warmup)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_falling_schedules(schedule):
    settings = OptimizerSettings(learning_rate=0.1, schedule=schedule, warmup_steps=10, final_lr_ratio=0.05)
    rate = make_schedule(settings, steps=110, steps_per_epoch=7)
    assert float(rate(5)) == pytest.approx(0.05)
    for step in (10, 35, 60, 110):
        along = (step - 10) / 100
        share = (1 + math.cos(math.pi * along)) / 2 if schedule == "cosine" else 1 - along
        assert float(rate(step)) == pytest.approx(0.1 * (0.05 + 0.95 * share), rel=1e-5)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"schedule": "stair"}, "schedule is 'stair'"),
        ({"precision": "float16"}, "precision is 'float16'"),
        ({"learning_rate": -1}, "learning_rate is -1"),
        ({"b2": 1.0}, "b2 is 1.0"),
        ({"eps": 0.0}, "eps is 0.0"),
    ],
)
def test_wrong_settings(setting, named):
    with pytest.raises(UserError, match=named):
        OptimizerSettings(**setting)
