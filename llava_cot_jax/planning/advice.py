"""Advice: which change makes a run fit, and which slice is best."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from llava_cot_jax.errors import UserError
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.sharding import default_mesh_shape
from llava_cot_jax.planning.programs import WeightDtype
from llava_cot_jax.planning.search_plan import SearchPlan, plan_search
from llava_cot_jax.planning.settings import DatasetSize
from llava_cot_jax.planning.slices import GENERATIONS, HBM_MARGIN, Slice
from llava_cot_jax.planning.training_plan import TrainingPlan, best_mesh, plan_training
from llava_cot_jax.training.settings import TrainSettings

ADVISED_LORA_RANK = 32

NARROWER_DTYPES: dict[WeightDtype, tuple[WeightDtype, ...]] = {"float32": ("bfloat16", "int8"), "int8": ()}
"""Dtypes that take less memory for the weights of a search. For the other dtypes it is int8 alone."""

SettingsChange = dict[str, Any]
"""Changed training settings by their dotted names, as on the command line."""


def fits(plan: TrainingPlan | SearchPlan) -> bool:
    """Whether a plan is predicted to fit with a margin."""
    return plan.headroom >= HBM_MARGIN * plan.slice.generation.usable_hbm_bytes


def smallest_training_change(
    plan: TrainingPlan, config: MllamaConfig, dataset: DatasetSize
) -> tuple[str, TrainingPlan] | None:
    """Find the first change that makes a run fit.

    Changes are tried in the order of their costs: another mesh, then what leaves the arithmetic as it is, then the
    precision of the optimizer's state, then the training recipe, each also together with those before it, and last a
    larger slice.

    Returns:
        The change as options of the command line, with the plan that fits; None where no change makes it fit.
    """
    all_changes: SettingsChange = {}
    for change in ({}, *_changes(plan.settings)):
        all_changes = all_changes | change
        for tried in (change, all_changes):
            for planned in (_plan_or_none, best_mesh):
                found = planned(_apply(plan.settings, tried), config, plan.slice, dataset)
                if found is not None and _fits_with_more_headroom(found, plan):
                    return _as_options(_mesh_change(plan, found) | _effective(tried, plan.settings)), found
    return _smallest_larger_slice(plan, config, dataset)


def _fits_with_more_headroom(found: TrainingPlan | SearchPlan, plan: TrainingPlan | SearchPlan) -> bool:
    """Whether a plan fits and takes less memory than ``plan``, which may not fit although it was predicted to."""
    return fits(found) and found.headroom > plan.headroom


def _mesh_change(plan: TrainingPlan | SearchPlan, found: TrainingPlan | SearchPlan) -> SettingsChange:
    return {} if found.mesh == plan.mesh else {f"mesh.{axis}": size for axis, size in found.mesh.items()}


def _effective(change: SettingsChange, settings: TrainSettings) -> SettingsChange:
    """Return a change without the number of accumulation steps where it stays, and without the list of frozen parts."""
    unchanged = [("grad_accum_steps", settings.grad_accum_steps)]
    return {name: value for name, value in change.items() if (name, value) not in unchanged and name != "frozen_params"}


def _as_options(change: Mapping[str, Any]) -> str:
    """Write changed settings as options of the command line."""
    return " ".join(f"--{name} {f'{value:g}' if isinstance(value, float) else value}" for name, value in change.items())


def _apply(settings: TrainSettings, change: SettingsChange) -> TrainSettings:
    """Return settings with a change made."""
    for name, value in change.items():
        group, _, field = name.rpartition(".")
        if group:
            settings = replace(settings, **{group: replace(getattr(settings, group), **{field: value})})
        else:
            settings = replace(settings, **{field: value})
    return settings


def _changes(settings: TrainSettings) -> Iterator[SettingsChange]:
    """Yield changes in the order of their costs."""
    batch_shards = settings.mesh.data * (settings.mesh.fsdp or 1)
    if settings.remat != "full":
        yield {"remat": "full"}
    device_batch = settings.loader.batch_size // batch_shards
    for steps in range(settings.grad_accum_steps + 1, device_batch + 1):
        if device_batch % steps == 0:
            yield {"grad_accum_steps": steps}
    if settings.optimizer.precision == "float32" and not settings.lora.rank:
        yield {"optimizer.precision": "bfloat16_stochastic"}
    if settings.loader.batch_size > batch_shards:
        yield {"grad_accum_steps": 1, "loader.batch_size": batch_shards}
    if not settings.lora.rank:
        yield {"frozen_params": [], "lora.rank": ADVISED_LORA_RANK, "lora.alpha": 2.0 * ADVISED_LORA_RANK}


def _plan_or_none(
    settings: TrainSettings, config: MllamaConfig, slice_: Slice, dataset: DatasetSize
) -> TrainingPlan | None:
    """Plan a run; None where its mesh does not divide the batch or the model."""
    try:
        return plan_training(settings, config, slice_, dataset)
    except UserError:
        return None


def _smallest_larger_slice(
    plan: TrainingPlan, config: MllamaConfig, dataset: DatasetSize
) -> tuple[str, TrainingPlan] | None:
    """Find the smallest larger slice of the same TPU generation that holds the run as it is."""
    for slice_ in _larger_slices(plan.slice):
        found = best_mesh(plan.settings, config, slice_, dataset)
        if found is not None and fits(found):
            return f"--topology {slice_.name}", found
    return None


def _larger_slices(slice_: Slice) -> Iterator[Slice]:
    for shape in slice_.generation.shapes:
        larger = replace(slice_, shape=shape)
        if larger.chips > slice_.chips:
            yield larger


def smallest_search_change(plan: SearchPlan, config: MllamaConfig) -> tuple[str, SearchPlan] | None:
    """Find the first change that makes a search fit: another mesh, fewer questions, narrower weights, a larger slice.

    Returns:
        The change as options of the command line, with the plan that fits; None where no change makes it fit.
    """
    slice_ = plan.slice
    dtypes = (plan.dtype, *NARROWER_DTYPES.get(plan.dtype, ("int8",)))
    counts = range(plan.questions, 0, -1)
    meshes = (plan.mesh, default_mesh_shape(config, slice_.chips))
    for dtype, questions, mesh in itertools.product(dtypes, counts, meshes):
        found = plan_search(plan.spec, config, slice_, mesh, questions=questions, dtype=dtype)
        if _fits_with_more_headroom(found, plan):
            change = _mesh_change(plan, found)
            change |= {"questions": questions} if questions != plan.questions else {}
            change |= {"quantize" if dtype == "int8" else "dtype": dtype} if dtype != plan.dtype else {}
            return _as_options(change), found
    for slice_ in _larger_slices(plan.slice):
        found = plan_search(plan.spec, config, slice_, questions=plan.questions, dtype=plan.dtype)
        if fits(found):
            return f"--topology {slice_.name}", found
    return None


def best_per_generation(settings: TrainSettings, config: MllamaConfig, dataset: DatasetSize) -> list[TrainingPlan]:
    """Plan a run on the smallest slice of each TPU generation that holds it, on its best mesh, the best plan first.

    The best plan loses the smallest share of its chips' arithmetic to moving bytes. If two lose the same, it is the one
    with fewer chips.
    """
    found = []
    for generation in GENERATIONS.values():
        for shape in generation.shapes:
            plan = best_mesh(settings, config, Slice(generation, shape), dataset)
            if plan is not None and fits(plan):
                found.append(plan)
                break
    return sorted(
        found, key=lambda plan: (plan.roofline.step_seconds / plan.roofline.seconds["compute"], plan.slice.chips)
    )
