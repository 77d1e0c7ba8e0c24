"""The state of a run, and the step that brings it on: one compiled program for each shape of batch."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llava_cot_jax.errors import UserError
from llava_cot_jax.model.choices import RematPolicy
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.parameters import Parameter
from llava_cot_jax.model.sharding import parameter_sharding, use_mesh
from llava_cot_jax.stages import STAGES
from llava_cot_jax.training.loss import token_losses
from llava_cot_jax.training.optimizer import Optimizer

Batch = Mapping[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What a run holds between two steps.

    Attributes:
        step: int32, steps done.
        trained: the arrays that training changes, by their paths: parameters of the model in the
            stacked layout, adapters, or both.
        frozen: the other parameters of the model.
        optimizer: the moments of the trained ones.
        skipped: int32, steps whose loss or gradient was not finite: of all that follows, the schedule of the
            learning rate too, only ``step`` knows that they were.
    """

    step: jax.Array
    trained: dict[str, jax.Array]
    frozen: dict[str, jax.Array]
    optimizer: Any
    skipped: jax.Array

    @classmethod
    def begin(
        cls, trained: Mapping[str, jax.Array], frozen: Mapping[str, jax.Array], optimizer: Optimizer, dtype: Any
    ) -> Self:
        """The state before the first step.

        Args:
            trained: see above.
            frozen: see above; they keep their dtypes.
            optimizer: of the run.
            dtype: that trained arrays are kept in.
        """
        kept = {path: array.astype(dtype) for path, array in trained.items()}
        return cls(jnp.int32(0), kept, dict(frozen), optimizer.init(kept), jnp.int32(0))


def frozen_paths(paths: Collection[str], patterns: Sequence[str]) -> set[str]:
    """The paths in which any of the regular expressions is found.

    Raises:
        UserError: a pattern that is none or matches nothing, or nothing left to train.
    """
    found = {path for pattern in patterns for path in matching(paths, pattern, "frozen_params")}
    if len(found) == len(paths):
        raise UserError("every parameter is frozen: leave one to train")
    return found


def matching(paths: Collection[str], pattern: str, setting: str) -> set[str]:
    """The paths in which the regular expression is found.

    Args:
        paths: of parameters.
        pattern: searched for, from anywhere in a path.
        setting: where a user wrote it, for the error.

    Raises:
        UserError: it is no regular expression, or matches nothing.
    """
    try:
        found = {path for path in paths if re.search(pattern, path)}
    except re.error as fault:
        raise UserError(f"{setting}: {pattern!r} is no regular expression: {fault}") from None
    if not found:
        name = "language_model.model.layers.0.self_attn.q_proj.weight"
        raise UserError(f"{setting}: {pattern!r} matches no parameter; they are named as {name}")
    return found


def state_sharding(state: State, table: Mapping[str, Parameter], mesh: Mesh) -> Any:
    """A tree like ``state``: arrays and moments as the mesh holds them by ``table``, the rest on every device.

    Raises:
        UserError: the mesh does not divide one.
    """

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name: Any = getattr(path[-1], "key", None)
        return parameter_sharding(table[name], mesh) if name in table else NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, state)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Losses:
    """Sums over the trained tokens of a batch.

    Attributes:
        total: float32 [1 + stages], minus log-probabilities by stage; the first are of no stage.
        tokens: float32 [1 + stages], how many tokens.
    """

    total: jax.Array
    tokens: jax.Array


def losses(
    trained: Mapping[str, jax.Array],
    frozen: Mapping[str, jax.Array],
    batch: Batch,
    *,
    config: MllamaConfig,
    dtype: Any,
    remat: RematPolicy,
    lora_scale: float = 1.0,
) -> Losses:
    """The losses of a batch, computed in ``dtype``; ``lora_b`` of every adapter is multiplied by ``lora_scale``."""
    arrays = {**trained, **frozen}
    arrays |= {path: lora_scale * array for path, array in arrays.items() if path.endswith(".lora_b")}
    params = unflatten_dict({path: array.astype(dtype) for path, array in arrays.items()}, sep=".")
    each = token_losses(params, config, batch, remat)  # [batch, tokens]
    stages = jax.nn.one_hot(batch["stage"], 1 + len(STAGES)) * batch["loss_mask"][..., None]
    return Losses(jnp.einsum("bt,bts->s", each, stages), jnp.einsum("bts->s", stages))


def make_step(
    config: MllamaConfig,
    table: Mapping[str, Parameter],
    optimizer: Optimizer,
    state: State,
    *,
    mesh: Mesh | None,
    dtype: Any,
    remat: RematPolicy,
    grad_accum_steps: int = 1,
    max_grad_norm: float = 0.0,
    lora_scale: float = 1.0,
) -> Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]:
    """The compiled step: the state after a batch, and what is to be told of it.

    The loss is the mean over all trained tokens of the global batch, however they fall on devices and
    micro-batches. The old state is donated.

    Args:
        config: the model's configuration.
        table: the declarations of all arrays of the state, by their paths.
        optimizer: see there.
        state: the first one, or shapes and dtypes like it.
        mesh: that the arrays lie on; the state after a step lies as ``state_sharding`` says.
        dtype: of the computation.
        remat: what of a layer is saved for the backward pass.
        grad_accum_steps: parts that a batch is computed in, one after the other; it must be divisible.
        max_grad_norm: the global norm that gradients are scaled down to; 0 leaves them as they are.
        lora_scale: of the adapters, ``LoraSettings.scale``.

    Returns:
        A function; its measures are ``loss``, ``gradient_norm``, ``tokens`` (trained ones),
        ``stage_losses`` and ``stage_tokens`` float32 [1 + stages], ``finite``, and ``skipped`` as in the state.
    """
    compute = partial(losses, config=config, dtype=dtype, remat=remat, lora_scale=lora_scale)

    def gradients(state: State, batch: Batch) -> tuple[dict[str, jax.Array], Losses]:
        count = jnp.maximum(batch["loss_mask"].sum(), 1).astype(jnp.float32)

        def loss(trained: dict[str, jax.Array], part: Batch) -> tuple[jax.Array, Losses]:
            found = compute(trained, state.frozen, part)
            return found.total.sum() / count, found

        gradient = jax.grad(loss, has_aux=True)
        if grad_accum_steps == 1:
            return gradient(state.trained, batch)

        def add(sums: Any, part: Batch) -> tuple[Any, None]:
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, gradient(state.trained, part)), None

        wide = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), state.trained)
        nothing = jnp.zeros(1 + len(STAGES))
        return jax.lax.scan(add, (wide, Losses(nothing, nothing)), _in_parts(batch, grad_accum_steps))[0]

    def step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        with use_mesh(mesh):
            grads, found = gradients(state, batch)
        norm = optax.global_norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
        loss = found.total.sum() / jnp.maximum(found.tokens.sum(), 1.0)
        if max_grad_norm:
            scale = jnp.minimum(1.0, max_grad_norm / jnp.maximum(norm, 1e-12))
            grads = jax.tree.map(lambda g: g * scale, grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        after = optimizer.update(grads, state.optimizer, state.trained, state.step - state.skipped)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, (state.trained, state.optimizer))
        trained, moments = kept
        after_step = State(state.step + 1, trained, state.frozen, moments, state.skipped + ~finite)
        return after_step, {
            "loss": loss,
            "gradient_norm": norm,
            "tokens": found.tokens.sum(),
            "stage_losses": found.total / jnp.maximum(found.tokens, 1.0),
            "stage_tokens": found.tokens,
            "finite": finite,
            "skipped": after_step.skipped,
        }

    if mesh is None:
        return jax.jit(step, donate_argnums=0)
    # Stated, or the compiler may lay the new state out otherwise than the old one.
    return jax.jit(step, donate_argnums=0, out_shardings=(state_sharding(state, table, mesh), None))


def _in_parts(batch: Batch, parts: int) -> Batch:
    """[batch, ...] -> [parts, batch / parts, ...]: every part-th row, so that each device keeps its own."""
    return {name: jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1) for name, x in batch.items()}
