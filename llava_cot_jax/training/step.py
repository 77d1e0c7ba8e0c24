"""Training step: loss, gradient, clipping and optimizer update, as one compiled program for each shape of batch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh
from jaxtyping import Array, Float32

from llava_cot_jax.model.choices import RematPolicy
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.mllama import hidden_states
from llava_cot_jax.model.parameters import Parameter
from llava_cot_jax.model.sharding import use_mesh
from llava_cot_jax.stage_format import STAGES
from llava_cot_jax.training.loss import ProbeSums, probe_losses, token_losses
from llava_cot_jax.training.optimizer import Optimizer
from llava_cot_jax.training.settings import LoraTokens
from llava_cot_jax.training.state import TrainState, state_sharding

Batch = Mapping[str, jax.Array]
"""Arrays of a batch, as ``Loader.batches`` yields them."""

Metrics = dict[str, jax.Array]
"""Measures of a step, as ``make_train_step`` describes them."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossSums:
    """Sums over the trained tokens of a batch, by stage. The first entry is for tokens outside every stage.

    Attributes:
        total: Sums of the losses of the tokens.
        tokens: Numbers of tokens.
        probes: Sums over the verifier's replies; None where the data set has none.
    """

    total: Float32[Array, " stages"]
    tokens: Float32[Array, " stages"]
    probes: ProbeSums | None = None

    def objective(self, verifier_weight: float) -> jax.Array:
        """Return the mean loss of a token and, if there are replies, ``verifier_weight`` times ``verifier_loss``."""
        mean = self.total.sum() / jnp.maximum(self.tokens.sum(), 1.0)
        return mean if self.probes is None else mean + verifier_weight * self.probes.means()["verifier_loss"]


def loss_sums(
    trained: Mapping[str, jax.Array],
    frozen: Mapping[str, jax.Array],
    batch: Batch,
    *,
    config: MllamaConfig,
    dtype: Any,
    remat: RematPolicy,
    lora_scale: float = 1.0,
    lora_tokens: LoraTokens = "all",
) -> LossSums:
    """Compute the losses of a batch.

    Args:
        trained: Arrays that training changes, by path.
        frozen: Other parameters of the model, by path.
        batch: Arrays of the batch.
        config: Configuration of the model.
        dtype: Dtype of the computation, to which all arrays are cast.
        remat: Activations of a layer that are saved for the backward pass.
        lora_scale: Factor by which ``lora_b`` of every adapter is multiplied.
        lora_tokens: Tokens that the adapters act on. Where these are the verifier's question alone, no adapter has a
            part in the losses of answers, which are left out.
    """
    arrays = {**trained, **frozen}
    arrays |= {path: lora_scale * array for path, array in arrays.items() if path.endswith(".lora_b")}
    params = unflatten_dict({path: array.astype(dtype) for path, array in arrays.items()}, sep=".")
    if lora_tokens == "probe":
        hidden = hidden_states(params, config, batch, remat, adapted=batch["probe"])
        none = jnp.zeros(1 + len(STAGES))
        return LossSums(none, none, probe_losses(params, hidden, batch))
    hidden = hidden_states(params, config, batch, remat)
    losses = token_losses(params, hidden, batch["input_ids"])  # [batch, tokens]
    stages = jax.nn.one_hot(batch["stage"], 1 + len(STAGES)) * batch["loss_mask"][..., None]
    probes = probe_losses(params, hidden, batch) if "probe" in batch else None
    return LossSums(jnp.einsum("bt,bts->s", losses, stages), jnp.einsum("bts->s", stages), probes)


def make_train_step(
    config: MllamaConfig,
    table: Mapping[str, Parameter],
    optimizer: Optimizer,
    state: TrainState,
    *,
    mesh: Mesh | None,
    dtype: Any,
    remat: RematPolicy,
    grad_accum_steps: int = 1,
    max_grad_norm: float = 0.0,
    lora_scale: float = 1.0,
    lora_tokens: LoraTokens = "all",
    verifier_weight: float = 1.0,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Return the compiled training step, a function of a state, which it donates, and a batch.

    The loss is the mean over all trained tokens of the global batch, however they fall on devices and micro-batches.
    Where the data set trains the verifier, the mean over its replies in the global batch is added, of which each is
    multiplied by its weight.

    Args:
        config: Configuration of the model.
        table: Declarations of all arrays of the state, by path.
        optimizer: Optimizer of the run.
        state: First state, or shapes and dtypes like it.
        mesh: Mesh on which the arrays are. The state after a step is sharded as ``state_sharding`` says.
        dtype: Dtype of the computation.
        remat: Activations of a layer that are saved for the backward pass.
        grad_accum_steps: Number of micro-batches that a batch is computed in. It divides the batch.
        max_grad_norm: Global norm to which larger gradients are scaled down; 0 leaves gradients as they are.
        lora_scale: Factor of the adapters' output, ``LoraSettings.scale``.
        lora_tokens: Tokens that the adapters act on, ``LoraSettings.tokens``.
        verifier_weight: Factor of the mean loss of the verifier's replies, ``VerifierSettings.weight``.

    Returns:
        Function that returns the state after the batch, and the measures ``loss``, ``gradient_norm``, ``tokens``
        (number of trained tokens), ``stage_losses`` and ``stage_tokens`` (float32 [1 + stages]), ``finite``, and
        ``skipped`` as in the state. Where the data set trains the verifier, also those of ``ProbeSums.means``, and
        ``replies``, the number of the batch's replies.
    """
    loss = partial(loss_sums, config=config, dtype=dtype, remat=remat, lora_scale=lora_scale, lora_tokens=lora_tokens)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with use_mesh(mesh), jax.named_scope("loss_and_gradients"):
            grads, sums = _gradients(loss, state, batch, grad_accum_steps, verifier_weight)
        with jax.named_scope("gradient_norm"):
            norm = optax.global_norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
            if max_grad_norm:
                grads = _clipped(grads, norm, max_grad_norm)
        mean_loss = sums.objective(verifier_weight)
        finite = jnp.isfinite(mean_loss) & jnp.isfinite(norm)
        with jax.named_scope("optimizer"):
            state = _updated(state, grads, optimizer, finite)
        return state, {
            "loss": mean_loss,
            "gradient_norm": norm,
            "tokens": sums.tokens.sum(),
            "stage_losses": sums.total / jnp.maximum(sums.tokens, 1.0),
            "stage_tokens": sums.tokens,
            "finite": finite,
            "skipped": state.skipped,
            **({"replies": sums.probes.replies, **sums.probes.means()} if sums.probes else {}),
        }

    if mesh is None:
        return jax.jit(train_step, donate_argnums=0)
    # Without stated shardings, the compiler may lay the new state out differently from the old one.
    return jax.jit(train_step, donate_argnums=0, out_shardings=(state_sharding(state, table, mesh), None))


def _gradients(
    loss: Callable[..., LossSums], state: TrainState, batch: Batch, num_micro_batches: int, verifier_weight: float
) -> tuple[dict[str, jax.Array], LossSums]:
    """Return the gradient of the mean loss of a batch with respect to the trained arrays, and the sums of losses."""
    count = jnp.maximum(batch["loss_mask"].sum(), 1).astype(jnp.float32)
    if has_probes := "probe" in batch:
        probe_scale = verifier_weight / jnp.maximum((batch["probe_weight"] > 0).sum(), 1).astype(jnp.float32)

    def mean_loss(trained: dict[str, jax.Array], micro_batch: Batch) -> tuple[jax.Array, LossSums]:
        sums = loss(trained, state.frozen, micro_batch)
        mean = sums.total.sum() / count
        return mean + probe_scale * sums.probes.total if sums.probes else mean, sums

    gradient = jax.grad(mean_loss, has_aux=True)
    if num_micro_batches == 1:
        return gradient(state.trained, batch)

    def accumulate(sums: Any, micro_batch: Batch) -> tuple[Any, None]:
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, gradient(state.trained, micro_batch)), None

    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), state.trained)
    by_stage, zero = jnp.zeros(1 + len(STAGES)), jnp.zeros(())
    start = zeros, LossSums(by_stage, by_stage, ProbeSums(*[zero] * len(fields(ProbeSums))) if has_probes else None)
    return jax.lax.scan(accumulate, start, _micro_batches(batch, num_micro_batches))[0]


def _micro_batches(batch: Batch, number: int) -> Batch:
    """[batch, ...] -> [number, batch / number, ...]: every number-th example, so that each device keeps its own."""
    return {
        name: jnp.swapaxes(x.reshape(x.shape[0] // number, number, *x.shape[1:]), 0, 1) for name, x in batch.items()
    }


def _clipped(grads: dict[str, jax.Array], norm: jax.Array, max_norm: float) -> dict[str, jax.Array]:
    """Return the gradients, scaled down if their global norm is larger than ``max_norm``."""
    scale = jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-12))
    return jax.tree.map(lambda g: g * scale, grads)


def _updated(state: TrainState, grads: dict[str, jax.Array], optimizer: Optimizer, finite: jax.Array) -> TrainState:
    """Return the state after a step, which keeps its arrays if the loss or the gradient was not finite."""
    after = optimizer.update(grads, state.optimizer, state.trained, state.step - state.skipped)
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, (state.trained, state.optimizer))
    trained, moments = kept
    return TrainState(state.step + 1, trained, state.frozen, moments, state.skipped + ~finite)
