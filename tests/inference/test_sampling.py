"""Sampling against transformers' own logits processors, and its distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.sampling import sample_token, top_k_top_p
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


def test_draws_follow_the_distribution():
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32))
    sampling, count = Sampling(1.0, top_k=3), 20_000
    drawn = sample_token(jnp.tile(logits, (count, 1)), jax.random.split(jax.random.key(0), count), sampling)
    share = np.bincount(np.asarray(drawn), minlength=4) / count
    np.testing.assert_allclose(share, np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.012)  # 3.5 standard errors


def test_zero_temperature_takes_the_likeliest():
    logits = np.random.default_rng(0).normal(size=(64, 100)).astype(np.float32)
    drawn = sample_token(jnp.asarray(logits), jax.random.split(jax.random.key(0), 64), Sampling())
    np.testing.assert_array_equal(drawn, logits.argmax(-1))


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.1}])
def test_a_setting_out_of_range(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)
