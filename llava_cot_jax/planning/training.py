"""What a training run takes on a slice: memory, floors and hours by arithmetic, and its step as compiled."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from llava_cot_jax.costs.counts import recomputed_flops, training_flops
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.choices import MESH_AXES
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.sharding import abstract_mesh, check_mesh, make_mesh
from llava_cot_jax.planning.compiler import Compiled, compile_for
from llava_cot_jax.planning.floors import Floors
from llava_cot_jax.planning.memory import Parts, training_memory
from llava_cot_jax.planning.programs import abstract_batch, lowered_step
from llava_cot_jax.planning.settings import Data
from llava_cot_jax.planning.slices import Slice
from llava_cot_jax.planning.traffic import Step, training_bytes, training_traffic
from llava_cot_jax.training.program import check_batch, make_program
from llava_cot_jax.training.settings import MeshSettings, TrainSettings


@dataclass(frozen=True)
class TrainingPlan:
    """A training run on a slice.

    Attributes:
        settings: of the run, its mesh whole.
        slice: that it runs on.
        memory: predicted bytes of one device in a step of the longest rows.
        floors: of a step of average rows.
        flops: of such a step, all devices together: those that MFU counts.
        again: those that it computes a second time, besides.
        steps: of the run.
    """

    settings: TrainSettings
    slice: Slice
    memory: Parts
    floors: Floors
    flops: int
    again: int
    steps: int

    @property
    def mesh(self) -> dict[str, int]:
        """Devices along each axis."""
        return {axis: getattr(self.settings.mesh, axis) for axis in MESH_AXES}

    @property
    def room(self) -> int:
        """Bytes of a device's memory that are left over; below 0 where it does not fit."""
        return self.slice.generation.usable - sum(self.memory.values())

    def hours(self, mfu: float) -> float:
        """Of the run, where each step reaches a share of the peak, but never less than its floor."""
        chip = self.slice.generation.chip
        return self.steps * max(self.flops / (self.slice.chips * chip.flops * mfu), self.floors.step) / 3600


def plan_training(settings: TrainSettings, config: MllamaConfig, slice_: Slice, data: Data) -> TrainingPlan:
    """Work out a run by arithmetic alone.

    Args:
        settings: of the run; where its mesh leaves ``fsdp`` open it takes all chips that are left.
        config: the model's.
        slice_: that it is to run on.
        data: that it is trained on.

    Raises:
        UserError: the mesh does not take the slice's chips, or divide the model or the batch.
    """
    settings = replace(settings, mesh=whole_mesh(settings.mesh, slice_))
    mesh = abstract_mesh(settings.mesh.data, settings.mesh.fsdp or 1, settings.mesh.tensor)
    check_mesh(config, mesh)
    check_batch(settings, mesh)
    per_epoch = max(1, data.rows // settings.loader.batch)
    steps = settings.steps or settings.epochs * per_epoch
    program = make_program(settings, config, mesh, steps=steps, steps_per_epoch=per_epoch)
    longest = Step(settings, config, program, dict(mesh.shape), settings.chat.max_length)
    average = replace(longest, tokens=min(data.tokens, settings.chat.max_length))
    useful = training_flops(config, average.tokens, 1, trained=program.trained, adapted=program.adapted)
    flops = settings.loader.batch * sum(useful.values())
    twice = recomputed_flops(config, average.tokens, 1, checkpointing=settings.checkpointing)
    again = settings.loader.batch * sum(
        count for kind, count in twice.items() if average.flows("tower" if kind.startswith("tower") else "self")
    )
    floors = Floors.of(
        slice_, flops=(flops + again) / slice_.chips, memory=training_bytes(average), sent=training_traffic(average)
    )
    memory = training_memory(longest, abstract_batch(config, settings.loader.batch, longest.tokens, mesh))
    return TrainingPlan(settings, slice_, memory, floors, flops, again, steps)


def compile_training(plan: TrainingPlan, config: MllamaConfig) -> Compiled:
    """What the TPU compiler makes of a plan's step, for its longest rows.

    Raises:
        UserError: the compiler is not installed.
    """
    settings = plan.settings
    mesh = make_mesh(**plan.mesh, devices=plan.slice.devices())
    # Scheduled over the usual data, whatever the plan's, so that one program is found again for all.
    steps = settings.steps or settings.epochs * max(1, Data.rows // settings.loader.batch)
    program = make_program(settings, config, mesh, steps=steps, steps_per_epoch=steps)
    return compile_for(
        plan.slice, plan.mesh, lambda: lowered_step(program, settings, config, mesh), "the training step"
    )


def whole_mesh(mesh: MeshSettings, slice_: Slice) -> MeshSettings:
    """``mesh`` with ``fsdp`` stated.

    Raises:
        UserError: it takes more or fewer chips than the slice has.
    """
    chips, rest = slice_.chips, mesh.data * mesh.tensor
    fsdp = max(1, chips // rest) if mesh.fsdp is None else mesh.fsdp
    if rest * fsdp != chips:
        raise UserError(
            f"a mesh of data={mesh.data} x fsdp={fsdp} x tensor={mesh.tensor} is not {slice_.name}'s {chips} chips: "
            "set mesh.fsdp to null, or let --any_mesh true choose"
        )
    if mesh.data % slice_.count:
        raise UserError(f"data={mesh.data} does not divide over {slice_.count} slices: make it a multiple")
    return replace(mesh, fsdp=fsdp)


def meshes(slice_: Slice) -> Iterator[MeshSettings]:
    """Every mesh of a slice's chips: ``data`` over the network between slices, the other axes within each."""
    within = math.prod(slice_.shape)
    for tensor in (1, 2, 4, 8, 16):
        if within % tensor == 0:
            yield MeshSettings(slice_.count, within // tensor, tensor)


def best_mesh(settings: TrainSettings, config: MllamaConfig, slice_: Slice, data: Data) -> TrainingPlan | None:
    """The plan of the mesh that fits with the lowest floor of a step; where none fits, of the one that lacks least.

    None where no mesh of the slice divides the model and the batch.
    """
    found = []
    for mesh in meshes(slice_):
        try:
            found.append(plan_training(replace(settings, mesh=mesh), config, slice_, data))
        except UserError:  # this one does not divide them
            continue
    fitting = [plan for plan in found if plan.room >= 0]
    if fitting:
        return min(fitting, key=lambda plan: (plan.floors.step, sum(plan.floors.sent.values())))
    return max(found, key=lambda plan: plan.room, default=None)
