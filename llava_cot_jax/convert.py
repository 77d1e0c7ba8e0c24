"""Write a checkpoint anew: under published names, in another dtype, for transformers; or one of a training run.

python -m llava_cot_jax.convert SRC DST [--for transformers] [--dtype bfloat16] [--convention transformers_4]
"""

from typing import get_args

import jsonargparse
import numpy as np

from llava_cot_jax import cli
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.checkpoint import FORMAT_DTYPES, checkpoint_path, read_config, resolve_checkpoint
from llava_cot_jax.model.config import Convention
from llava_cot_jax.model.export import convert_checkpoint
from llava_cot_jax.paths import as_path
from llava_cot_jax.training.export import RunExport, is_run

_STILL_DIFFERENT = """\
transformers now computes the same vision features. One difference stays: these weights were trained under the
convention 'meta', where a text row that sees no image (a chat header before the image, a text-only row of a mixed
batch) gets zero from cross-attention; in transformers it attends to every vision token."""


def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Raises:
        UserError: an argument, or anything that finding, reading or writing a checkpoint refuses.
    """
    options = _parser().parse_args(argv)
    for_transformers = options["for"] == "transformers"
    source = _run(options) or resolve_checkpoint(options.source)
    config = source.config if isinstance(source, RunExport) else read_config(source, options.convention)
    written = config.for_transformers() if for_transformers else config
    destination, dtype = as_path(options.destination), np.dtype(options.dtype) if options.dtype else None
    with cli.progress_bar("converting") as on_progress:
        if isinstance(source, RunExport):
            source.write(destination, written, dtype=dtype, on_progress=on_progress)
        else:
            convert_checkpoint(source, destination, written, dtype=dtype, on_progress=on_progress)
    if for_transformers and config.convention == "meta":
        print(_STILL_DIFFERENT)
    of_step = f"step {source.step} of {options.source}, " if isinstance(source, RunExport) else ""
    print(f"{destination}: {of_step}convention {written.convention!r}")


def _run(options: jsonargparse.Namespace) -> RunExport | None:
    """The training run that the source is, if it is one."""
    folder = checkpoint_path(options.source)
    if is_run(folder):
        if options.convention:
            raise UserError("--convention is for checkpoints that do not say it; a run does: leave it out")
        return RunExport(folder, options.step, options.base)
    for name in ("step", "base"):
        if options[name] is not None:
            raise UserError(f"--{name} is for the folder of a training run, which {folder} is not: leave it out")
    return None


def _parser() -> cli.Parser:
    parser = cli.Parser("convert", "Write a checkpoint anew.")
    add = parser.add_argument
    add("source", type=str, help="a folder in Hugging Face form, an id on the hub, or the folder of a training run")
    add("destination", type=str, help="the folder to make; it must not exist, or be empty")
    add(
        "--for",
        choices=["transformers"],
        help="lower the vision taps by one, so that transformers 4.56 and later compute the right features",
    )
    add("--step", type=int | None, default=None, help="of a training run; default: its newest checkpoint")
    add("--base", type=str, help="of a run of adapters: where the checkpoint that it started from is now")
    add("--dtype", choices=[dtype.name for dtype in FORMAT_DTYPES.values()], help="default: each tensor's own")
    add(
        "--convention",
        choices=get_args(Convention),
        help="what the weights were trained with, where config.json does not say so (LLaVA-CoT's: transformers_4)",
    )
    return parser


if __name__ == "__main__":
    cli.run(main)
