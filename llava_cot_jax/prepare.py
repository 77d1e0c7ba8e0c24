"""Prepare LLaVA-CoT-100k for training: check it, split it, write it to be read at random; and look at it.

python -m llava_cot_jax.prepare --annotations train.jsonl --images image.zip.part-aa --output DIR
python -m llava_cot_jax.prepare --show DIR --rows 4
"""

import os

import jsonargparse
from rich.console import Console

from llava_cot_jax import cli
from llava_cot_jax.data.settings import ChatSettings, Request
from llava_cot_jax.data.sources import open_rows
from llava_cot_jax.errors import UserError
from llava_cot_jax.files import check_writable
from llava_cot_jax.model.checkpoint.finding import named_folder
from llava_cot_jax.paths import as_path

TO_PREPARE = ("annotations", "images", "output")


def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Raises:
        UserError: an argument, or anything that reading, checking or writing the data refuses.
    """
    options = _parser().parse_args(argv)
    for name in ("workers", "allow_missing", "rows"):
        if options[name] < 0:
            raise UserError(f"{name} is {options[name]}; it must be at least 0")
    if options.show is not None:
        _show(options)
    elif missing := [f"--{name}" for name in TO_PREPARE if options[name] is None]:
        raise UserError(f"give {' and '.join(missing)} to prepare data, or --show to look at some")
    else:
        _prepare(options)


def _prepare(options: jsonargparse.Namespace) -> None:
    request = Request(
        annotations=as_path(options.annotations),
        images=as_path(options.images),
        output=as_path(options.output),
        max_side=options.max_side,
        limit=options.limit,
        validation_share=options.validation_share,
    )
    # What is missing is told before libraries are imported that take seconds.
    from llava_cot_jax.data.raw.annotations import open_annotations
    from llava_cot_jax.data.raw.images import open_images

    open_images(request.images)
    open_annotations(request.annotations).close()

    from llava_cot_jax.data.raw.preparation import TooManyLeftOut, find_prepared, prepare

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


def _show(options: jsonargparse.Namespace) -> None:
    path = as_path(options.sheet)
    check_writable(path)
    data = open_rows(options.show, options.split)
    if options.checkpoint is not None and (folder := named_folder(options.checkpoint)):
        from llava_cot_jax.processing.processor import check_tokenizer

        check_tokenizer(folder)

    from llava_cot_jax.data.chat import Chat, LeftOut
    from llava_cot_jax.data.show import describe, draw_sheet, processor_to_look_with

    processor = processor_to_look_with(options.show, options.checkpoint)
    chat = Chat(processor, options.chat)
    console = Console(highlight=False, soft_wrap=True)
    rows = [(index, data[index]) for index in range(min(options.rows, len(data)))]
    for index, row in rows:
        try:
            console.print(describe(index, row, chat.encode(row.turns), processor.tokenizer))
        except LeftOut as reason:
            console.print(f"row {index} ({row.id}) is left out: {reason}", markup=False)
    if rows:
        try:
            draw_sheet(rows, processor.config.vision).save(path, "PNG")
        except OSError as fault:
            raise UserError(f"the picture of the tiles cannot be written to {path}: {fault.strerror}") from None
        print(f"wrote the tiles to {path}")


def _parser() -> cli.Parser:
    parser = cli.Parser("prepare")
    add = parser.add_argument
    add("--annotations", type=str, help="train.jsonl, or another file in its format")
    add(
        "--images",
        type=str,
        help="a folder, a .zip, one part of a split zip (image.zip.part-aa), or the folder of the parts; read in place",
    )
    add("--output", type=str, help="the directory to make; the work is done in OUTPUT.preparing beside it")
    add("--max_side", type=int, help="shrink larger images to so many pixels on their longest side")
    workers = min(os.cpu_count() or 0, 16)  # each takes some 500 MB, and the disk has its limits
    add("--workers", type=int, default=workers, help="processes; 0 does all in one (default: one per core, up to 16)")
    add("--limit", type=int, help="use so many lines only, from the first")
    add("--allow_missing", type=int, default=0, help="how many rows may be left out (default: none)")
    add("--validation_share", type=float, default=0.01, help="of the images, with all their rows (default: 0.01)")
    add("--show", type=str, help='instead: print rows of a prepared directory, or of the "shapes" that come along')
    add("--rows", type=int, default=4, help="how many to show (default: 4)")
    add("--split", type=str, default="train", help="which rows to show (default: train)")
    add(
        "--checkpoint",
        type=str,
        help="a checkpoint whose tokenizer and tiles to show rows with: a folder, an id on the hub, or shapes",
    )
    add("--sheet", type=str, default="rows.png", help="the picture of their tiles (default: rows.png)")
    parser.add_class_arguments(ChatSettings, "chat", help="how turns become tokens, where rows are shown")
    return parser


if __name__ == "__main__":
    cli.run(main)
