"""Fine-tune Llama-3.2-Vision on staged answers, on one machine or on every host of a TPU slice.

python -m llava_cot_jax.train --config FILE.yaml [dotted overrides]
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jsonargparse
import yaml
from rich.console import Console

from llava_cot_jax import cli
from llava_cot_jax.data.sources import open_training_rows, open_validation_rows
from llava_cot_jax.errors import UserError
from llava_cot_jax.hosts.joining import join_hosts
from llava_cot_jax.hosts.lifeline import Lifeline
from llava_cot_jax.hosts.options import add_hosts_options, group_in
from llava_cot_jax.hosts.process_group import ProcessGroup, find_group
from llava_cot_jax.interruption import EXIT_CODE
from llava_cot_jax.model.checkpoint.folder import named_folder, resolve_checkpoint
from llava_cot_jax.paths import as_path, check_folder_writable
from llava_cot_jax.training.host_memory import computes_on_cpu, keep_freed_memory
from llava_cot_jax.training.layout import CONFIGURATION, MOVABLE, is_run, kept_model_files, relocated
from llava_cot_jax.training.settings import RENAMED_SETTINGS, TrainSettings

if TYPE_CHECKING:
    from llava_cot_jax.training.loop import TrainResult

PRINTED_ANSWERS = 3
"""Number of answers to validation questions that are printed."""


def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Raises:
        UserError: A setting or a file cannot be used. This is found before anything expensive starts.
    """
    arguments = sys.argv[1:] if argv is None else argv
    report = partial(cli.report, command="train")
    try:
        settings, options = read_arguments(arguments)
    except UserError:
        with Lifeline(group_in(arguments)).shared_failures(report):
            raise
    group = find_group(**vars(options.hosts))
    lifeline = Lifeline(group)
    with lifeline.shared_failures(report):
        _check_files(settings)
        if settings.eval_generations and group.count > 1:
            raise UserError(
                "eval_generations is set, but only one process can answer: set it to 0, and use generate later"
            )
        lifeline.meet()
        _train(settings, options.accept_changes, group, lifeline)


def _train(settings: TrainSettings, accept_changes: bool, group: ProcessGroup, lifeline: Lifeline) -> None:
    """Train once all processes of the run are there.

    Raises:
        UserError: A setting or a file cannot be used, or differs between the processes.
    """
    from llava_cot_jax.training.fingerprints import start_fields
    from llava_cot_jax.training.loop import train

    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs the traceback of each thread, then raises
    cli.enable_compilation_cache()
    lifeline.agree(lambda: start_fields(settings, accept_changes))
    join_hosts(group)
    lifeline.catch_aborts()
    first = group.index == 0
    console = Console(highlight=False, soft_wrap=True)

    def log(message: Any) -> None:
        if first:
            console.print(message, markup=False)

    result = train(
        settings,
        log=log,
        progress_bar=cli.progress_bar if first else cli.no_progress_bar,
        agree=lifeline.agree,
        accept_changes=accept_changes,
    )
    if result.interrupted:
        sys.exit(EXIT_CODE)
    if not result.complete:
        return
    if settings.eval_generations:
        _answer(result)
    log(f"export the model: python -m llava_cot_jax.convert {shlex.quote(settings.output)} FOLDER")


def read_arguments(argv: list[str] | None = None) -> tuple[TrainSettings, jsonargparse.Namespace]:
    """Return the settings of the run, and the options of this start alone: ``hosts`` and ``accept_changes``.

    Raises:
        UserError: An argument, or a key of a configuration file, is unknown or not of its type.
    """
    arguments = sys.argv[1:] if argv is None else argv
    parser = _parser()
    options = parser.instantiate(parser.parse_args(list(arguments)))
    settings = TrainSettings(**{field.name: options[field.name] for field in fields(TrainSettings)})
    return _relocate_moved_run(settings, arguments), options


def _relocate_moved_run(settings: TrainSettings, arguments: Sequence[str]) -> TrainSettings:
    """Return ``settings`` with their present paths, if they come from the configuration file of a run that was moved.

    Args:
        settings: Settings that the arguments give.
        arguments: Arguments of the command.
    """
    if any(argument.split("=")[0] == "--output" for argument in arguments):
        return settings
    for configuration in reversed(cli.configurations_in(arguments)):
        folder = configuration.resolve().parent
        if configuration.resolve().name == CONFIGURATION and is_run(folder):
            stored = asdict(settings) | yaml.safe_load(configuration.read_text(encoding="utf-8"))
            if settings.output != stored["output"]:
                break  # another file names another folder
            now = relocated(stored, folder)
            moved = {name: now[name] for name in MOVABLE if getattr(settings, name) == stored[name]}
            return replace(settings, output=str(folder), **moved)
    return settings


def _parser() -> cli.Parser:
    parser = cli.Parser("train", RENAMED_SETTINGS)
    parser.add_class_arguments(TrainSettings)
    add = parser.add_argument
    add(
        "--accept_changes",
        type=bool,
        default=False,
        help="Resume from a checkpoint even if settings or data have changed since.",
    )
    add_hosts_options(parser)
    return parser


def _check_files(settings: TrainSettings) -> None:
    """Check that the data and the checkpoint exist, before anything slow is imported or downloaded.

    Raises:
        UserError: A folder, a file in it, or a split of the data is missing.
    """
    from llava_cot_jax.processing.processor import check_tokenizer

    check_folder_writable(as_path(settings.output))
    open_training_rows(settings.data, settings.verifier)
    if count := max(settings.eval_examples, settings.eval_generations):
        open_validation_rows(settings.data, settings.validation_data, count, settings.verifier)
    if not kept_model_files(settings) and (folder := named_folder(settings.checkpoint)):
        check_tokenizer(folder if settings.random_init else resolve_checkpoint(folder))


def _answer(result: TrainResult) -> None:
    """Answer validation questions, print a few, and count how many captions and conclusions match the rows' own."""
    from llava_cot_jax.evaluation.held_out import answer_held_out, find_answerable
    from llava_cot_jax.evaluation.statistics import accuracy
    from llava_cot_jax.inference.generator import Generator
    from llava_cot_jax.model.mllama import Mllama
    from llava_cot_jax.training.export import merged_arrays

    run = result.run
    settings, initial_model = run.settings, run.initial_model
    arrays = merged_arrays(result.state, settings.lora, settings.dtype)
    model = Mllama.from_arrays(initial_model.config, arrays, layout="stacked", mesh=run.mesh)
    model.to_layout("unrolled")
    rows = open_validation_rows(settings.data, settings.validation_data, settings.eval_generations, settings.verifier)
    indices = find_answerable(initial_model.processor, rows, settings.eval_generations)
    if not indices:
        run.log("no question of the validation rows can be put to the model")
        return
    answers = []
    generator, max_length = Generator(model), settings.chat.max_length
    with run.progress_bar("answering", "questions") as on_progress:
        for answer in answer_held_out(generator, initial_model.processor, rows, indices, max_length):
            answers.append(answer)
            on_progress(len(answers), len(indices))
    for answer in answers[:PRINTED_ANSWERS]:
        run.log(f"\n{answer.question}\n{answer.answer}\n(the row's own: {answer.expected.splitlines()[-1]})")
    for stage in ("CAPTION", "CONCLUSION"):
        share, error = accuracy([answer.agrees(stage) for answer in answers])
        run.log(f"{stage.lower()}s that are the row's own: {share:.1%} of {len(answers)} (standard error {error:.1%})")


if __name__ == "__main__":
    if computes_on_cpu():
        keep_freed_memory()  # before there are threads; a program that calls main keeps its memory as it likes
    cli.run(main, leave=os._exit, command="train")  # threads of a save that failed may wait for hours
