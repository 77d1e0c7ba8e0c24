"""What those who plan are told: a run or a search on one slice or on the best of all, and what would make it fit."""

import json
from dataclasses import asdict
from typing import Any

from rich.console import Console

from llava_cot_jax.errors import UserError
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.planning.advice import finalists, smallest_change, smallest_change_of_search
from llava_cot_jax.planning.collectives import sent_by_axis
from llava_cot_jax.planning.compiler import Compiled
from llava_cot_jax.planning.programs import Weight
from llava_cot_jax.planning.report import search_table, training_table
from llava_cot_jax.planning.searching import (
    SearchPlan,
    compile_search,
    most_questions,
    plan_search,
    smallest_for_search,
)
from llava_cot_jax.planning.settings import Data
from llava_cot_jax.planning.slices import Slice
from llava_cot_jax.planning.training import TrainingPlan, best_mesh, compile_training, plan_training
from llava_cot_jax.search.strategies import Plan
from llava_cot_jax.training.settings import TrainSettings

FINALISTS = 3
"""Slices that are compiled for, at most."""


def answer_training(
    settings: TrainSettings,
    config: MllamaConfig,
    data: Data,
    slice_: Slice | None,
    console: Console,
    *,
    any_mesh: bool,
    mfu: float,
    ask_compiler: bool,
    for_machine: bool,
) -> None:
    """Plan a training run.

    Args:
        settings: of the run.
        config: its model's.
        data: that it is trained on.
        slice_: that it is to run on; None chooses the best.
        console: where the answer is printed.
        any_mesh: choose the mesh of ``slice_``, whatever the settings say.
        mfu: the share of the peak that hours are told for.
        ask_compiler: compile the step for the slice too.
        for_machine: print a JSON object for each slice instead of tables.

    Raises:
        UserError: the run cannot be laid out over the slice, or no slice holds it.
    """
    if slice_ is None:
        plans = finalists(settings, config, data)[:FINALISTS]
        if not plans:
            raise UserError("no slice of up to 256 chips holds this run: train adapters (--lora.rank 32)")
    else:
        plan = best_mesh(settings, config, slice_, data) if any_mesh else None
        plans = [plan or plan_training(settings, config, slice_, data)]
    for plan in plans:
        compiled = compile_training(plan, config) if ask_compiler else None
        if for_machine:
            console.print_json(json.dumps(_told(plan, compiled) | {"hours": plan.hours(mfu)}))
        else:
            console.print(training_table(plan, compiled, mfu), markup=False)
            if _lacks_room(plan, compiled):
                _advise(smallest_change(plan, config, data), console)
    if slice_ is None and not for_machine:
        best, mesh = plans[0], plans[0].mesh
        arguments = " ".join(f"--mesh.{axis} {size}" for axis, size in mesh.items())
        console.print(f"recommended: {best.slice.name} ({best.slice.accelerator_type}), {arguments}")


def answer_search(
    plan: Plan,
    config: MllamaConfig,
    slice_: Slice | None,
    console: Console,
    *,
    mesh: dict[str, int] | None,
    questions: int,
    dtype: Weight,
    ask_compiler: bool,
    for_machine: bool,
) -> None:
    """Plan a search.

    Args:
        plan: of the search.
        config: the model's.
        slice_: as for ``answer_training``, and so are ``console``, ``ask_compiler`` and ``for_machine``.
        mesh: the devices along each axis; None cuts heads.
        questions: answered at a time.
        dtype: of the weights.

    Raises:
        UserError: the search cannot be laid out over the slice, or no slice holds it.
    """
    if slice_ is None:
        plans = smallest_for_search(plan, config, questions=questions, dtype=dtype)[:FINALISTS]
        if not plans:
            raise UserError("no slice of up to 256 chips holds this search: --quantize int8, or fewer --questions")
    else:
        plans = [plan_search(plan, config, slice_, mesh, questions=questions, dtype=dtype)]
    for each in plans:
        compiled = compile_search(each, config) if ask_compiler else None
        if for_machine:
            console.print_json(json.dumps(_told(each, compiled)))
        else:
            console.print(search_table(each, compiled, most_questions(each, config)), markup=False)
            if _lacks_room(each, compiled):
                _advise(smallest_change_of_search(each, config), console)
    if slice_ is None and not for_machine:
        console.print(f"recommended: {plans[0].slice.name} ({plans[0].slice.accelerator_type})")


def _lacks_room(plan: TrainingPlan | SearchPlan, compiled: Compiled | None) -> bool:
    return (plan.room if compiled is None else compiled.room(plan.slice)) < 0


def _advise(change: tuple[str, TrainingPlan | SearchPlan] | None, console: Console) -> None:
    """Say what would make fit what does not."""
    if change is None:
        console.print("no change of it fits this generation of chips up to 256 of them: --topology auto tries others")
    else:
        words, fitting = change
        console.print(f"would fit, computed: {words} ({sum(fitting.memory.values()) / 1e9:.2f} GB of a chip)")


def _told(plan: TrainingPlan | SearchPlan, compiled: Compiled | None) -> dict[str, Any]:
    """A plan for a machine to read; what is compiled stands apart."""
    told: dict[str, Any] = {
        "slice": plan.slice.name,
        "accelerator_type": plan.slice.accelerator_type,
        "chips": plan.slice.chips,
        "mesh": plan.mesh,
        "usable_bytes": plan.slice.generation.usable,
        "computed": {
            "bytes": plan.memory,
            "floors": asdict(plan.floors if isinstance(plan, TrainingPlan) else plan.step),
        },
        "compiled": None,
    }
    if isinstance(plan, TrainingPlan):
        told["computed"] |= {"flops": plan.flops, "flops_again": plan.again, "steps": plan.steps}
    else:
        told["computed"] |= {"seconds": plan.seconds}
    if compiled is not None:
        told["compiled"] = {name: value for name, value in asdict(compiled).items() if name != "exchanges"}
        told["compiled"]["sent"] = None if compiled.exchanges is None else sent_by_axis(compiled.exchanges)
    return told
