"""Will a run fit a TPU slice, how long will it take, and which slice to take: asked before one is rented.

python -m llava_cot_jax.plan --config FILE.yaml --topology v5e:8x8

FILE.yaml is a configuration of ``train``, or of ``generate`` with ``search``. Nothing runs on a TPU: figures come
from the model's own arithmetic, and from the TPU compiler, which works on any Linux machine.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from llava_cot_jax import cli
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.sharding import MESH_AXES
from llava_cot_jax.planning import slices
from llava_cot_jax.planning.advice import finalists, smallest_change, smallest_change_of_search
from llava_cot_jax.planning.collectives import sent_by_axis
from llava_cot_jax.planning.compiler import Compiled
from llava_cot_jax.planning.models import sizes_of
from llava_cot_jax.planning.report import search_table, training_table
from llava_cot_jax.planning.searching import (
    SearchPlan,
    compile_search,
    most_questions,
    plan_search,
    smallest_for_search,
)
from llava_cot_jax.planning.training import Data, TrainingPlan, best_mesh, compile_training, plan_training
from llava_cot_jax.search.options import add_arguments, chosen
from llava_cot_jax.search.sampling import Sampling
from llava_cot_jax.training.settings import TrainSettings

AUTO = "auto"

FINALISTS = 3
"""Slices that are compiled for, at most."""


def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Raises:
        UserError: an argument or a configuration that cannot be used; before anything is compiled.
    """
    slices.prepare()
    given = sys.argv[1:] if argv is None else argv
    console = Console(highlight=False, soft_wrap=True)
    (_plan_search if _is_search(given) else _plan_training)(given, console)


def _plan_training(argv: Sequence[str], console: Console) -> None:
    parser = _parser()
    parser.add_class_arguments(TrainSettings)
    add = parser.add_argument
    add("--any_mesh", type=bool, default=False, help="choose the mesh, whatever the configuration says")
    add("--rows", type=int, default=Data.rows, help="of the data set; default: LLaVA-CoT-100k's")
    add("--tokens", type=int, default=Data.tokens, help="of a row, on average")
    add("--mfu", type=float, default=0.4, help="the share of the peak that hours are told for")
    options = parser.instantiate(parser.parse_args(list(argv)))
    settings = TrainSettings(**{field.name: options[field.name] for field in fields(TrainSettings)})
    if not 0 < options.mfu <= 1:
        raise UserError(f"mfu is {options.mfu}; it is a share: above 0, at most 1")
    config, data = sizes_of(settings.init_from, settings.convention), Data(options.rows, options.tokens)

    if options.topology == AUTO:
        plans = finalists(settings, config, data)[:FINALISTS]
        if not plans:
            raise UserError("no slice of up to 256 chips holds this run: train adapters (--lora.rank 32)")
    else:
        slice_ = slices.parse(options.topology)
        plan = best_mesh(settings, config, slice_, data) if options.any_mesh else None
        plans = [plan or plan_training(settings, config, slice_, data)]
    for plan in plans:
        compiled = compile_training(plan, config) if options.compile else None
        if options.json:
            console.print_json(json.dumps(_told(plan, compiled) | {"hours": plan.hours(options.mfu)}))
        else:
            console.print(training_table(plan, compiled, options.mfu), markup=False)
            if _lacks_room(plan, compiled):
                _advise(smallest_change(plan, config, data), console)
    if options.topology == AUTO and not options.json:
        best, mesh = plans[0], plans[0].mesh
        arguments = " ".join(f"--mesh.{axis} {size}" for axis, size in mesh.items())
        console.print(f"recommended: {best.slice.name} ({best.slice.accelerator_type}), {arguments}")


def _lacks_room(plan: TrainingPlan | SearchPlan, compiled: Compiled | None) -> bool:
    return (plan.room if compiled is None else compiled.room(plan.slice)) < 0


def _advise(change: tuple[str, TrainingPlan | SearchPlan] | None, console: Console) -> None:
    """Say what would make fit what does not."""
    if change is None:
        console.print("no change of it fits this generation of chips up to 256 of them: --topology auto tries others")
    else:
        words, fitting = change
        console.print(f"would fit, computed: {words} ({sum(fitting.memory.values()) / 1e9:.2f} GB of a chip)")


def _plan_search(argv: Sequence[str], console: Console) -> None:
    parser = _parser()
    add = parser.add_argument
    add("--checkpoint", type=str, default="Llama-3.2-11B-Vision-Instruct", help="a folder, or a published model's name")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16", help="of the weights")
    add("--quantize", choices=["int8"], help="the text layers' weights")
    add("--questions", type=int, default=1, help="answered at a time")
    for axis in MESH_AXES:
        add(f"--mesh.{axis}", type=int | None, default=None, help="devices on this axis; default: heads are cut")
    add_arguments(parser)
    options = parser.parse_args(list(argv))
    strategy = chosen(options)
    assert not isinstance(strategy, Sampling)  # there is a search
    if options.questions < 1:
        raise UserError(f"questions is {options.questions}; it must be at least 1")
    config, plan = sizes_of(options.checkpoint), strategy.plan()
    how: dict[str, Any] = {"questions": options.questions, "dtype": options.quantize or options.dtype}
    sizes = {axis: size for axis, size in vars(options.mesh).items() if size is not None}
    mesh = {axis: sizes.get(axis, 1) for axis in MESH_AXES} if sizes else None

    if options.topology == AUTO:
        plans = smallest_for_search(plan, config, **how)[:FINALISTS]
        if not plans:
            raise UserError("no slice of up to 256 chips holds this search: --quantize int8, or fewer --questions")
    else:
        plans = [plan_search(plan, config, slices.parse(options.topology), mesh, **how)]
    for each in plans:
        compiled = compile_search(each, config) if options.compile else None
        if options.json:
            console.print_json(json.dumps(_told(each, compiled)))
        else:
            console.print(search_table(each, compiled, most_questions(each, config)), markup=False)
            if _lacks_room(each, compiled):
                _advise(smallest_change_of_search(each, config), console)
    if options.topology == AUTO and not options.json:
        console.print(f"recommended: {plans[0].slice.name} ({plans[0].slice.accelerator_type})")


def _parser() -> cli.Parser:
    parser = cli.Parser("plan", "Plan a training run, or a search, on TPUs.")
    add = parser.add_argument
    add("--topology", type=str, required=True, help="v5e:4x8, v5e-32, 2*v5e:4x8 (two slices), or auto")
    add("--compile", type=bool, default=True, help="ask the TPU compiler too, which takes minutes")
    add("--json", action="store_true", help="print one JSON object for each slice instead of tables")
    return parser


def _is_search(argv: Sequence[str]) -> bool:
    """Whether the arguments, or a configuration file among them, say ``search``."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    known, rest = parser.parse_known_args(list(argv))
    if any(argument.split("=")[0] == "--search" for argument in rest):
        return True
    if known.config is None or not Path(known.config).is_file():
        return False
    try:
        content = yaml.safe_load(Path(known.config).read_text())
    except (OSError, ValueError, yaml.YAMLError):  # the parser will say so
        return False
    return isinstance(content, dict) and "search" in content


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


if __name__ == "__main__":
    cli.run(main, leave=os._exit)
