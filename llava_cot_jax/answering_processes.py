"""Processes of a command that answers questions: how they start together, and how they divide a job."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from llava_cot_jax import cli
from llava_cot_jax.answering_model import AnsweringModel
from llava_cot_jax.errors import UserError
from llava_cot_jax.hosts.joining import join_hosts, keep_to_own_devices
from llava_cot_jax.hosts.lifeline import Lifeline
from llava_cot_jax.hosts.options import add_hosts_options, group_in, hosts_option
from llava_cot_jax.hosts.process_group import ProcessGroup, find_group
from llava_cot_jax.hosts.question_queue import QuestionQueue, QuestionSource, QueuedQuestions
from llava_cot_jax.hosts.question_server import QuestionServer, RemoteQuestions
from llava_cot_jax.hosts.surroundings import surroundings

if TYPE_CHECKING:
    from llava_cot_jax.model.mllama import Mllama
    from llava_cot_jax.processing.processor import Processor


class AnswerableJob(Protocol):
    """Job of answering questions, which processes divide, as ``QuestionJob`` is one."""

    @property
    def unanswered(self) -> Sequence[int]:
        """Numbers of the questions that are still to be answered; empty in a process without the output."""

    def prepare(self, processor: Processor) -> None:
        """Check the search, before the weights are loaded."""

    def fields(self) -> dict[str, str]:
        """Return what must be the same in all processes, by name."""

    def share_unanswered(self) -> None:
        """Let every process know which questions are still to be answered."""

    def queue(self) -> QuestionQueue:
        """Return the queue of the questions still to be answered."""

    def shown(self) -> AbstractContextManager[None]:
        """Show how far the job is while the block is run."""

    def run(self, model: Mllama, source: QuestionSource) -> None:
        """Answer questions with a model until all are answered."""

    def finish(self) -> Any:
        """Complete the output."""


def add_process_options(parser: cli.Parser) -> None:
    """Add the options that name the processes of a run, and say what they divide."""
    add_hosts_options(parser)
    parser.add_argument(
        "--hosts.divide",
        choices=["questions", "model"],
        default="questions",
        help='Parts that several processes divide: the "questions" of a file, where each process has the whole model '
        'on its own devices, or the "model", which is one over the devices of all.',
    )


def run_in_group(
    command: str,
    parser: cli.Parser,
    arguments: Sequence[str],
    run: Callable[[Any, ProcessGroup, Lifeline | None], None],
) -> None:
    """Run a command in this process, which may be one of several. Only the first prints on standard output.

    Args:
        command: Name of the command.
        parser: Parser of its options, among them those of ``add_process_options``.
        arguments: Its arguments.
        run: Function that is called with the options, the processes, and the bond of those that share a model: None
            where each has its own.

    Raises:
        UserError: The arguments cannot be used, or ``run`` raises it.
    """
    report = partial(cli.report, command=command)
    try:
        options = parser.parse_args(arguments)
    except UserError:
        others = group_in(arguments) if hosts_option(arguments, "divide") == "model" else ProcessGroup()
        with Lifeline(others).shared_failures(report):
            raise
    group = find_group(options.hosts.coordinator, options.hosts.count, options.hosts.index)
    if group.count == 1 or options.hosts.divide == "questions":
        run(options, group, None)
        return
    lifeline = Lifeline(group)
    is_quiet = contextlib.redirect_stdout(io.StringIO()) if group.index else contextlib.nullcontext()
    with lifeline.shared_failures(report), is_quiet:
        run(options, group, lifeline)


def prepare_devices(
    group: ProcessGroup,
    lifeline: Lifeline | None,
    fields: Callable[[], Mapping[str, str]],
    model: AnsweringModel,
) -> None:
    """Let jax use the devices of this process, or, where processes share a model, those of all.

    Args:
        group: Processes of the run.
        lifeline: Bond of the processes that share a model.
        fields: Function that returns what must be the same in these, by name.
        model: Model of the run.

    Raises:
        UserError: The processes differ, or jax cannot start.
    """
    if lifeline:
        lifeline.meet()
        lifeline.agree(lambda: surroundings() | dict(fields()))
        join_hosts(group)
        lifeline.catch_aborts()
        if group.index:  # the first process warns of what all of them compute
            for folder in ("inference", "search"):
                logging.getLogger(f"llava_cot_jax.{folder}").setLevel(logging.ERROR)
    else:
        keep_to_own_devices(group)
    cli.enable_compilation_cache()
    if lifeline:
        lifeline.agree(model.fields)


def complete_job(
    job: AnswerableJob,
    model: AnsweringModel,
    group: ProcessGroup,
    lifeline: Lifeline | None,
    fields: Callable[[], Mapping[str, str]],
) -> None:
    """Complete the output of a job, and answer the questions that have no answer yet.

    Args:
        job: The questions and the answers.
        model: Model to answer with.
        group: Processes of the run.
        lifeline: Bond of the processes that share a model; None where each has its own.
        fields: Function that returns what must be the same in these, by name.

    Raises:
        UserError: The processes differ, the search cannot be used, or an answer cannot be stored.
    """
    if group.count == 1 and not job.unanswered:
        job.finish()
        return
    # This import takes longer than all checks so far.
    from llava_cot_jax.processing.processor import Processor

    processor = Processor.from_pretrained(model.folder, model.config)
    prepare_devices(group, lifeline, fields, model)
    job.prepare(processor)
    answer_job(job, model, group, is_divided=lifeline is None and group.count > 1)


def answer_job(job: AnswerableJob, model: AnsweringModel, group: ProcessGroup, *, is_divided: bool) -> None:
    """Answer the questions of a job.

    Args:
        job: The questions and the answers, prepared.
        model: Model to answer with. Its weights are loaded where this process has a question to answer.
        group: Processes of the run.
        is_divided: Whether each process has the whole model, and answers some of the questions.

    Raises:
        UserError: The processes differ, or an answer cannot be stored.
    """
    mesh = model.mesh()
    is_first = group.index == 0

    def answer(source: QuestionSource) -> None:
        loaded = model.load(mesh, is_first)
        with job.shown() if is_first else contextlib.nullcontext():
            cli.run_interruptible(lambda: job.run(loaded, source))

    def fields() -> dict[str, str]:
        return surroundings() | model.fields() | job.fields() | {"the mesh": str(mesh and dict(mesh.shape))}

    if not is_divided:
        job.share_unanswered()
        queue = job.queue()
        if not queue.is_over:
            answer(QueuedQuestions(queue))
        job.finish()
    elif is_first:
        queue = job.queue()
        server = QuestionServer(group, queue, fields())
        if not queue.is_over:
            answer(QueuedQuestions(queue))
        try:
            job.finish()
        finally:
            server.close()
    else:
        source = RemoteQuestions(group, fields())
        if not source.is_over:
            answer(source)
        source.close()
