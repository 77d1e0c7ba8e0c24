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


def gumbel_noise(keys: Key[Array, " batch"], ids: Int[Array, "batch k"]) -> Float[Array, "batch k"]:
    """Return standard Gumbel noise for tokens, each of which depends on a sequence's key and the token's id alone.

    A key with an id folded in is a hash of both, whose bits are taken as they are. To draw from that key would hash a
    second time, and over a whole vocabulary take twice as long.
    """
    hashes = jax.random.key_data(jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, ids))[..., 0]
    uniform = ((hashes >> 9).astype(jnp.float32) + 0.5) * 2.0**-23  # the middle of one of 2**23 equal parts of 0 to 1
    return -jnp.log(-jnp.log(uniform))


@jax.named_scope("sample_token")
def sample_token(
    logits: Float[Array, "batch vocab"],
    keys: Key[Array, " batch"],
    sampling: Sampling,
    temperature: Float[Array, " batch"] | None = None,
) -> Int[Array, " batch"]:
    """Sample one token for each sequence: that with the largest sum of logit over temperature and noise.

    A token keeps its noise where rounding changes its rank, or where top_k and top_p keep other tokens beside it.

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
    choice = jnp.argmax(scaled + gumbel_noise(keys, ids), axis=-1)
    if temperature is not None:
        choice = jnp.where(temperature > 0, choice, jnp.argmax(scaled, axis=-1))
    return jnp.take_along_axis(ids, choice[:, None], axis=-1)[:, 0]
