"""Loss: cross-entropy in float32 over the trained tokens and the verifier's replies of a batch, or over labels."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from llava_cot_jax.checks import shown
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.inputs import ArrayLike
from llava_cot_jax.model.mllama import compute_logits
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
    params: Params, hidden: Float[Array, "batch tokens hidden"], input_ids: Int[Array, "batch tokens"]
) -> Float32[Array, "batch tokens"]:
    """Return the negative log-probability of each token given those before it.

    The first token of a row, which has none before it, has loss 0. Losses of padding have no meaning.

    Args:
        params: Parameters as nested mappings.
        hidden: Hidden state of each token, as ``hidden_states`` returns them.
        input_ids: int32, tokens.
    """
    targets = jnp.roll(input_ids, -1, axis=1)  # [batch, tokens]; the last one is not used

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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ProbeSums:
    """Sums over the verifier's replies of a batch, each by its weight.

    Attributes:
        replies: Number of the replies.
        total: Sum of the losses of the replies.
        weight: Sum of the weights.
        right: Weight of the replies whose likelier answer is that of the higher target.
        other: Sum of the probabilities of anything but the two answers.
    """

    replies: Float32[Array, ""]
    total: Float32[Array, ""]
    weight: Float32[Array, ""]
    right: Float32[Array, ""]
    other: Float32[Array, ""]

    def means(self) -> dict[str, jax.Array]:
        """Return the means by their names in metrics; 0 where there are no replies.

        The loss is that which is trained: the sum by weights over the number of replies. Weights have the mean 1 over a
        data set; over the sum of a batch's own, a batch of one reply would count as much whatever its weight is.
        """
        weight = self.weight.clip(min=jnp.finfo(jnp.float32).tiny)
        return {
            "verifier_loss": self.total / self.replies.clip(min=1),
            "verifier_accuracy": self.right / weight,
            "verifier_other_probability": self.other / weight,
        }


@jax.named_scope("probe_losses")
def probe_losses(
    params: Params, hidden: Float[Array, "batch tokens hidden"], batch: Mapping[str, jax.Array]
) -> ProbeSums:
    """Return the sums over the verifier's replies of a batch.

    The loss of a reply is the cross-entropy of its target over the whole vocabulary: with the target v, -v log p(yes)
    - (1 - v) log p(no). So it lowers the probability of anything else too.

    Args:
        params: Parameters as nested mappings.
        hidden: Hidden state of each token, as ``hidden_states`` returns them.
        batch: Arrays of the batch, as ``Loader.batches`` yields them.
    """
    index = batch["attention_mask"].sum(axis=-1) - 1  # the probe is the end of its row
    # A gather would bring batches that are sharded over devices together; the sum of one state and zeros is exact.
    is_last = jnp.arange(hidden.shape[1]) == index[:, None]
    last = jnp.sum(jnp.where(is_last[..., None], hidden, 0), axis=1)  # [batch, hidden]
    logits = constrain(compute_logits(params, last), "batch", "vocab")
    yes, no = (_cross_entropy(logits, batch["probe_answers"][:, i]) for i in range(2))
    value, weight = batch["probe_value"], batch["probe_weight"]

    def weighted_sum(each: Float32[Array, " batch"]) -> Float32[Array, ""]:
        return jnp.sum(jnp.where(weight > 0, weight * each, 0.0))

    return ProbeSums(
        (weight > 0).sum().astype(jnp.float32),
        weighted_sum(value * yes + (1 - value) * no),
        weight.sum(),
        weighted_sum(((yes <= no) == (value >= 0.5)).astype(jnp.float32)),
        weighted_sum(1 - jnp.exp(-yes) - jnp.exp(-no)),
    )


def _split(x: jax.Array, size: int) -> jax.Array:
    """[batch, tokens, ...] -> [chunks, batch, size, ...]."""
    x = jnp.pad(x, [(0, -x.shape[1] % size if axis == 1 else 0) for axis in range(x.ndim)])
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)
