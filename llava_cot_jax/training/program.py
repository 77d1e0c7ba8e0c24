"""A run's programs and the shapes of its state: all that training compiles, made without an array."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llava_cot_jax.costs.model_costs import ModelPart, parts_of
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.parameters import Parameter, parameters
from llava_cot_jax.model.sharding import make_mesh, use_mesh
from llava_cot_jax.training.lora import adapter_table, fresh_adapters
from llava_cot_jax.training.optimizer import Optimizer, learning_rates
from llava_cot_jax.training.settings import MeshSettings, TrainSettings
from llava_cot_jax.training.state import Batch, Losses, State, frozen_paths, losses, make_step, state_sharding


@dataclass(frozen=True)
class Program:
    """What a run computes with.

    Attributes:
        table: the declarations of the model's arrays and of the adapters.
        state: of the run, as ``jax.ShapeDtypeStruct``s that know their shardings.
        trained: the parts of the model that are trained whole, for ``costs.counts.training_flops``.
        adapted: the parts that have adapters, likewise.
        learning_rate: of each step, counted from 0.
        step: the compiled step, as ``make_step`` explains.
        evaluate: the compiled losses of a batch, of trained and frozen arrays.
    """

    table: Mapping[str, Parameter]
    state: State
    trained: frozenset[ModelPart]
    adapted: frozenset[ModelPart]
    learning_rate: Callable[[Any], Any]
    step: Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]
    evaluate: Callable[[Mapping[str, jax.Array], Mapping[str, jax.Array], Batch], Losses]
    _settings: TrainSettings
    _optimizer: Optimizer
    _mesh: Mesh

    def begin(self, arrays: dict[str, jax.Array]) -> State:
        """The state before the first step.

        Args:
            arrays: the model, by the paths of the stacked layout; emptied, so that no array is there twice.
        """
        trained = {
            path: arrays.pop(path).astype(like.dtype) for path, like in self.state.trained.items() if path in arrays
        }
        frozen = self.frozen(arrays)
        dtype = self._settings.optimizer.dtype
        if self._settings.lora.rank:
            adapters = {path: self.table[path] for path in self.state.trained}
            trained = fresh_adapters(adapters, self._settings.seed, dtype, self._mesh)
        sharding = state_sharding(self.state, self.table, self._mesh)
        init = jax.jit(self._optimizer.init, out_shardings=sharding.optimizer)
        zero = jax.device_put(jnp.int32(0), sharding.step)
        return State(zero, trained, frozen, init(trained), zero.copy())

    def frozen(self, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Those of the model's arrays that the run does not change, as ``begin`` keeps them."""
        return {path: arrays.pop(path).astype(like.dtype) for path, like in self.state.frozen.items()}


def make_program(
    settings: TrainSettings, config: MllamaConfig, mesh: Mesh, *, steps: int, steps_per_epoch: int
) -> Program:
    """The programs of a run.

    Args:
        settings: of the run.
        config: the model's.
        mesh: over all devices, or over those of a topology that is compiled for.
        steps: that the learning rate is scheduled over.
        steps_per_epoch: likewise.

    Raises:
        UserError: the mesh does not divide a parameter, or a pattern of ``frozen`` or ``lora.targets``
            cannot be meant.
    """
    base = parameters(config, "stacked")
    adapters = adapter_table(base, settings.lora)
    trained = set(adapters) if adapters else base.keys() - frozen_paths(base, settings.frozen_params)
    table = {**base, **adapters}
    learning_rate = learning_rates(settings.optimizer, steps, steps_per_epoch)
    optimizer = Optimizer(settings.optimizer, learning_rate, table)
    dtype = jnp.dtype(settings.dtype)
    shapes = {path: jax.ShapeDtypeStruct(p.shape, dtype) for path, p in table.items()}
    state = jax.eval_shape(
        partial(State.begin, optimizer=optimizer, dtype=settings.optimizer.dtype),
        {path: shape for path, shape in shapes.items() if path in trained},
        {path: shape for path, shape in shapes.items() if path not in trained},
    )
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        state_sharding(state, table, mesh),
    )
    compute: dict[str, Any] = {
        "dtype": dtype,
        "remat": settings.remat,
        "lora_scale": settings.lora.scale,
    }
    step = make_step(
        config,
        table,
        optimizer,
        state,
        mesh=mesh,
        grad_accum_steps=settings.grad_accum_steps,
        max_grad_norm=settings.optimizer.max_grad_norm,
        **compute,
    )

    @jax.jit
    def evaluate(trained: Mapping[str, jax.Array], frozen: Mapping[str, jax.Array], batch: Batch) -> Losses:
        with use_mesh(mesh):
            return losses(trained, frozen, batch, config=config, **compute)

    parts = parts_of(config, trained)
    whole, adapted = (frozenset[ModelPart](), parts) if adapters else (parts, frozenset[ModelPart]())
    return Program(table, state, whole, adapted, learning_rate, step, evaluate, settings, optimizer, mesh)


def run_mesh(settings: MeshSettings) -> Mesh:
    """The mesh over all devices of all hosts.

    Raises:
        UserError: it takes more devices than there are, or leaves some out.
    """
    count = jax.device_count()
    rest = settings.data * settings.tensor
    fsdp = max(count // rest, 1) if settings.fsdp is None else settings.fsdp
    mesh = make_mesh(settings.data, fsdp, settings.tensor)
    if mesh.size != count:
        raise UserError(
            f"a mesh of data={settings.data} x fsdp={fsdp} x tensor={settings.tensor} leaves {count - mesh.size} of "
            f"{count} devices idle: change one of its axes"
        )
    return mesh


def check_batch(settings: TrainSettings, mesh: Mesh) -> None:
    """Whether each device gets as many rows of a batch as the others, and of each of its parts.

    Raises:
        UserError: it does not.
    """
    batch, parts = settings.loader.batch_size, settings.grad_accum_steps
    over = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch % (over * parts):
        raise UserError(
            f"loader.batch_size is {batch}: the mesh does not divide it (data x fsdp = {over} devices, {parts} "
            f"micro-batches on each); take a multiple of {over * parts}"
        )
