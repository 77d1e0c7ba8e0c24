"""Plan of a training run on a slice: memory, roofline and hours by arithmetic, and the compiled step."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from llava_cot_jax.costs.model_costs import recomputed_flops, training_flops
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.choices import MESH_AXES
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.sharding import abstract_mesh, check_mesh, make_mesh
from llava_cot_jax.planning.communication import TrainingStep, training_bytes_sent, training_hbm_bytes
from llava_cot_jax.planning.compiler import CompiledProgram, compile_for
from llava_cot_jax.planning.memory import MemoryShares, training_memory
from llava_cot_jax.planning.programs import abstract_batch, lower_training_step
from llava_cot_jax.planning.roofline import Roofline
from llava_cot_jax.planning.settings import DatasetSize
from llava_cot_jax.planning.slices import Slice
from llava_cot_jax.training.program import check_batch_size, make_program
from llava_cot_jax.training.settings import MeshSettings, TrainSettings


@dataclass(frozen=True)
class TrainingPlan:
    """Plan of a training run on a slice.

    Attributes:
        settings: Settings of the run, with every axis of the mesh stated.
        slice: Slice that the run takes place on.
        memory: Predicted bytes per device in a step of the longest sequences.
        roofline: Roofline of a step of examples of mean length.
        flops: FLOPs of such a step on all devices together, as MFU counts them.
        recomputed_flops: FLOPs of such a step that the backward pass recomputes, which MFU does not count.
        steps: Number of steps of the run.
        images: Number of images of each example.
    """

    settings: TrainSettings
    slice: Slice
    memory: MemoryShares
    roofline: Roofline
    flops: int
    recomputed_flops: int
    steps: int
    images: int

    @property
    def mesh(self) -> dict[str, int]:
        """Number of devices along each mesh axis."""
        return {axis: getattr(self.settings.mesh, axis) for axis in MESH_AXES}

    @property
    def headroom(self) -> int:
        """Bytes of a device's memory that are left free; negative where the step does not fit."""
        return self.slice.generation.usable_hbm_bytes - sum(self.memory.values())

    def hours(self, mfu: float) -> float:
        """Hours of the run at an MFU from 0 to 1, where no step takes less time than its roofline."""
        peak_flops = self.slice.chips * self.slice.generation.chip.peak_flops
        return self.steps * max(self.flops / (peak_flops * mfu), self.roofline.step_seconds) / 3600


def plan_training(settings: TrainSettings, config: MllamaConfig, slice_: Slice, dataset: DatasetSize) -> TrainingPlan:
    """Plan a training run by arithmetic alone.

    Args:
        settings: Settings of the run. Where ``mesh.fsdp`` is None, that axis takes all remaining chips.
        config: Configuration of the model.
        slice_: Slice that the run takes place on.
        dataset: Size of the data set.

    Raises:
        UserError: The mesh does not have as many devices as the slice, or does not divide the model or the batch.
    """
    settings = replace(settings, mesh=complete_mesh(settings.mesh, slice_))
    mesh = abstract_mesh(settings.mesh.data, settings.mesh.fsdp or 1, settings.mesh.tensor)
    check_mesh(config, mesh)
    check_batch_size(settings, mesh)
    per_epoch = max(1, dataset.examples // settings.loader.batch_size)
    steps = settings.steps or settings.epochs * per_epoch
    program = make_program(settings, config, mesh, steps=steps, steps_per_epoch=per_epoch)
    images = dataset.images_per_example
    longest = TrainingStep(settings, config, program, dict(mesh.shape), settings.chat.max_length, images)
    average = replace(longest, tokens=min(dataset.tokens_per_example, settings.chat.max_length))
    trained, adapted = program.trained_parts, program.adapted_parts
    useful = training_flops(config, average.tokens, images, trained=trained, adapted=adapted)
    flops = settings.loader.batch_size * sum(useful.values())
    by_remat = recomputed_flops(config, average.tokens, images, remat=settings.remat)
    computed = training_flops(config, average.tokens, images, trained=trained, adapted=adapted, as_computed=True)
    recomputed = settings.loader.batch_size * (
        sum(computed[kind] for kind in ("tower scores again", "text scores again"))
        + sum(
            count
            for kind, count in by_remat.items()
            if average.has_gradient("tower" if kind.startswith("tower") else "self")
        )
    )
    roofline = Roofline.on_slice(
        slice_,
        flops=(flops + recomputed) / slice_.chips,
        hbm_bytes=training_hbm_bytes(average),
        sent_bytes=training_bytes_sent(average),
    )
    memory = training_memory(longest, abstract_batch(config, settings.loader.batch_size, longest.tokens, mesh, images))
    return TrainingPlan(settings, slice_, memory, roofline, flops, recomputed, steps, images)


def compile_training(plan: TrainingPlan, config: MllamaConfig) -> CompiledProgram:
    """Compile a plan's training step for the longest sequences, with the TPU compiler.

    Raises:
        UserError: The TPU compiler is not installed.
    """
    settings = plan.settings
    mesh = make_mesh(**plan.mesh, devices=plan.slice.devices())
    # The learning rate follows the default data set, whatever the plan's, so that all plans share one program.
    steps = settings.steps or settings.epochs * max(1, DatasetSize.examples // settings.loader.batch_size)
    program = make_program(settings, config, mesh, steps=steps, steps_per_epoch=steps)
    return compile_for(
        plan.slice,
        plan.mesh,
        lambda: lower_training_step(program, settings, config, mesh, plan.images),
        "the training step",
    )


def complete_mesh(mesh: MeshSettings, slice_: Slice) -> MeshSettings:
    """Return ``mesh`` with its axis ``fsdp`` stated: by default the chips that the other axes leave.

    Raises:
        UserError: The mesh has more or fewer devices than the slice, or ``data`` does not divide over the slices.
    """
    chips, rest = slice_.chips, mesh.data * mesh.tensor
    fsdp = max(1, chips // rest) if mesh.fsdp is None else mesh.fsdp
    if rest * fsdp != chips:
        raise UserError(
            f"a mesh of data={mesh.data} x fsdp={fsdp} x tensor={mesh.tensor} is not {slice_.name}'s {chips} chips: "
            "set mesh.fsdp to null, or let --any_mesh true choose"
        )
    if mesh.data % slice_.num_slices:
        raise UserError(f"data={mesh.data} does not divide over {slice_.num_slices} slices: make it a multiple")
    return replace(mesh, fsdp=fsdp)


def meshes(slice_: Slice) -> Iterator[MeshSettings]:
    """Yield every mesh of a slice's chips that has ``data`` over DCN, between slices, and the other axes over ICI."""
    within = math.prod(slice_.shape)
    for tensor in (1, 2, 4, 8, 16):
        if within % tensor == 0:
            yield MeshSettings(slice_.num_slices, within // tensor, tensor)


def best_mesh(
    settings: TrainSettings, config: MllamaConfig, slice_: Slice, dataset: DatasetSize
) -> TrainingPlan | None:
    """Plan a run on the mesh of a slice that fits with the shortest step by its roofline.

    Where no mesh fits, return the plan of the one that exceeds the memory least; None where no mesh divides the model
    and the batch.
    """
    found = []
    for mesh in meshes(slice_):
        try:
            found.append(plan_training(replace(settings, mesh=mesh), config, slice_, dataset))
        except UserError:  # this mesh does not divide the model or the batch
            continue
    fitting = [plan for plan in found if plan.headroom >= 0]
    if fitting:
        return min(fitting, key=lambda plan: (plan.roofline.step_seconds, sum(plan.roofline.sent_bytes.values())))
    return max(found, key=lambda plan: plan.headroom, default=None)
