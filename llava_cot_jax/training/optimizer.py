"""AdamW with its schedules, and the precisions in which parameters and moments are kept."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llava_cot_jax.model.parameters import Parameter
from llava_cot_jax.training.settings import OptimizerSettings

Arrays = Mapping[str, jax.Array]


def learning_rates(settings: OptimizerSettings, steps: int, steps_per_epoch: int) -> Callable[[Any], Any]:
    """The learning rate as a function of the step, counted from 0."""
    peak = settings.learning_rate
    falling = max(steps - settings.warmup_steps, 1)
    after: optax.Schedule
    match settings.schedule:
        case "step":
            # By epochs of the run, its warm-up included.
            return _after_warmup(
                settings,
                lambda step: peak * settings.epoch_decay ** ((step + settings.warmup_steps) // steps_per_epoch),
            )
        case "cosine":
            after = optax.cosine_decay_schedule(peak, falling, alpha=settings.final_lr_ratio)
        case _:
            after = optax.linear_schedule(peak, peak * settings.final_lr_ratio, falling)
    return _after_warmup(settings, after)


def _after_warmup(settings: OptimizerSettings, after: Callable[[Any], Any]) -> Callable[[Any], Any]:
    if not settings.warmup_steps:
        return after
    rising = optax.linear_schedule(0.0, settings.learning_rate, settings.warmup_steps)
    return optax.join_schedules([rising, after], [settings.warmup_steps])


class Optimizer:
    """AdamW over a dict of arrays by path: in float32 inside, in ``settings.precision`` between steps.

    Args:
        settings: see there.
        schedule: the learning rate of each step.
        table: what the paths are of.
    """

    def __init__(
        self, settings: OptimizerSettings, schedule: Callable[[Any], Any], table: Mapping[str, Parameter]
    ) -> None:
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
        """The state before the first step, in the dtype of ``params``."""
        return self._adamw.init(params)

    def update(self, grads: Arrays, state: Any, params: Arrays, step: jax.Array) -> tuple[Arrays, Any]:
        """The parameters and the state after a step.

        Args:
            grads: by the paths of ``params``, already clipped.
            step: its number, from which the draws of stochastic rounding are keyed.
        """
        wide = jax.tree.map(_widened, (grads, state, params))
        updates, state_after = self._adamw.update(*wide)
        after = optax.apply_updates(wide[2], updates), state_after
        # Whole parameters are rounded, not their updates, whose last bits would be lost again in the sum.
        key = jax.random.fold_in(jax.random.key(0), step)
        return _narrowed(after, (params, state), key if self._settings.precision == "bfloat16_stochastic" else None)


def _widened(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x


def _narrowed(wide: Any, like: Any, key: jax.Array | None) -> Any:
    """``wide`` in the dtypes of ``like``: rounded at random by ``key``, without one to the nearest."""
    leaves, structure = jax.tree.flatten(wide)
    kept = [
        x
        if x.dtype == old.dtype
        else x.astype(old.dtype)
        if key is None
        else stochastically_rounded(x, jax.random.fold_in(key, i))
        for i, (x, old) in enumerate(zip(leaves, jax.tree.leaves(like), strict=True))
    ]
    return jax.tree.unflatten(structure, kept)


def stochastically_rounded(x: jax.Array, key: jax.Array) -> jax.Array:
    """x, float32, as bfloat16: up or down at random, so that the mean of many roundings is x."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # What bfloat16 cuts off is the lower half: a uniform draw of it carries as often as it should.
    carried = bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type(carried & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)
