"""How a token is drawn from logits."""

import jax
import jax.numpy as jnp

from llava_cot_jax.inference.settings import Sampling


def candidates(
    logits: jax.Array, sampling: Sampling, temperature: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The tokens that a draw may take.

    Args:
        logits: float32 [batch, vocabulary].
        sampling: with a temperature above 0.
        temperature: float32, in place of ``sampling``'s, likewise above 0.

    Returns:
        Scaled logits float32 [batch, k], -inf where top_p shut a token out, and its id int32 [batch, k].
    """
    scaled = logits / (sampling.temperature if temperature is None else temperature)
    vocabulary = logits.shape[-1]
    if sampling.top_k is None and sampling.top_p == 1:
        return scaled, jnp.broadcast_to(jnp.arange(vocabulary, dtype=jnp.int32), scaled.shape)
    scaled, ids = jax.lax.top_k(scaled, min(sampling.top_k or vocabulary, vocabulary))  # descending
    if sampling.top_p == 1:  # the sum of rounded probabilities reaches 1 too soon
        return scaled, ids
    probabilities = jax.nn.softmax(scaled, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # of the likelier tokens
    kept = (before < sampling.top_p).at[:, 0].set(True)
    return jnp.where(kept, scaled, -jnp.inf), ids


def draw(logits: jax.Array, keys: jax.Array, sampling: Sampling, temperature: jax.Array | None = None) -> jax.Array:
    """One token of each row.

    Args:
        logits: float32 [batch, vocabulary].
        keys: [batch], a key a row.
        sampling: its settings; at temperature 0 nothing else is compiled than taking the likeliest token.
        temperature: float32, in place of a temperature of ``sampling`` above 0; 0 takes the likeliest token.

    Returns:
        int32 [batch].
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    usable = None if temperature is None else jnp.where(temperature > 0, temperature, 1.0)
    scaled, ids = candidates(logits, sampling, usable)
    choice = jax.vmap(jax.random.categorical)(keys, scaled)
    if temperature is not None:
        choice = jnp.where(temperature > 0, choice, jnp.argmax(scaled, axis=-1))
    return jnp.take_along_axis(ids, choice[:, None], axis=-1)[:, 0]
