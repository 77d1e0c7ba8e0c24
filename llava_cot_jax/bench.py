"""Measure compiled decoding and search against their roofline, and against transformers.

python -m llava_cot_jax.bench --random 100m --dtype float32
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import jsonargparse
from rich.console import Console

from llava_cot_jax import cli
from llava_cot_jax.benchmark.workload import RANDOM_MODELS, Workload
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.checkpoint.adapter_settings import read_adapter_settings
from llava_cot_jax.model.checkpoint.folder import resolve_checkpoint
from llava_cot_jax.model.choices import Dtype
from llava_cot_jax.model.config import MllamaConfig

if TYPE_CHECKING:
    from llava_cot_jax.model.mllama import Mllama


def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Raises:
        UserError: An option, a file or a checkpoint cannot be used.
    """
    parser = _parser()
    options = parser.instantiate(parser.parse_args(argv))
    if bool(options.checkpoint) == bool(options.random):
        raise UserError("give either --checkpoint or --random")
    if options.adapter and (options.random or options.baseline):
        raise UserError("--adapter is for --checkpoint without --baseline: leave one of them out")
    if options.baseline and options.quantize:
        raise UserError("transformers has no such int8: give --baseline without --quantize")
    if options.runs < 1:
        raise UserError(f"runs is {options.runs}; it must be at least 1")
    if options.adapter:
        read_adapter_settings(options.adapter)  # refuses before the weights are fetched
    folder = resolve_checkpoint(options.checkpoint) if options.checkpoint else None

    import jax

    with tempfile.TemporaryDirectory() as kept:
        jax.config.update("jax_compilation_cache_dir", kept)  # an empty one, so that the first compilation is cold
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        _bench(options, folder)


def _bench(options: jsonargparse.Namespace, folder: Path | None) -> None:
    from llava_cot_jax.benchmark.report import measure

    console = Console(stderr=options.json)
    if not console.is_terminal:
        console.width = 150
    model = _model(options, folder)
    if options.quantize:
        model.quantize()

    def write(part: Mapping[str, Any]) -> None:
        if options.json:
            print(json.dumps(part), flush=True)

    measure(model, options.workload, options.runs, console, baseline=bool(options.baseline), write=write)


def _parser() -> cli.Parser:
    parser = cli.Parser("bench")
    add = parser.add_argument
    add(
        "--checkpoint",
        type=str,
        help='Checkpoint to measure: a folder in Hugging Face form, an id on the hub, or "shapes", the small model '
        "of the package.",
    )
    add("--adapter", type=str, help="LoRA adapter in the form of the PEFT library to merge into the weights.")
    add(
        "--random",
        choices=list(RANDOM_MODELS),
        help="Size of a model of random weights to measure instead of a checkpoint. They are made on the device.",
    )
    add("--dtype", choices=get_args(Dtype), default="bfloat16", help="Dtype of the weights.")
    add(
        "--quantize",
        choices=["int8"],
        help="Keep the text layers' weights in int8, which takes half the memory of bfloat16.",
    )
    add(
        "--workload",
        type=Workload,
        default=Workload(),
        help="YAML file with the lengths to measure with. Each can be given as an option, too.",
    )
    add("--runs", type=int, default=10, help="Number of timed runs of each measurement.")
    add(
        "--baseline",
        choices=["transformers"],
        help="Measure transformers as well: upstream's loop of calls, and batched sampling.",
    )
    add(
        "--json",
        type=bool,
        default=False,
        help="Print JSON objects, one a line: what is measured with, each measurement as soon as it is made, and the "
        "totals. The tables go to stderr.",
    )
    return parser


def _model(options: jsonargparse.Namespace, folder: Path | None) -> "Mllama":
    from llava_cot_jax.benchmark.inputs import random_model
    from llava_cot_jax.model.mllama import Mllama
    from llava_cot_jax.model.sharding import check_mesh, default_mesh

    if folder is None:
        mesh = default_mesh(RANDOM_MODELS[options.random]())
        with cli.status("making weights"):
            return random_model(options.random, options.dtype, mesh)
    config = MllamaConfig.from_pretrained(folder)  # of any convention: it changes no time
    mesh = default_mesh(config)
    if mesh is not None:
        check_mesh(config, mesh)
    with cli.status("loading weights"):
        return Mllama.from_pretrained(folder, config=config, dtype=options.dtype, mesh=mesh, adapter=options.adapter)


if __name__ == "__main__":
    cli.run(main, leave=os._exit, command="bench")
