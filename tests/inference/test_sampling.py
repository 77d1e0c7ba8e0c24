"""Sampling against transformers' own logits processors, and its distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.stats import chisquare, gumbel_r, kstest
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.sampling import gumbel_noise, sample_token, top_k_top_p
from llava_cot_jax.inference.settings import Sampling

SETTINGS = [
    Sampling(0.6),
    Sampling(0.6, top_k=50),
    Sampling(0.6, top_p=0.9),
    Sampling(0.6, top_k=50, top_p=0.9),
    Sampling(1.7, top_k=5, top_p=0.5),
    Sampling(0.2, top_p=0.05),
    Sampling(1.0, top_k=1),
    Sampling(1.0, top_k=5000),
]


def probabilities_there(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """What transformers would draw from: [batch, vocabulary]."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k is not None:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return torch.softmax(warpers(None, torch.tensor(logits)), -1).numpy()


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_the_distribution_is_that_of_transformers(sampling, spread):
    logits = np.random.default_rng(0).normal(0, spread, (16, 1000)).astype(np.float32)
    scaled, ids = top_k_top_p(jnp.asarray(logits), sampling)
    got = np.zeros_like(logits)
    np.put_along_axis(got, np.asarray(ids), np.asarray(jax.nn.softmax(scaled, axis=-1)), axis=1)
    want = probabilities_there(logits, sampling)
    np.testing.assert_array_equal(got > 0, want > 0)
    # Here and there a logit over the temperature is off by 2**-24 of itself, and by as much again less the largest one;
    # its exponential is off by that share, and by a few units in the last place, as their sum is.
    largest = np.abs(logits).max() / sampling.temperature
    np.testing.assert_allclose(got, want, rtol=2**-21 * (1 + largest))


DRAWS = 40_000


def draw(logits: np.ndarray, sampling: Sampling, count: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Draws of one token after the same logits, each with a key of its own."""
    keys = jax.random.split(jax.random.key(seed), count)
    return np.asarray(jax.jit(sample_token, static_argnums=2)(jnp.tile(logits, (count, 1)), keys, sampling))


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [Sampling(1.3), Sampling(0.8, top_k=50), Sampling(0.6, top_k=50, top_p=0.9)])
def test_draws_follow_the_distribution_of_transformers(sampling):
    logits = np.random.default_rng(1).normal(0, 2, 300).astype(np.float32)
    expected = DRAWS * probabilities_there(logits[None], sampling)[0].astype(np.float64)
    counts = np.bincount(draw(logits, sampling), minlength=len(logits))
    assert not counts[expected == 0].any()
    likely = expected >= 10
    observed, wanted = (np.append(x[likely], x[~likely].sum()) for x in (counts, expected))  # the rare ones as one
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    assert chisquare(observed, wanted * DRAWS / wanted.sum()).pvalue > 0.001


@pytest.mark.parametrize("axis", ["keys", "ids"])
def test_noise_is_gumbels_and_unrelated_over_keys_and_ids(axis):
    keys = jax.random.split(jax.random.key(3), 400)
    noise = np.asarray(gumbel_noise(keys, jnp.tile(jnp.arange(400), (400, 1))), np.float64)
    noise = noise if axis == "ids" else noise.T
    assert kstest(noise.ravel(), gumbel_r.cdf).pvalue > 0.01
    for lag in (1, 2, 64):
        assert abs(np.corrcoef(noise[:, lag:].ravel(), noise[:, :-lag].ravel())[0, 1]) < 4 / noise.size**0.5


LEADERS = 7, 3
"""Tokens with the same largest logit but for its last bit."""


@pytest.mark.parametrize("sampling", [Sampling(1.0, top_k=8), Sampling(1.0, top_k=8, top_p=0.95), Sampling(1.0)])
def test_two_tokens_that_change_places_keep_their_noise(sampling):
    logits = np.random.default_rng(2).normal(0, 1, 100).astype(np.float32)
    drawn = []
    for first, second in (LEADERS, LEADERS[::-1]):
        turned = logits.copy()
        turned[second] = logits.max() + 1
        turned[first] = np.nextafter(turned[second], np.float32(np.inf))
        assert jax.lax.top_k(turned, 2)[1].tolist() == [first, second]
        drawn.append(draw(turned, sampling, 2000))
    np.testing.assert_array_equal(*drawn)
    assert min((drawn[0] == leader).mean() for leader in LEADERS) > 0.05


def test_tokens_that_stay_are_drawn_alike_with_and_without_top_k():
    logits = np.full(1000, -1e4, np.float32)
    kept = np.random.default_rng(4).permutation(1000)[:20]
    logits[kept] = np.linspace(-1, 1, 20)
    whole = draw(logits, Sampling(0.9), 2000)
    assert set(whole) == set(kept)
    for sampling in (Sampling(0.9, top_k=20), Sampling(0.9, top_k=300), Sampling(0.9, top_k=300, top_p=0.9999)):
        np.testing.assert_array_equal(draw(logits, sampling, 2000), whole)


def test_zero_temperature_takes_the_likeliest():
    logits = np.random.default_rng(0).normal(size=(64, 100)).astype(np.float32)
    drawn = sample_token(jnp.asarray(logits), jax.random.split(jax.random.key(0), 64), Sampling())
    np.testing.assert_array_equal(drawn, logits.argmax(-1))


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.1}])
def test_a_setting_out_of_range(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)
