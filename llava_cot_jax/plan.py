"""Will a run fit a TPU slice, how long will it take, and which slice to take: asked before one is rented.

python -m llava_cot_jax.plan --config FILE.yaml --topology v5e:8x8

FILE.yaml is a configuration of ``train``, or of ``generate`` with ``search``. Nothing runs on a TPU: figures come
from the model's own arithmetic, and from the TPU compiler, which works on any Linux machine.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import get_args

import yaml
from rich.console import Console

from llava_cot_jax import cli
from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.settings import Sampling
from llava_cot_jax.model.choices import MESH_AXES, Dtype
from llava_cot_jax.planning import slices
from llava_cot_jax.planning.models import sizes_of
from llava_cot_jax.planning.settings import Data
from llava_cot_jax.search.options import add_arguments, chosen
from llava_cot_jax.training.settings import TrainSettings

AUTO = "auto"


def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Raises:
        UserError: an argument or a configuration that cannot be used; before anything is compiled.
    """
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
    data, slice_ = Data(options.rows, options.tokens), _slice(options.topology)
    config = sizes_of(settings.init_from, settings.convention)

    slices.prepare()
    from llava_cot_jax.planning.answer import answer_training

    answer_training(
        settings,
        config,
        data,
        slice_,
        console,
        any_mesh=options.any_mesh,
        mfu=options.mfu,
        ask_compiler=options.compile,
        for_machine=options.json,
    )


def _plan_search(argv: Sequence[str], console: Console) -> None:
    parser = _parser()
    add = parser.add_argument
    add(
        "--checkpoint",
        type=str,
        default="Llama-3.2-11B-Vision-Instruct",
        help="a folder, a published model's name, or shapes",
    )
    add("--dtype", choices=get_args(Dtype), default="bfloat16", help="of the weights")
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
    slice_, config = _slice(options.topology), sizes_of(options.checkpoint)
    sizes = {axis: size for axis, size in vars(options.mesh).items() if size is not None}

    slices.prepare()
    from llava_cot_jax.planning.answer import answer_search

    answer_search(
        strategy.plan(),
        config,
        slice_,
        console,
        mesh={axis: sizes.get(axis, 1) for axis in MESH_AXES} if sizes else None,
        questions=options.questions,
        dtype=options.quantize or options.dtype,
        ask_compiler=options.compile,
        for_machine=options.json,
    )


def _slice(topology: str) -> slices.Slice | None:
    """The slice that is named; None where one is to be chosen."""
    return None if topology == AUTO else slices.parse(topology)


def _parser() -> cli.Parser:
    parser = cli.Parser("plan", "Plan a training run, or a search, on TPUs.")
    add = parser.add_argument
    add("--topology", type=str, required=True, help="v5e:4x8, v5e-32, 2*v5e:4x8 (two slices), or auto")
    add("--compile", type=bool, default=True, help="ask the TPU compiler too, which takes minutes")
    add("--json", action="store_true", help="print one JSON object for each slice instead of tables")
    return parser


def _is_search(argv: Sequence[str]) -> bool:
    """Whether the arguments, or a configuration file among them, say ``search``."""
    if any(argument.split("=")[0] == "--search" for argument in argv):
        return True
    for configuration in cli.configurations_in(argv):
        try:
            content = yaml.safe_load(configuration.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):  # the parser will say so
            continue
        if isinstance(content, dict) and "search" in content:
            return True
    return False


if __name__ == "__main__":
    cli.run(main, leave=os._exit)
