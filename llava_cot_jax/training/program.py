"""Compiled programs of a run and the shapes of its state, which are made without any array."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from llava_cot_jax.costs.model_costs import ModelPart, parts_of
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.parameters import Parameter, parameters
from llava_cot_jax.model.sharding import make_mesh, use_mesh
from llava_cot_jax.training.lora import adapter_table, init_adapters
from llava_cot_jax.training.optimizer import Optimizer, make_schedule
from llava_cot_jax.training.settings import MeshSettings, TrainSettings
from llava_cot_jax.training.state import TrainState, frozen_paths, state_sharding
from llava_cot_jax.training.step import Batch, LossSums, Metrics, loss_sums, make_train_step


@dataclass(frozen=True, kw_only=True)
class TrainProgram:
    """Compiled programs of a run.

    Attributes:
        settings: Settings of the run.
        mesh: Mesh on which the state is.
        table: Declarations of the model's parameters and of the adapters, by path.
        optimizer: Optimizer of the run.
        state: Shapes, dtypes and shardings of the state, as ``jax.ShapeDtypeStruct``.
        trained_parts: Parts of the model that are trained whole.
        adapted_parts: Parts of the model that have adapters.
        learning_rate: Learning rate as a function of the number of updates before it, which leaves out skipped steps.
        step: Compiled training step, as ``make_train_step`` describes it.
        evaluate: Compiled sums of the losses of a batch, a function of trained arrays, frozen arrays and the batch.
    """

    settings: TrainSettings
    mesh: Mesh
    table: Mapping[str, Parameter]
    optimizer: Optimizer
    state: TrainState
    trained_parts: frozenset[ModelPart]
    adapted_parts: frozenset[ModelPart]
    learning_rate: optax.Schedule
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    evaluate: Callable[[Mapping[str, jax.Array], Mapping[str, jax.Array], Batch], LossSums]

    def init_state(self, arrays: dict[str, jax.Array]) -> TrainState:
        """Make the state before the first step.

        Args:
            arrays: Parameters of the model by path, in the stacked layout. The dict is emptied, so that no array is in
                memory twice.
        """
        trained = {
            path: arrays.pop(path).astype(like.dtype) for path, like in self.state.trained.items() if path in arrays
        }
        frozen = self.frozen_arrays(arrays)
        dtype = self.settings.optimizer.dtype
        if self.settings.lora.rank:
            adapters = {path: self.table[path] for path in self.state.trained}
            trained = init_adapters(adapters, self.settings.seed, dtype, self.mesh)
        shardings = state_sharding(self.state, self.table, self.mesh)
        return TrainState.init(trained, frozen, self.optimizer, dtype, shardings)

    def frozen_arrays(self, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Remove from the parameters of the model those that are not trained, and return them in the state's dtype."""
        return {path: arrays.pop(path).astype(like.dtype) for path, like in self.state.frozen.items()}


def make_program(
    settings: TrainSettings,
    config: MllamaConfig,
    mesh: Mesh,
    *,
    steps: int,
    steps_per_epoch: int,
    schedule_shift: int = 0,
) -> TrainProgram:
    """Return the programs of a run.

    Args:
        settings: Settings of the run.
        config: Configuration of the model.
        mesh: Mesh over all devices, or over those of a topology to compile for.
        steps: Number of steps of the run, for the schedule of the learning rate.
        steps_per_epoch: Number of steps of an epoch, for the schedule of the learning rate.
        schedule_shift: Number of steps by which that schedule is ahead of the updates, as in ``make_schedule``.

    Raises:
        UserError: The mesh does not divide a parameter, or a pattern of ``frozen_params`` or ``lora.targets`` is no
            regular expression or matches nothing.
    """
    base = parameters(config, "stacked")
    adapters, trained = choose_trained(settings, base)
    table = {**base, **adapters}
    learning_rate = make_schedule(settings.optimizer, steps, steps_per_epoch, schedule_shift)
    optimizer = Optimizer(settings.optimizer, learning_rate, table)
    state = _abstract_state(settings, table, trained, optimizer, mesh)
    dtype = jnp.dtype(settings.dtype)
    step = make_train_step(
        config,
        table,
        optimizer,
        state,
        mesh=mesh,
        dtype=dtype,
        remat=settings.remat,
        grad_accum_steps=settings.grad_accum_steps,
        max_grad_norm=settings.optimizer.max_grad_norm,
        lora_scale=settings.lora.scale,
        lora_tokens=settings.lora.tokens,
        verifier_weight=settings.verifier.weight,
    )

    @jax.jit
    def evaluate(trained: Mapping[str, jax.Array], frozen: Mapping[str, jax.Array], batch: Batch) -> LossSums:
        with use_mesh(mesh):
            return loss_sums(
                trained,
                frozen,
                batch,
                config=config,
                dtype=dtype,
                remat=settings.remat,
                lora_scale=settings.lora.scale,
                lora_tokens=settings.lora.tokens,
            )

    parts, none = parts_of(config, trained), frozenset[ModelPart]()
    return TrainProgram(
        settings=settings,
        mesh=mesh,
        table=table,
        optimizer=optimizer,
        state=state,
        trained_parts=none if adapters else parts,
        adapted_parts=parts if adapters else none,
        learning_rate=learning_rate,
        step=step,
        evaluate=evaluate,
    )


def choose_trained(settings: TrainSettings, base: Mapping[str, Parameter]) -> tuple[dict[str, Parameter], set[str]]:
    """Return the declarations of a run's adapters, and the paths of all arrays that it trains.

    Args:
        settings: Settings of the run.
        base: Declarations of the model's parameters, in the stacked layout.

    Raises:
        UserError: A pattern of ``frozen_params`` or ``lora.targets`` is no regular expression or matches nothing.
    """
    adapters = adapter_table(base, settings.lora)
    return adapters, set(adapters) or base.keys() - frozen_paths(base, settings.frozen_params)


def _abstract_state(
    settings: TrainSettings, table: Mapping[str, Parameter], trained: set[str], optimizer: Optimizer, mesh: Mesh
) -> TrainState:
    """Return the shapes, dtypes and shardings of the state of a run."""
    shapes = {path: jax.ShapeDtypeStruct(p.shape, jnp.dtype(settings.dtype)) for path, p in table.items()}
    state = jax.eval_shape(
        partial(TrainState.init, optimizer=optimizer, dtype=settings.optimizer.dtype),
        {path: shape for path, shape in shapes.items() if path in trained},
        {path: shape for path, shape in shapes.items() if path not in trained},
    )
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        state_sharding(state, table, mesh),
    )


def make_run_mesh(settings: MeshSettings) -> Mesh:
    """Return the mesh of a run over all devices of all hosts.

    Raises:
        UserError: The mesh takes more devices than there are, or leaves some idle.
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


def check_batch_size(settings: TrainSettings, mesh: Mesh) -> None:
    """Check that the mesh divides a batch, and each of its micro-batches.

    Raises:
        UserError: It does not.
    """
    batch_size, micro_batches = settings.loader.batch_size, settings.grad_accum_steps
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (shards * micro_batches):
        raise UserError(
            f"loader.batch_size is {batch_size}: the mesh does not divide it (data x fsdp = {shards} devices, "
            f"{micro_batches} micro-batches on each); take a multiple of {shards * micro_batches}"
        )
