"""Presentation of plans: for one slice or for the best of all, with the change that would make a run fit."""

import json
from dataclasses import asdict
from typing import Any

from rich.console import Console

from llava_cot_jax.errors import UserError
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.planning.advice import best_per_generation, smallest_search_change, smallest_training_change
from llava_cot_jax.planning.collectives import sent_by_axis
from llava_cot_jax.planning.compiler import CompiledProgram
from llava_cot_jax.planning.programs import WeightDtype
from llava_cot_jax.planning.search_plan import (
    SearchPlan,
    compile_search,
    max_questions,
    plan_search,
    smallest_slices_for_search,
)
from llava_cot_jax.planning.settings import DatasetSize
from llava_cot_jax.planning.slices import Slice
from llava_cot_jax.planning.tables import search_table, training_table
from llava_cot_jax.planning.training_plan import TrainingPlan, best_mesh, compile_training, plan_training
from llava_cot_jax.search.strategies import SearchSpec
from llava_cot_jax.training.settings import TrainSettings

MAX_SLICES_SHOWN = 3
"""Largest number of slices that are shown, and compiled for, where the best slice is to be found."""


def present_training_plan(
    settings: TrainSettings,
    config: MllamaConfig,
    dataset: DatasetSize,
    slice_: Slice | None,
    console: Console,
    *,
    any_mesh: bool,
    mfu: float,
    use_compiler: bool,
    as_json: bool,
) -> None:
    """Plan a training run and print the plan.

    Args:
        settings: Settings of the run.
        config: Configuration of the model.
        dataset: Size of the data set.
        slice_: Slice that the run takes place on; None chooses the best.
        console: Console to print on.
        any_mesh: Whether to choose the best mesh of ``slice_`` instead of the mesh of the settings.
        mfu: MFU, from 0 to 1, that hours are computed for.
        use_compiler: Whether to compile the step for the slice.
        as_json: Whether to print a JSON object for each slice instead of tables.

    Raises:
        UserError: The run cannot be laid out over the slice, or no slice holds it.
    """
    if slice_ is None:
        plans = best_per_generation(settings, config, dataset)[:MAX_SLICES_SHOWN]
        if not plans:
            raise UserError("no slice of up to 256 chips holds this run: train adapters (--lora.rank 32)")
    else:
        plan = best_mesh(settings, config, slice_, dataset) if any_mesh else None
        plans = [plan or plan_training(settings, config, slice_, dataset)]
    for plan in plans:
        compiled = compile_training(plan, config) if use_compiler else None
        if as_json:
            console.print_json(json.dumps(_as_json(plan, compiled) | {"hours": plan.hours(mfu)}))
        else:
            console.print(training_table(plan, compiled, mfu), markup=False)
            if _exceeds_memory(plan, compiled):
                _print_advice(smallest_training_change(plan, config, dataset), console)
    if slice_ is None and not as_json:
        best, mesh = plans[0], plans[0].mesh
        arguments = " ".join(f"--mesh.{axis} {size}" for axis, size in mesh.items())
        console.print(f"recommended: {best.slice.name} ({best.slice.accelerator_type}), {arguments}")


def present_search_plan(
    spec: SearchSpec,
    config: MllamaConfig,
    slice_: Slice | None,
    console: Console,
    *,
    mesh: dict[str, int] | None,
    questions: int,
    dtype: WeightDtype,
    use_compiler: bool,
    as_json: bool,
) -> None:
    """Plan a search and print the plan.

    Args:
        spec: The search.
        config: Configuration of the model.
        slice_: Slice that the search runs on; None chooses the best.
        console: Console to print on.
        mesh: Number of devices along each mesh axis; None splits attention heads over all chips.
        questions: Number of questions that are answered together.
        dtype: Dtype of the weights.
        use_compiler: Whether to compile the search for the slice.
        as_json: Whether to print a JSON object for each slice instead of tables.

    Raises:
        UserError: The search cannot be laid out over the slice, or no slice holds it.
    """
    if slice_ is None:
        plans = smallest_slices_for_search(spec, config, questions=questions, dtype=dtype)[:MAX_SLICES_SHOWN]
        if not plans:
            raise UserError("no slice of up to 256 chips holds this search: --quantize int8, or fewer --questions")
    else:
        plans = [plan_search(spec, config, slice_, mesh, questions=questions, dtype=dtype)]
    for plan in plans:
        compiled = compile_search(plan, config) if use_compiler else None
        if as_json:
            console.print_json(json.dumps(_as_json(plan, compiled)))
        else:
            console.print(search_table(plan, compiled, max_questions(plan, config)), markup=False)
            if _exceeds_memory(plan, compiled):
                _print_advice(smallest_search_change(plan, config), console)
    if slice_ is None and not as_json:
        console.print(f"recommended: {plans[0].slice.name} ({plans[0].slice.accelerator_type})")


def _exceeds_memory(plan: TrainingPlan | SearchPlan, compiled: CompiledProgram | None) -> bool:
    return (plan.headroom if compiled is None else compiled.headroom(plan.slice)) < 0


def _print_advice(change: tuple[str, TrainingPlan | SearchPlan] | None, console: Console) -> None:
    """Print the change that makes a run fit."""
    if change is None:
        console.print("no change makes it fit up to 256 chips of this generation: --topology auto tries the others")
    else:
        options, fitting = change
        console.print(f"would fit, computed: {options} ({sum(fitting.memory.values()) / 1e9:.2f} GB per chip)")


def _as_json(plan: TrainingPlan | SearchPlan, compiled: CompiledProgram | None) -> dict[str, Any]:
    """Return a plan as a JSON object, with computed and compiled figures apart."""
    result: dict[str, Any] = {
        "slice": plan.slice.name,
        "accelerator_type": plan.slice.accelerator_type,
        "chips": plan.slice.chips,
        "mesh": plan.mesh,
        "usable_hbm_bytes": plan.slice.generation.usable_hbm_bytes,
        "computed": {
            "memory": plan.memory,
            "roofline": asdict(plan.roofline if isinstance(plan, TrainingPlan) else plan.decode_step),
        },
        "compiled": None,
    }
    if isinstance(plan, TrainingPlan):
        result["computed"] |= {"flops": plan.flops, "recomputed_flops": plan.recomputed_flops, "steps": plan.steps}
    else:
        result["computed"] |= {"seconds": plan.seconds}
    if compiled is not None:
        result["compiled"] = {name: value for name, value in asdict(compiled).items() if name != "collectives"}
        sent = None if compiled.collectives is None else sent_by_axis(compiled.collectives)
        result["compiled"]["sent_bytes"] = sent
    return result
