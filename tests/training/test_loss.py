"""The loss of logits and labels against transformers', and against the loss of training."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.loss.loss_utils import ForCausalLMLoss

from llava_cot_jax import Mllama, causal_lm_loss
from llava_cot_jax.model.mllama import hidden_states
from llava_cot_jax.training.loss import token_losses

VOCABULARY = 11


def drawn(dtype=jnp.float32) -> tuple[jax.Array, np.ndarray]:
    rng = np.random.default_rng(0)
    logits = jnp.asarray(3 * rng.normal(size=(3, 8, VOCABULARY)), dtype)
    labels = rng.integers(0, VOCABULARY, (3, 8))
    labels[rng.random(labels.shape) < 0.4] = -100
    return logits, labels


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_loss_and_gradient_are_those_of_transformers(dtype):
    """The sums of 13 terms of float32 agree to a few of its epsilons of 1.2e-7."""
    logits, labels = drawn(dtype)
    theirs = torch.tensor(np.asarray(logits, np.float32)).requires_grad_()
    want = ForCausalLMLoss(theirs, torch.tensor(labels), VOCABULARY)
    want.backward()
    loss, gradient = jax.value_and_grad(lambda x: causal_lm_loss(x, labels))(logits.astype(jnp.float32))
    assert causal_lm_loss(logits, labels).dtype == jnp.float32
    np.testing.assert_allclose(loss, want.item(), rtol=1e-6)
    np.testing.assert_allclose(causal_lm_loss(logits, labels), want.item(), rtol=1e-6)
    np.testing.assert_allclose(gradient, theirs.grad, atol=1e-7)


def test_a_label_without_a_logit_has_no_part():
    """The id of an image token is the size of the vocabulary; torch takes it for a mistake, and a gather gives NaN."""
    logits, labels = drawn()
    with_images = labels.copy()
    with_images[:, 2], labels[:, 2] = VOCABULARY, -100
    np.testing.assert_array_equal(causal_lm_loss(logits, with_images), causal_lm_loss(logits, labels))
    gradient = jax.grad(lambda x: causal_lm_loss(x, with_images))(logits)
    assert np.isfinite(gradient).all() and not gradient[:, 1].any()


def test_no_label_at_all():
    logits, labels = drawn()
    assert causal_lm_loss(logits, np.full_like(labels, -100)) == 0


@pytest.mark.slow
def test_it_is_the_loss_of_training(small, batch):
    config = replace(small, text=replace(small.text, num_hidden_layers=1, cross_attention_layers=()))
    model, batch = Mllama(config, rngs=nnx.Rngs(0)), {name: batch[name] for name in ("input_ids", "attention_mask")}
    trained = np.random.default_rng(0).random(batch["input_ids"].shape) < 0.5
    trained &= (batch["input_ids"] < small.text.vocab_size) & batch["attention_mask"].astype(bool)
    trained[:, 0] = False
    hidden = hidden_states(model.params, config, jax.tree.map(jnp.asarray, batch))
    losses = np.asarray(token_losses(model.params, hidden, jnp.asarray(batch["input_ids"])))
    got = causal_lm_loss(model(**batch), np.where(trained, batch["input_ids"], -100))
    np.testing.assert_allclose(got, losses[trained].mean(), rtol=1e-5)
