"""Optimizer: AdamW with its schedules, and the precisions in which parameters and moments are kept."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llava_cot_jax.model.parameters import Parameter
from llava_cot_jax.training.settings import OptimizerSettings

Arrays = Mapping[str, jax.Array]
"""Arrays by path."""


def make_schedule(settings: OptimizerSettings, steps: int, steps_per_epoch: int, shift: int = 0) -> optax.Schedule:
    """Return the learning rate as a function of the number of updates before it, which leaves out skipped steps.

    Args:
        settings: Settings of the optimizer.
        steps: Number of steps of the run.
        steps_per_epoch: Number of steps of an epoch.
        shift: Number of steps by which the schedule is ahead of the updates, or if negative, behind them, because the
            rows of the first steps would have been more or fewer batches of the present size.
    """
    if shift:
        shifted = make_schedule(settings, steps + shift, steps_per_epoch)
        return lambda updates: shifted(jnp.maximum(updates + shift, 0))
    peak = settings.learning_rate
    decay_steps = max(steps - settings.warmup_steps, 1)
    after: optax.Schedule
    match settings.schedule:
        case "step":
            # Epochs are those of the run, including its warm-up.
            return _after_warmup(
                settings,
                lambda step: peak * settings.epoch_decay ** ((step + settings.warmup_steps) // steps_per_epoch),
            )
        case "cosine":
            after = optax.cosine_decay_schedule(peak, decay_steps, alpha=settings.final_lr_ratio)
        case _:
            after = optax.linear_schedule(peak, peak * settings.final_lr_ratio, decay_steps)
    return _after_warmup(settings, after)


def _after_warmup(settings: OptimizerSettings, after: optax.Schedule) -> optax.Schedule:
    if not settings.warmup_steps:
        return after
    warmup = optax.linear_schedule(0.0, settings.learning_rate, settings.warmup_steps)
    return optax.join_schedules([warmup, after], [settings.warmup_steps])


class Optimizer:
    """AdamW over arrays by path, which computes in float32 and keeps its state in ``settings.precision``.

    Args:
        settings: Settings of the optimizer.
        schedule: Schedule of the learning rate.
        table: Declarations of the parameters, by path.
    """

    def __init__(self, settings: OptimizerSettings, schedule: optax.Schedule, table: Mapping[str, Parameter]) -> None:
        self._settings = settings
        self._adamw = optax.adamw(
            schedule,
            b1=settings.b1,
            b2=settings.b2,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            mask=lambda params: {path: len(table[path].tensor_shape) > 1 for path in params},
        )

    def init(self, params: Arrays) -> Any:
        """Return the state before the first step, in the dtypes of ``params``."""
        return self._adamw.init(params)

    def update(self, grads: Arrays, state: Any, params: Arrays, step: jax.Array) -> tuple[Arrays, Any]:
        """Return the parameters and the optimizer's state after a step.

        Args:
            grads: Gradients, by the paths of ``params``, after clipping.
            state: State of the optimizer before the step.
            params: Parameters before the step.
            step: Number of updates before this one, by which the draws of stochastic rounding are keyed.
        """
        wide = jax.tree.map(_to_float32, (grads, state, params))
        updates, state_after = self._adamw.update(*wide)
        after = optax.apply_updates(wide[2], updates), state_after
        # Parameters are rounded, rather than their updates, whose last bits would be lost again in the sum.
        key = jax.random.fold_in(jax.random.key(0), step)
        return _rounded(after, (params, state), key if self._settings.precision == "bfloat16_stochastic" else None)


def _to_float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x


def _rounded(wide: Any, like: Any, key: jax.Array | None) -> Any:
    """Return ``wide`` in the dtypes of ``like``, rounded stochastically by ``key`` or, without one, to the nearest."""
    leaves, structure = jax.tree.flatten(wide)
    kept = [
        x
        if x.dtype == old.dtype
        else x.astype(old.dtype)
        if key is None
        else round_stochastically(x, jax.random.fold_in(key, i))
        for i, (x, old) in enumerate(zip(leaves, jax.tree.leaves(like), strict=True))
    ]
    return jax.tree.unflatten(structure, kept)


def round_stochastically(x: jax.Array, key: jax.Array) -> jax.Array:
    """Round float32 to bfloat16, up or down at random, so that the mean of many roundings is ``x``."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # bfloat16 is the upper half of float32: a uniform draw added to the lower half carries with the right probability.
    carried = bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type(carried & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)
