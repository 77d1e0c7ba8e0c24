"""Loss: cross-entropy in float32 over the trained tokens of a batch, or over the labels of logits."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int

from llava_cot_jax.checks import shown
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.choices import RematPolicy
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.inputs import ArrayLike
from llava_cot_jax.model.mllama import compute_logits, hidden_states
from llava_cot_jax.model.parameters import Params
from llava_cot_jax.model.sharding import constrain, local_size
from llava_cot_jax.rounding import ceil_div

LOGITS_CHUNK = 1024
"""Number of tokens per device whose logits are materialised at once: 0.5 GB in float32 with the published vocabulary.

Where lm_head is sharded over devices, it is gathered once for each such chunk, so that small chunks would cost more
time than they save memory.
"""


def causal_lm_loss(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Return the mean cross-entropy of each label given the tokens before it, as the models of transformers do.

    Args:
        logits: Logits that ``Mllama`` returns, [batch, tokens, vocab], of any float dtype. The loss is computed in
            float32.
        labels: Token ids, int [batch, tokens], not shifted: usually ``input_ids``, with -100 at tokens that have no
            part in the loss. Labels without a logit have no part either; ``<|image|>``, whose id is the size of the
            vocabulary, is one of them.

    Returns:
        Mean over the labels that have a part, a float32 scalar; 0 where there is none.

    Raises:
        UserError: The labels are not whole numbers, or do not have the shape [batch, tokens] of the logits.
    """
    for name, array in (("logits", logits), ("labels", labels)):
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            raise UserError(f"{name} is {shown(array)}; it must be an array")
    if labels.shape != logits.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise UserError(
            f"labels are {labels.dtype} {list(labels.shape)}; logits {list(logits.shape)} need integer labels "
            f"{list(logits.shape[:-1])}, one for each token"
        )
    targets = jnp.asarray(labels)[:, 1:]
    kept = (targets >= 0) & (targets < logits.shape[-1])
    losses = _cross_entropy(jnp.asarray(logits)[:, :-1].astype(jnp.float32), targets)
    return jnp.sum(jnp.where(kept, losses, 0.0)) / jnp.maximum(kept.sum(), 1)


@jax.named_scope("cross_entropy")
def _cross_entropy(logits: Float32[Array, "*batch vocab"], targets: Int[Array, "*batch"]) -> Float32[Array, "*batch"]:
    """Return the negative log-probability of each target. That of a target without a logit has no meaning."""
    # A gather would bring a vocabulary that is sharded over devices together.
    is_target = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == targets[..., None]
    target_logits = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - target_logits


def token_losses(
    params: Params, config: MllamaConfig, batch: Mapping[str, jax.Array], remat: RematPolicy
) -> Float32[Array, "batch tokens"]:
    """Return the negative log-probability of each token given those before it.

    The first token of a row, which has none before it, has loss 0. Losses of padding have no meaning.

    Args:
        params: Parameters as nested mappings.
        config: Configuration of the model.
        batch: Arrays of the batch, as ``Loader.batches`` yields them.
        remat: Activations of a layer that are saved for the backward pass.
    """
    hidden = hidden_states(params, config, batch, remat)  # [batch, tokens, hidden]
    targets = jnp.roll(batch["input_ids"], -1, axis=1)  # [batch, tokens]; the last one is not used

    @jax.checkpoint  # the logits are recomputed in the backward pass
    def chunk_losses(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden, targets = chunk  # [batch, size, hidden], [batch, size]
        return _cross_entropy(constrain(compute_logits(params, hidden), "batch", None, "vocab"), targets)

    tokens = targets.shape[1]
    count = ceil_div(tokens * local_size(len(targets), "batch"), LOGITS_CHUNK)
    size = ceil_div(tokens, count)  # chunks of equal size need little padding
    chunks = jax.tree.map(lambda x: _split(x, size), (hidden, targets))
    losses = jnp.moveaxis(jax.lax.map(chunk_losses, chunks), 0, 1)  # [batch, chunks, size]
    losses = losses.reshape(targets.shape[0], -1)[:, : tokens - 1]
    return jnp.pad(losses, ((0, 0), (1, 0)))


def _split(x: jax.Array, size: int) -> jax.Array:
    """[batch, tokens, ...] -> [chunks, batch, size, ...]."""
    x = jnp.pad(x, [(0, -x.shape[1] % size if axis == 1 else 0) for axis in range(x.ndim)])
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)
