"""Fine-tune Llama-3.2-Vision on staged answers: on every host of a slice alike, or on one machine.

python -m llava_cot_jax.train --config FILE.yaml [dotted overrides]
"""

from __future__ import annotations

import logging
import os
import shlex
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

import jsonargparse
import yaml
from rich.console import Console

from llava_cot_jax import cli
from llava_cot_jax.data.sources import open_rows
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.checkpoint.folder import named_folder, resolve_checkpoint
from llava_cot_jax.paths import as_path, check_folder_writable
from llava_cot_jax.training.layout import CONFIGURATION, is_run, relocated
from llava_cot_jax.training.settings import RENAMED_SETTINGS, TrainSettings

if TYPE_CHECKING:
    from llava_cot_jax.training.loop import Trained

SHOWN = 3
"""Answers that are printed whole."""


def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Raises:
        UserError: a setting, or a file that cannot be used: before anything expensive starts.
    """
    settings, told = read_arguments(argv)
    _check_hosts(told.hosts)
    _check_files(settings)

    import jax

    from llava_cot_jax.training.loop import train

    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs the traceback of each thread, then raises
    cli.enable_compilation_cache()
    _join_hosts(told.hosts)
    if settings.eval_generations and jax.process_count() > 1:
        raise UserError("answers is set, but only one process can answer yet: set it to 0, and use generate later")
    first = jax.process_index() == 0
    console = Console(highlight=False, soft_wrap=True)

    def log(what: Any) -> None:
        if first:
            console.print(what, markup=False)

    trained = train(
        settings,
        log=log,
        progress_bar=cli.progress_bar if first else cli.no_progress_bar,
        accept_changes=told.accept_changes,
    )
    if not trained.complete:
        return
    if settings.eval_generations:
        _answer(settings, trained, log)
    log(f"export the model: python -m llava_cot_jax.convert {shlex.quote(settings.output)} FOLDER")


def read_arguments(argv: list[str] | None = None) -> tuple[TrainSettings, jsonargparse.Namespace]:
    """The settings of the run; and what is said of this start of it alone: ``hosts`` and ``accept_changes``.

    Raises:
        UserError: an argument, or a key of a configuration file, that is not known or not of its type.
    """
    given = sys.argv[1:] if argv is None else argv
    parser = _parser()
    options = parser.instantiate(parser.parse_args(list(given)))
    settings = TrainSettings(**{field.name: options[field.name] for field in fields(TrainSettings)})
    return _where_the_run_lies(settings, given), options


def _where_the_run_lies(settings: TrainSettings, given: Sequence[str]) -> TrainSettings:
    """``settings``, with the paths as they are now where they come from the configuration file of a run that was moved.

    Args:
        settings: what the arguments come to.
        given: the arguments.
    """
    if any(argument.split("=")[0] == "--output" for argument in given):
        return settings
    for configuration in reversed(cli.configurations_in(given)):
        folder = configuration.resolve().parent
        if configuration.resolve().name == CONFIGURATION and is_run(folder):
            stored = asdict(settings) | yaml.safe_load(configuration.read_text(encoding="utf-8"))
            if settings.output != stored["output"]:
                break  # another file names another folder
            now = relocated(stored, folder)
            moved = {name: now[name] for name in ("data", "checkpoint") if getattr(settings, name) == stored[name]}
            return replace(settings, output=str(folder), **moved)
    return settings


def _parser() -> cli.Parser:
    parser = cli.Parser("train", RENAMED_SETTINGS)
    parser.add_class_arguments(TrainSettings)
    add = parser.add_argument
    add("--accept_changes", type=bool, default=False, help="go on from a checkpoint of other settings or other data")
    add("--hosts.coordinator", type=str | None, default=None, help="HOST:PORT of the first process; TPUs know it")
    add("--hosts.count", type=int | None, default=None, help="how many processes there are; TPUs know it")
    add("--hosts.index", type=int | None, default=None, help="which of them this is, from 0; TPUs know it")
    return parser


def _check_files(settings: TrainSettings) -> None:
    """Whether the data and the checkpoint are there, before anything slow is imported or fetched.

    Raises:
        UserError: a folder is missing, a file in it, or a split of the data.
    """
    from llava_cot_jax.processing.processor import check_tokenizer

    check_folder_writable(as_path(settings.output))
    for split in ("train", "validation") if settings.eval_examples else ("train",):
        open_rows(settings.data, split)
    if folder := named_folder(settings.checkpoint):
        check_tokenizer(folder if settings.random_init else resolve_checkpoint(folder))


def _check_hosts(hosts: jsonargparse.Namespace) -> None:
    """Whether all of the hosts' arguments are given, or none.

    Raises:
        UserError: some of them.
    """
    missing = [f"--hosts.{name}" for name, value in vars(hosts).items() if value is None]
    if 0 < len(missing) < len(vars(hosts)):
        raise UserError(f"give {' and '.join(missing)} too, or none of the hosts' arguments")


def _join_hosts(hosts: jsonargparse.Namespace) -> None:
    """Let the processes of the run find each other: by these arguments, by what a TPU says, or this one alone."""
    import jax

    if hosts.coordinator is not None:
        jax.distributed.initialize(hosts.coordinator, hosts.count, hosts.index)
        return
    try:
        if os.environ.get("JAX_PLATFORMS") != "cpu":
            jax.distributed.initialize()
            return
    except ValueError:  # no cluster knows this process
        pass
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    jax.distributed.initialize(f"localhost:{port}", 1, 0)


def _answer(settings: TrainSettings, trained: Trained, log: Any) -> None:
    """Answer held-out questions, show a few, and count how many captions and conclusions are the rows' own."""
    from llava_cot_jax.evaluation.held_out import accuracy, answer_held_out
    from llava_cot_jax.inference.generator import Generator
    from llava_cot_jax.model.mllama import Mllama
    from llava_cot_jax.training.export import merged_arrays

    origin = trained.origin
    arrays = merged_arrays(trained.state, settings.lora, settings.dtype)
    model = Mllama.from_arrays(origin.config, arrays, layout="stacked", mesh=trained.mesh)
    model.to_layout("unrolled")
    rows = open_rows(settings.data, "validation")
    indices = range(min(settings.eval_generations, len(rows)))
    found = []
    with cli.progress_bar("answering", "questions") as on_progress:
        for answered in answer_held_out(Generator(model), origin.processor, rows, indices, settings.chat.max_length):
            found.append(answered)
            on_progress(len(found), len(indices))
    for answered in found[:SHOWN]:
        log(f"\n{answered.question}\n{answered.answer}\n(the row's own: {answered.expected.splitlines()[-1]})")
    for stage in ("CAPTION", "CONCLUSION"):
        part, error = accuracy([answered.agrees(stage) for answered in found])
        log(f"{stage.lower()}s that are the row's own: {part:.1%} of {len(found)} (standard error {error:.1%})")


if __name__ == "__main__":
    cli.run(main)
