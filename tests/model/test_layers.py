"""Tests of the layers against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from llava_cot_jax.model.config import RopeScaling, TextConfig
from llava_cot_jax.model.layers import (
    KVSegment,
    apply_rope,
    attention,
    cascade_attention,
    is_stacked,
    linear,
    rope_cos_sin,
    rope_frequencies,
)


def test_parameters_are_a_tree_of_arrays():
    """The check of types that runs in tests takes arrays of any dtype and tracers, and refuses any other leaf."""
    x, w = jnp.ones((2, 3)), {"weight": jnp.ones((5, 3))}
    assert jax.jit(linear)(x, w).shape == jax.eval_shape(linear, x, w).shape == (2, 5)
    layers = {"0": {"input_layernorm": w}}
    for dtype in ("bfloat16", "float8_e4m3fn", "int8"):
        assert is_stacked(layers | {"1": {"mlp": {"weight": jnp.ones(5, dtype)}}})
    for leaf in ("float32", 1.0, np.ones(5)):
        with pytest.raises(TypeCheckError, match="parameter 'layers'"):
            is_stacked(layers | {"1": {"mlp": {"weight": leaf}}})
        with pytest.raises(TypeCheckError, match="parameter 'w'"):
            linear(x, w | {"bias": leaf})
    with pytest.raises(TypeCheckError, match="parameter 'w'"):
        linear(x, w["weight"])


def test_rope_scaling_stretches_only_long_wavelengths():
    """The expected values follow Meta's rule, which is stated in wavelengths."""
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    config = TextConfig(rope_scaling=scaling)
    plain = 1 / 500000 ** (np.arange(0, 128, 2) / 128)
    want = []
    for frequency in plain:
        wavelength = 2 * np.pi / frequency
        smooth = (8192 / wavelength - 1) / 3
        between = (1 - smooth) * frequency / 8 + smooth * frequency
        want.append(frequency / 8 if wavelength > 8192 else frequency if wavelength < 2048 else between)
    np.testing.assert_allclose(rope_frequencies(config), want, rtol=1e-6)


def test_rope_rotates_halves_and_tells_far_positions_apart():
    config = TextConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, rope_scaling=None)
    x = np.random.default_rng(0).normal(size=(1, 4, 2, 16)).astype(np.float32)
    positions = np.array([[256, 257]])
    got = np.asarray(apply_rope(jnp.asarray(x), *rope_cos_sin(jnp.asarray(positions), config)))
    turned = (x[..., :8] + 1j * x[..., 8:]) * np.exp(1j * positions[..., None] * rope_frequencies(config))[:, None]
    # An angle, of up to 257 radians, is rounded twice: its frequency, and itself. The turned has up to sqrt(2) of x.
    largest = np.abs(x).max()
    angle = 257 * 2 * 2**-24 * np.sqrt(2) * largest
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), rtol=0, atol=angle)
    bf16 = apply_rope(jnp.asarray(x, jnp.bfloat16), *rope_cos_sin(jnp.asarray(positions), config))
    # What is turned and what comes of it are rounded to 8 bits.
    np.testing.assert_allclose(np.asarray(bf16, np.float32), got, rtol=0, atol=2 * 2**-9 * np.sqrt(2) * largest)


@pytest.mark.parametrize(
    ("questions", "candidates", "kv_heads", "group", "tokens"),
    [(1, 1, 1, 1, 1), (2, 3, 2, 3, 1), (3, 2, 1, 2, 5), (2, 1, 2, 1, 4), (1, 4, 2, 2, 3)],
)
def test_attention_to_two_segments_is_attention_to_the_whole_cache(questions, candidates, kv_heads, group, tokens):
    """A prefix of each question, a suffix of each candidate, any lengths; scores up to some hundreds."""
    rows, capacity, room, dim = questions * candidates, 17, 9, 8

    @jax.jit
    def both_ways(q, shared, own, before, mine):
        k, v = (
            jnp.concatenate([jnp.repeat(x, candidates, axis=0), y], axis=2) for x, y in zip(shared, own, strict=True)
        )
        before_all = jnp.broadcast_to(before.repeat(candidates, 0), (rows, tokens, capacity))
        joined = attention(q, k, v, jnp.concatenate([before_all, mine], axis=-1))
        return cascade_attention(q, [KVSegment(*own, mine), KVSegment(*shared, before)]), joined

    for seed in range(40):
        rng = np.random.default_rng(seed)

        def normal(*shape, rng=rng):
            return rng.normal(size=shape, scale=rng.choice([0.5, 8.0])).astype(np.float32)

        q = normal(rows, kv_heads * group, tokens, dim)
        shared = normal(questions, kv_heads, capacity, dim), normal(questions, kv_heads, capacity, dim)
        own = normal(rows, kv_heads, room, dim), normal(rows, kv_heads, room, dim)
        before = np.arange(capacity) < rng.integers(1, capacity + 1, (questions, 1, 1))  # [questions, 1, capacity]
        start = rng.integers(0, room - tokens + 1, (rows, 1, 1))
        mine = np.arange(room) <= start + np.arange(tokens)[:, None]  # [rows, tokens, room]
        got, want = both_ways(q, shared, own, before, mine)
        # A score, a sum of ``dim`` products, is off by up to ``dim`` 2**-24 of their magnitudes, here and there; a
        # softmax turns that into as large a share of a weight, above and below its fraction.
        largest = max(np.abs(shared[1]).max(), np.abs(own[1]).max())
        size = np.linalg.norm(q, axis=-1).max() / np.sqrt(dim)
        size *= max(np.linalg.norm(keys, axis=-1).max() for keys in (shared[0], own[0]))
        np.testing.assert_allclose(got, want, rtol=0, atol=4 * dim * 2**-24 * max(1, size) * largest)
