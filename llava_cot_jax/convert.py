"""Write a checkpoint, or the result of a training run, as a new checkpoint: in another dtype, or for transformers.

python -m llava_cot_jax.convert SRC DST [--for transformers] [--dtype bfloat16] [--convention transformers_4]

With ``--for peft``, the adapters of a run are written as PEFT's; with ``--adapter``, such ones are merged.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import jsonargparse

from llava_cot_jax import cli
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.checkpoint.adapter_settings import read_adapter_settings
from llava_cot_jax.model.checkpoint.folder import read_config, resolve_checkpoint
from llava_cot_jax.model.choices import Dtype
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.convention import Convention
from llava_cot_jax.paths import as_path, checkpoint_path
from llava_cot_jax.training.layout import is_run

if TYPE_CHECKING:
    from llava_cot_jax.training.export import RunExport

_STILL_DIFFERENT = """\
transformers now computes the same vision features. One difference stays: these weights were trained under the
convention 'meta', where a text token that sees no image (in a chat header before the image, or in a text-only sequence
of a mixed batch) gets zero from cross-attention. In transformers it attends to every vision token."""


def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Raises:
        UserError: An argument is wrong, or the checkpoint cannot be found, read or written.
    """
    options = _parser().parse_args(argv)
    run, step = _run(options), ""
    write: Callable[..., None]
    adapter = None if options.adapter is None else read_adapter_settings(options.adapter)
    destination = as_path(options.destination)
    if run:
        from llava_cot_jax.training.export import RunExport

        source = RunExport(run, options.step, options.base)
        config, write, step = source.config, source.write, f"step {source.step} of {options.source}, "
        if options["for"] == "peft":
            print(_write_for_peft(source, destination, options.dtype, step))
            return
    else:
        folder = resolve_checkpoint(options.source)
        config = read_config(folder, options.convention)

        from llava_cot_jax.model.checkpoint.adapter import read_adapter
        from llava_cot_jax.model.checkpoint.conversion import convert_checkpoint

        write = partial(convert_checkpoint, folder, adapter=read_adapter(adapter, config) if adapter else None)

    import numpy as np

    for_transformers = options["for"] == "transformers"
    written = config.for_transformers() if for_transformers else config
    dtype = np.dtype(options.dtype) if options.dtype else None
    with cli.progress_bar("converting") as on_progress:
        write(destination, written, dtype=dtype, on_progress=on_progress)
    if for_transformers and config.convention == "meta":
        print(_STILL_DIFFERENT)
        print(_describe_change(destination, config, written))
    print(f"{destination}: {step}convention {written.convention!r}")


def _describe_change(destination: Path, before: MllamaConfig, after: MllamaConfig) -> str:
    """Return how far logits move by the difference that stays, or why that was not measured."""
    from llava_cot_jax.evaluation.convention_change import measure_change

    try:
        with cli.status("measuring how far logits move"):
            return str(measure_change(destination, before, after))
    except Exception as fault:  # the checkpoint is written, whatever happens here
        first = (str(fault).splitlines() or [type(fault).__name__])[0]
        return (
            f"How far logits move by that was not measured ({first}). On a briefly trained model it was up to 16% of "
            "the largest."
        )


def _write_for_peft(source: "RunExport", destination: Path, dtype: str | None, step: str) -> str:
    """Write the adapters of a run in PEFT's form, and return what is to be said about them."""
    import numpy as np

    base = source.write_adapter(destination, np.dtype(dtype) if dtype else None)
    if source.for_verifier:
        return f"{destination}: {step}an adapter of {base} for --verifier_adapter"
    said, convention = f"{destination}: {step}a LoRA adapter for {base}, convention {source.config.convention!r}", ""
    if source.config.convention != "transformers_5":
        convention = (
            "\ntransformers 5 computes its base model by another convention: put the adapter there on what `llava-cot "
            f"convert {base} FOLDER --for transformers` writes"
        )
    return said + convention


def _run(options: jsonargparse.Namespace) -> Path | None:
    """Return the source's folder if it is a training run. Check that options for one are given with one only."""
    folder = checkpoint_path(options.source)
    if is_run(folder):
        if options.convention:
            raise UserError("--convention is for a checkpoint that does not state its own; a run does: leave it out")
        if options.adapter:
            raise UserError("--adapter is for a checkpoint, and a run has adapters of its own: convert the run first")
        return folder
    if options["for"] == "peft":
        raise UserError(f"--for peft is for the folder of a training run, which {folder} is not")
    for name in ("step", "base"):
        if options[name] is not None:
            raise UserError(f"--{name} is for the folder of a training run, which {folder} is not: leave it out")
    return None


def _parser() -> cli.Parser:
    parser = cli.Parser("convert")
    add = parser.add_argument
    add(
        "source",
        type=str,
        help='Checkpoint to read: a folder in Hugging Face form, an id on the hub, "shapes" for the small model of the '
        "package, or the folder of a training run.",
    )
    add("destination", type=str, help="Folder to write. It must be empty or not exist.")
    add(
        "--for",
        choices=["transformers", "peft"],
        help="Library that is to load the result. For transformers, the indices of the tapped vision layers are "
        "lowered by one, so that versions from 4.56 on compute the right vision features. For peft, the adapters of a "
        "training run are written alone.",
    )
    add(
        "--adapter",
        type=str,
        help="LoRA adapter in the form of the PEFT library to merge into the checkpoint: its folder, or its id on the "
        "hub.",
    )
    add(
        "--step",
        type=int | None,
        default=None,
        help="Step of the training run to convert. By default, that of its newest checkpoint.",
    )
    add(
        "--base",
        type=str,
        help="Present folder of the checkpoint that a training run with adapters or frozen parameters started from, if "
        "it was moved.",
    )
    add(
        "--dtype",
        choices=get_args(Dtype),
        help="Dtype of the weights to write. By default, each tensor's own, or that of a run's trained parameters.",
    )
    add(
        "--convention",
        choices=get_args(Convention),
        help="Convention that the weights were trained with, if config.json does not state it (transformers_4 for "
        "LLaVA-CoT's).",
    )
    return parser


if __name__ == "__main__":
    cli.run(main, command="convert")
