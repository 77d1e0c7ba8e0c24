"""Predict whether a training run or a search fits a TPU slice, how long it takes, and which slice is best.

python -m llava_cot_jax.plan --config FILE.yaml --topology v5e:8x8

FILE.yaml is a configuration of ``train``, or one of ``generate`` with ``search``. No TPU is needed: the figures come
from the model's own arithmetic, and from the TPU compiler, which works on any Linux machine.
"""

import argparse
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
from llava_cot_jax.planning.model_sizes import model_config_for
from llava_cot_jax.planning.settings import DatasetSize
from llava_cot_jax.search.options import add_arguments, strategy_or_sampling
from llava_cot_jax.search.request_options import add_request_options
from llava_cot_jax.training.settings import RENAMED_SETTINGS, TrainSettings

AUTO = "auto"

IGNORED_SETTINGS = ("output",)
"""Settings of a training run that a plan does not depend on, and so need not be given."""


def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Raises:
        UserError: An option or a configuration cannot be used. Nothing has been compiled then.
    """
    given = sys.argv[1:] if argv is None else argv
    console = Console(highlight=False, soft_wrap=True)
    (_plan_search if _is_search(given) else _plan_training)(given, console)


def _plan_training(argv: Sequence[str], console: Console) -> None:
    parser = _parser()
    parser.add_class_arguments(TrainSettings, skip=set(IGNORED_SETTINGS))
    add = parser.add_argument
    for name in IGNORED_SETTINGS:
        add(f"--{name}", type=str, default="", help=argparse.SUPPRESS)
    add("--any_mesh", type=bool, default=False, help="Choose the best mesh instead of the configured one.")
    add(
        "--examples",
        type=int,
        default=DatasetSize.examples,
        help="Number of training examples in an epoch. The default is that of LLaVA-CoT-100k.",
    )
    add(
        "--tokens_per_example",
        type=int,
        default=DatasetSize.tokens_per_example,
        help="Mean number of tokens of an example. The default is that of LLaVA-CoT-100k.",
    )
    add(
        "--images_per_example",
        type=int,
        default=DatasetSize.images_per_example,
        help="Number of images of each example. A batch is as large as the example in it with the most images.",
    )
    add("--mfu", type=float, default=0.4, help="Model FLOPs utilization, from 0 to 1, that hours are computed for.")
    options = parser.instantiate(parser.parse_args(list(argv)))
    settings = TrainSettings(**{field.name: options[field.name] for field in fields(TrainSettings)})
    if not 0 < options.mfu <= 1:
        raise UserError(f"mfu is {options.mfu}; it must be above 0 and at most 1")
    dataset = DatasetSize(options.examples, options.tokens_per_example, options.images_per_example)
    slice_ = _slice(options.topology)
    config = model_config_for(settings.checkpoint, settings.convention)

    slices.enable_tpu_compiler()
    from llava_cot_jax.planning.present import present_training_plan

    present_training_plan(
        settings,
        config,
        dataset,
        slice_,
        console,
        any_mesh=options.any_mesh,
        mfu=options.mfu,
        use_compiler=options.compile,
        as_json=options.json,
    )


def _plan_search(argv: Sequence[str], console: Console) -> None:
    parser = _parser()
    add = parser.add_argument
    add(
        "--checkpoint",
        type=str,
        default="Llama-3.2-11B-Vision-Instruct",
        help="Checkpoint whose sizes are planned with: a folder in Hugging Face form, the id of a published model on "
        'the hub, or "shapes", the small model of the package.',
    )
    add("--dtype", choices=get_args(Dtype), default="bfloat16", help="Dtype of the weights.")
    add(
        "--quantize",
        choices=["int8"],
        help="Keep the text layers' weights in int8, which takes half the memory of bfloat16.",
    )
    add("--questions", type=int, default=1, help="Number of questions that are answered together.")
    for axis in MESH_AXES:
        add(
            f"--mesh.{axis}",
            type=int | None,
            default=None,
            help=f'Number of devices on the mesh axis "{axis}". By default, attention heads are split over all chips.',
        )
    add_arguments(parser)
    parser.ignore(add_request_options)  # so that a configuration of generate can be planned as it is
    options = parser.parse_args(list(argv))
    strategy = strategy_or_sampling(options)
    assert not isinstance(strategy, Sampling)  # there is a search
    if options.questions < 1:
        raise UserError(f"questions is {options.questions}; it must be at least 1")
    slice_, config = _slice(options.topology), model_config_for(options.checkpoint)
    sizes = {axis: size for axis, size in vars(options.mesh).items() if size is not None}

    slices.enable_tpu_compiler()
    from llava_cot_jax.planning.present import present_search_plan

    present_search_plan(
        strategy.to_spec(),
        config,
        slice_,
        console,
        mesh={axis: sizes.get(axis, 1) for axis in MESH_AXES} if sizes else None,
        questions=options.questions,
        dtype=options.quantize or options.dtype,
        use_compiler=options.compile,
        as_json=options.json,
    )


def _slice(topology: str) -> slices.Slice | None:
    """Return the slice that is named; None where the best one is to be chosen."""
    return None if topology == AUTO else slices.parse_topology(topology)


def _parser() -> cli.Parser:
    parser = cli.Parser("plan", RENAMED_SETTINGS)
    add = parser.add_argument
    add(
        "--topology",
        type=str,
        required=True,
        help="Slice as v5e:4x8, v5e-32 or 2*v5e:4x8 (two slices), or auto, which chooses the best one.",
    )
    add("--compile", type=bool, default=True, help="Compile for the slice too, which takes minutes.")
    add("--json", type=bool, default=False, help="Print one JSON object for each slice instead of tables.")
    return parser


def _is_search(argv: Sequence[str]) -> bool:
    """Whether the arguments, or a configuration file among them, set ``search``."""
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
