"""The loss: cross-entropy in float32 over the trained tokens of a batch."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from llava_cot_jax.model.choices import RematPolicy
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.mllama import compute_logits, hidden_states
from llava_cot_jax.model.parameters import Params
from llava_cot_jax.model.sharding import constrain, local_size
from llava_cot_jax.rounding import ceil_div

LOGITS = 1024
"""Tokens on a device whose logits stand at a time, 0.5 GB in float32 with the published vocabulary. Where lm_head is
cut over devices it is gathered for each such part of a batch: few tokens at a time would cost more than memory."""


def token_losses(params: Params, config: MllamaConfig, batch: Mapping[str, jax.Array], remat: RematPolicy) -> jax.Array:
    """Minus the log-probability of each token given those before it, float32 [batch, tokens].

    The first token of a row has none before it: 0. Of no meaning at padding.

    Args:
        params: the parameters as a nest of dicts.
        config: the model's configuration.
        batch: as ``Loader`` yields it.
        checkpointing: what of a layer is saved for the backward pass.
    """
    hidden = hidden_states(params, config, batch, remat)  # [batch, tokens, hidden]
    targets = jnp.roll(batch["input_ids"], -1, axis=1)  # [batch, tokens]; the last one is not used

    @jax.checkpoint  # the logits are made again in the backward pass
    def chunk_losses(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden, targets = part  # [batch, size, hidden], [batch, size]
        scores = constrain(compute_logits(params, hidden), "batch", None, "vocab")
        # Not a gather, which would bring a vocabulary that is cut over devices together.
        places = jax.lax.broadcasted_iota(targets.dtype, scores.shape, 2) == targets[..., None]
        chosen = jnp.sum(jnp.where(places, scores, 0.0), axis=-1)
        return jax.nn.logsumexp(scores, axis=-1) - chosen

    tokens = targets.shape[1]
    count = ceil_div(tokens * local_size(len(targets), "batch"), LOGITS)
    size = ceil_div(tokens, count)  # chunks of one size, so that little is filled up
    parts = jax.tree.map(lambda x: _in_chunks(x, size), (hidden, targets))
    losses = jnp.moveaxis(jax.lax.map(chunk_losses, parts), 0, 1)  # [batch, chunks, size]
    losses = losses.reshape(targets.shape[0], -1)[:, : tokens - 1]
    return jnp.pad(losses, ((0, 0), (1, 0)))


def _in_chunks(x: jax.Array, size: int) -> jax.Array:
    """[batch, tokens, ...] -> [chunks, batch, size, ...]."""
    x = jnp.pad(x, [(0, -x.shape[1] % size if axis == 1 else 0) for axis in range(x.ndim)])
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)
