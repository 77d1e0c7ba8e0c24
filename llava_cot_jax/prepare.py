"""Prepare LLaVA-CoT-100k for training: check it, split it and write it for random access; or show prepared rows.

python -m llava_cot_jax.prepare --annotations train.jsonl --images image.zip.part-aa --output DIR
python -m llava_cot_jax.prepare --show DIR --rows 4
"""

import json
import os
import sys
from collections.abc import Callable, Sequence

import jsonargparse
from rich.console import Console

from llava_cot_jax import cli
from llava_cot_jax.data.raw.inputs import annotations_path, images_path
from llava_cot_jax.data.settings import ChatSettings, PrepareSettings
from llava_cot_jax.data.sources import open_rows
from llava_cot_jax.errors import UserError
from llava_cot_jax.files import check_file_writable
from llava_cot_jax.model.checkpoint.folder import named_folder
from llava_cot_jax.paths import as_path, writing_errors

TO_PREPARE = ("annotations", "images", "output")


def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Raises:
        UserError: An argument is wrong, or the data cannot be read, used or written.
    """
    options = _parser().parse_args(_with_lists(sys.argv[1:] if argv is None else argv))
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
    settings = PrepareSettings(
        annotations=annotations_path(options.annotations),
        images=images_path(options.images),
        output=as_path(options.output),
        max_side=options.max_side,
        limit=options.limit,
        validation_share=options.validation_share,
    )
    # Missing files are reported before libraries are imported that take seconds.
    from llava_cot_jax.data.raw.annotations import open_annotations
    from llava_cot_jax.data.raw.images import open_images

    open_images(settings.images)
    open_annotations(settings.annotations).close()

    from llava_cot_jax.data.raw.preparation import TooManySkipped, find_prepared, prepare_dataset

    if summary := find_prepared(settings):
        print(f"{settings.output} was prepared before")
    else:
        try:
            summary = prepare_dataset(
                settings,
                workers=options.workers,
                allow_missing=options.allow_missing,
                progress=cli.progress_bar,
                note=print,
            )
        except TooManySkipped as refusal:
            print(refusal.summary.table())
            raise
    print(summary.table())


def _with_lists(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with the several paths that a shell makes of a pattern as one list in JSON."""
    made: list[str] = []
    for argument in arguments:
        option = made[-2] if len(made) > 1 else ""
        if option in ("--annotations", "--images") and not argument.startswith("-"):
            made[-1] = json.dumps([*(json.loads(made[-1]) if made[-1].startswith('["') else made[-1:]), argument])
        else:
            made.append(argument)
    return made


def _show(options: jsonargparse.Namespace) -> None:
    path = as_path(options.sheet)
    check_file_writable(path)
    data = open_rows(options.show, options.split)
    if options.checkpoint is not None and (folder := named_folder(options.checkpoint)):
        from llava_cot_jax.processing.processor import check_tokenizer

        check_tokenizer(folder)

    from llava_cot_jax.data.chat import Chat, SkippedConversation
    from llava_cot_jax.data.show import describe_row, display_processor, draw_sheet

    processor = display_processor(options.show, options.checkpoint)
    chat = Chat(processor, options.chat)
    console = Console(highlight=False, soft_wrap=True)
    rows = [(index, data[index]) for index in range(min(options.rows, len(data)))]
    for index, row in rows:
        try:
            console.print(describe_row(index, row, chat.encode(row.turns), processor.tokenizer))
        except SkippedConversation as reason:
            console.print(f"row {index} ({row.id}) is skipped: {reason}", markup=False)
    if any(row.images for _, row in rows):
        sheet = draw_sheet(rows, processor.config.vision)
        with writing_errors(path):
            sheet.save(path, "PNG")
        print(f"wrote the tiles to {path}")


def _parser() -> cli.Parser:
    parser = cli.Parser("prepare")
    _add_preparation_options(parser.add_argument_group("Preparation of a data set").add_argument)
    _add_display_options(parser.add_argument_group("Display of prepared rows").add_argument)
    parser.add_class_arguments(ChatSettings, "chat", help="Chat: how conversations become tokens, for --show.")
    return parser


def _add_preparation_options(add: Callable[..., object]) -> None:
    workers = min(os.cpu_count() or 0, 16)  # each takes about 500 MB, and more would wait for the disk
    add(
        "--annotations",
        type=list[str] | str,
        help="Annotations: train.jsonl of LLaVA-CoT-100k, or a file in its format, as JSON Lines or a JSON array. A "
        "row may have several images (a list), or none.",
    )
    add(
        "--images",
        type=list[str] | str,
        help="Images, read in place: a folder, a .zip, one part of a split zip (image.zip.part-aa), or the folder of "
        "the parts. A pattern such as image.zip.part-* works too.",
    )
    add("--output", type=str, help="Folder to make. Unfinished work is kept in OUTPUT.preparing beside it.")
    add(
        "--max_side",
        type=int,
        help="Longest side of a written image in pixels. Larger images are shrunk, also those of more than 89 million "
        "pixels (up to 536 million), which are refused without this option.",
    )
    add(
        "--workers",
        type=int,
        default=workers,
        help="Number of worker processes; with 0, this process does the work. By default, one per core, up to 16.",
    )
    add("--limit", type=int, help="Number of lines to use, from the first. By default, all.")
    add("--allow_missing", type=int, default=0, help="Number of rows that may be skipped.")
    add(
        "--validation_share",
        type=float,
        default=0.01,
        help="Share of the images that are for validation, with all their rows.",
    )


def _add_display_options(add: Callable[..., object]) -> None:
    add(
        "--show",
        type=str,
        help='Print rows of this prepared folder, or of "shapes", the data set that comes with the package, and '
        "prepare nothing.",
    )
    add("--rows", type=int, default=4, help="Number of rows to show.")
    add("--split", type=str, default="train", help="Split whose rows are shown.")
    add(
        "--checkpoint",
        type=str,
        help="Checkpoint whose tokenizer and tiles are shown: a folder in Hugging Face form, an id on the hub, or "
        '"shapes".',
    )
    add(
        "--sheet",
        type=str,
        default="rows.png",
        help="Picture file for the tiles of the shown rows.",
    )


if __name__ == "__main__":
    cli.run(main, command="prepare")
