"""Prepare LLaVA-CoT-100k for training: check it, split it, and write it to be read at random.

python -m llava_cot_jax.prepare --annotations train.jsonl --images image.zip.part-aa --output DIR
"""

import os
from pathlib import Path

from llava_cot_jax import cli
from llava_cot_jax.data.preparation import Request, TooManyLeftOut, find_prepared, prepare
from llava_cot_jax.errors import UserError

MAX_WORKERS = 16
"""By default. Each takes about half a gigabyte of memory."""


def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Raises:
        UserError: an argument, or anything that reading, checking or writing the data refuses.
    """
    options = _parser().parse_args(argv)
    request = Request(
        annotations=Path(options.annotations),
        images=Path(options.images),
        output=Path(options.output),
        max_side=options.max_side,
        limit=options.limit,
        validation_share=options.validation_share,
    )
    for name in ("workers", "allow_missing"):
        if options[name] < 0:
            raise UserError(f"{name} is {options[name]}; it must be at least 0")
    if summary := find_prepared(request):
        print(f"{request.output} was prepared before")
    else:
        try:
            summary = prepare(
                request, workers=options.workers, allow_missing=options.allow_missing, progress=cli.progress_bar
            )
        except TooManyLeftOut as refusal:
            print(refusal.summary.table())
            raise
    print(summary.table())


def _parser() -> cli.Parser:
    parser = cli.Parser("prepare", "Prepare LLaVA-CoT-100k for training.")
    add = parser.add_argument
    add("--annotations", type=str, required=True, help="train.jsonl, or another file in its format")
    add(
        "--images",
        type=str,
        required=True,
        help="a folder, a .zip, one part of a split zip (image.zip.part-aa), or the folder of the parts; read in place",
    )
    add(
        "--output",
        type=str,
        required=True,
        help="the directory to make; the work is done in OUTPUT.preparing beside it",
    )
    add("--max-side", type=int, help="shrink larger images to so many pixels on their longest side")
    add(
        "--workers",
        type=int,
        default=min(os.cpu_count() or 0, MAX_WORKERS),
        help=f"processes; 0 does all in one (default: one per core, {MAX_WORKERS} at most)",
    )
    add("--limit", type=int, help="use so many lines only, from the first")
    add("--allow-missing", type=int, default=0, help="how many rows may be left out (default: none)")
    add("--validation-share", type=float, default=0.01, help="of the images, with all their rows (default: 0.01)")
    return parser


if __name__ == "__main__":
    cli.run(main)
