"""Sampling of a token from logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from llava_cot_jax.inference.settings import Sampling


def top_k_top_p(
    logits: Float[Array, "batch vocab"], sampling: Sampling, temperature: Float[Array, " batch"] | None = None
) -> tuple[Float[Array, "batch k"], Int[Array, "batch k"]]:
    """Return the tokens that a draw may take.

    Args:
        logits: Logits.
        sampling: Settings, with a temperature above 0.
        temperature: Temperature above 0 of each sequence to use in place of that of ``sampling``.

    Returns:
        Logits over the temperature, -inf where top_p excludes a token, and the ids of their tokens.
    """
    scaled = logits / (sampling.temperature if temperature is None else temperature[:, None])
    vocab = logits.shape[-1]
    if sampling.top_k is None and sampling.top_p == 1:
        return scaled, jnp.broadcast_to(jnp.arange(vocab, dtype=jnp.int32), scaled.shape)
    scaled, ids = jax.lax.top_k(scaled, min(sampling.top_k or vocab, vocab))  # descending
    if sampling.top_p == 1:  # the sum of rounded probabilities reaches 1 too soon
        return scaled, ids
    probabilities = jax.nn.softmax(scaled, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # sum over the likelier tokens
    kept = (before < sampling.top_p).at[:, 0].set(True)
    return jnp.where(kept, scaled, -jnp.inf), ids


@jax.named_scope("sample_token")
def sample_token(
    logits: Float[Array, "batch vocab"],
    keys: Key[Array, " batch"],
    sampling: Sampling,
    temperature: Float[Array, " batch"] | None = None,
) -> Int[Array, " batch"]:
    """Sample one token for each sequence.

    Args:
        logits: Logits.
        keys: Random key of each sequence.
        sampling: Settings; with temperature 0, only taking the likeliest token is compiled.
        temperature: Temperature of each sequence to use in place of that of ``sampling``, if the latter is above 0; 0
            takes the likeliest token.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    usable = None if temperature is None else jnp.where(temperature > 0, temperature, 1.0)
    scaled, ids = top_k_top_p(logits, sampling, usable)
    choice = jax.vmap(jax.random.categorical)(keys, scaled)
    if temperature is not None:
        choice = jnp.where(temperature > 0, choice, jnp.argmax(scaled, axis=-1))
    return jnp.take_along_axis(ids, choice[:, None], axis=-1)[:, 0]
