"""Answer questions about images with a Llama-3.2-Vision checkpoint.

llava-cot generate --checkpoint DIR_OR_HUB_ID --image FILE --question TEXT
llava-cot generate --checkpoint DIR_OR_HUB_ID --questions FILE.jsonl --output FILE.jsonl

Without ``--search`` the text streams as it is generated. With it, one compiled program searches for the answer. Without
``--checkpoint`` the small model of the package answers, and without ``--question`` it is asked about pictures that this
command draws.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import jsonargparse

from llava_cot_jax import cli
from llava_cot_jax.answerers import SearchAnswerer, StreamingAnswerer
from llava_cot_jax.answering_model import AnsweringModel, add_model_options, check_mesh_sizes
from llava_cot_jax.answering_processes import add_process_options, complete_job, prepare_devices, run_in_group
from llava_cot_jax.errors import UserError
from llava_cot_jax.files import check_file_writable
from llava_cot_jax.hosts.lifeline import Lifeline
from llava_cot_jax.hosts.process_group import ALONE, ProcessGroup
from llava_cot_jax.inference.settings import Sampling
from llava_cot_jax.paths import as_path
from llava_cot_jax.question_job import (
    QuestionJob,
    add_question_file_options,
    check_question_file_options,
    read_question_set,
)
from llava_cot_jax.questions import UserQuestion, draw_pictures, read_messages, read_questions
from llava_cot_jax.search.options import (
    STRATEGIES,
    add_arguments,
    check_verifier_adapter,
    strategy_of,
    strategy_or_sampling,
)
from llava_cot_jax.search.prompts import JudgePrompts
from llava_cot_jax.search.request_options import add_request_options
from llava_cot_jax.search.strategies import Strategy
from llava_cot_jax.stage_format import StageFormat

if TYPE_CHECKING:
    from llava_cot_jax.processing.processor import Processor

_LOG = logging.getLogger("llava_cot_jax.generate")  # where the command is run, __name__ is "__main__"


def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Raises:
        UserError: An argument, a file or a checkpoint that cannot be used, before anything expensive starts.
    """
    run_in_group("generate", _parser(), sys.argv[1:] if argv is None else argv, _generate)


def _generate(options: jsonargparse.Namespace, group: ProcessGroup, lifeline: Lifeline | None) -> None:
    """Answer the questions.

    Args:
        options: Options of the command.
        group: Processes of the run.
        lifeline: Bond of the processes that have one model over all their devices; None where each has its own.
    """
    checked = _check(options, group)
    if checked is None:
        return

    if checked.job:
        complete_job(checked.job, checked.model, group, lifeline, checked.fields)
        checked.job.check_answered()
        return

    # This import takes longer than all checks so far.
    from llava_cot_jax.processing.processor import Processor

    processor = Processor.from_pretrained(checked.model.folder, checked.model.config)
    prepare_devices(group, lifeline, checked.fields, checked.model)
    _answer_questions(checked, processor, is_first=group.index == 0)


@dataclass(frozen=True)
class _Checked:
    """Arguments that can be used, as far as that is known without the model's processor."""

    options: jsonargparse.Namespace
    method: Strategy | Sampling
    format: StageFormat
    model: AnsweringModel
    questions: list[UserQuestion]
    job: QuestionJob | None

    def fields(self) -> dict[str, str]:
        """Return what must be the same in processes that share a model, by name."""
        shown = ("json", "show_search", "show_reasoning", "trace", "page", "threshold_to", "draw_to", "output")
        own = ("hosts", "checkpoint", "adapter", "verifier_adapter", "config", "questions", *shown)
        given = {name: str(value) for name, value in vars(self.options).items() if name not in own}
        return given | (self.job.fields() if self.job else {})


def _check(options: jsonargparse.Namespace, group: ProcessGroup) -> _Checked | None:
    """Check the arguments and the files before anything slow is imported. Return None where nothing is left to do.

    Raises:
        UserError: One of them cannot be used.
    """
    method, format = _search_or_sampling(options), StageFormat.load(options.format)
    is_divided = group.count > 1 and options.hosts.divide == "questions"
    if is_divided and not options.questions:
        raise UserError(
            f"there are {group.count} processes by {group.source}, which can divide a file of --questions, or one "
            f"model by --hosts.divide model; {ALONE}"
        )
    if group.count > 1 and options.live:
        raise UserError("--live shows the search of one process: leave it out, or give --hosts.count 1")
    if group.index:  # the first process shows and writes what all compute
        options.json, options.show_search = not options.questions, False
        options.trace = options.page = options.threshold_to = None
    model = AnsweringModel.find(options)
    questions = [] if options.questions else _questions(options)
    _check_files(options)
    job = None
    if options.questions:
        strategy = strategy_of(method, options.max_new_tokens, format)
        questions_of_file, output = read_question_set(as_path(options.questions)), as_path(options.output)
        job = QuestionJob(options, questions_of_file, output, strategy, model, writes=group.index == 0)
        if not job.unanswered and group.count == 1:
            job.finish()
            job.check_answered()
            print(f"{options.output} has the answers to all questions of {options.questions}", file=sys.stderr)
            return None
    return _Checked(options, method, format, model, questions, job)


def _answer_questions(checked: _Checked, processor: Processor, is_first: bool) -> None:
    """Answer questions one by one.

    Args:
        checked: The arguments.
        processor: Processor of the checkpoint.
        is_first: Whether this is the process that shows and writes what all compute.
    """
    import jax

    options, method, format, questions = checked.options, checked.method, checked.format, checked.questions
    compilations = cli.CompilationCounter()
    mesh = checked.model.mesh()
    if isinstance(method, Sampling):
        answerer: StreamingAnswerer | SearchAnswerer
        answerer = StreamingAnswerer(processor, method, options, format, checked.model.stated_length)
    else:
        answerer = SearchAnswerer(processor, method, options, checked.model.stated_length)
    prepared = [answerer.prepare(question) for question in questions]
    start = time.perf_counter()
    model = checked.model.load(mesh, is_first)
    loading_seconds = time.perf_counter() - start
    for question, answer in zip(questions, prepared, strict=True):
        compiled_before = compilations.count
        shows_plain_text = not options.json and not options.show_search
        if shows_plain_text and (len(questions) > 1 or question.right_answer):
            print(question.header, flush=True)
        result = answer(model)
        if options.json:
            result.seconds["load"] = loading_seconds
            asked = {name: getattr(question, name) for name in ("question", "images", "right_answer")}
            about = {**asked, "seed": options.seed, "compilations": compilations.count - compiled_before}
            report = {**about, **asdict(result), "device": jax.devices()[0].device_kind}
            print(json.dumps(report, allow_nan=False), flush=True)
        elif shows_plain_text and question.right_answer:
            print(f"(the right answer: {question.right_answer})", flush=True)
        for note in result.notes(format) if is_first else ():
            _LOG.warning(f"{question.header}: {note}" if len(questions) > 1 else note)
    if isinstance(answerer, SearchAnswerer) and options.threshold_to:
        answerer.write_threshold()
    for name in ("trace", "page"):
        if options[name]:
            print(f"wrote the {name} of the search to {options[name]}", file=sys.stderr)


def _parser() -> cli.Parser:
    parser = cli.Parser("generate")
    add_model_options(parser)
    add_arguments(parser)
    add_request_options(parser)
    add_question_file_options(parser)
    add_process_options(parser)
    return parser


def _search_or_sampling(options: jsonargparse.Namespace) -> Strategy | Sampling:
    """Return the search, or, without one, how tokens are sampled.

    Raises:
        UserError: An option out of range, or one that has no meaning with the others.
    """
    method = strategy_or_sampling(options)
    check_verifier_adapter(options, [method])
    if options.questions is not None:
        check_question_file_options(options)
    elif options.output is not None:
        raise UserError("--output takes the answers to a file of questions: give --questions too")
    if isinstance(method, Sampling):
        for name in ("trace", "page", "show_search", "live"):
            if options[name]:
                raise UserError(f"--{name} needs a search: give --search too ({', '.join(STRATEGIES)})")
    elif options.live and not method.to_spec().can_stream:
        raise UserError(f"--live cannot show --search {options.search}: leave out --live, or give another --search")
    if options.threshold_to and options.search != "retracing":
        raise UserError("--threshold_to stores a threshold of --search retracing: give that too")
    return method


def _check_files(options: jsonargparse.Namespace) -> None:
    """Check the files to read, the files to write, and the sizes of the mesh, before anything slow is imported.

    Raises:
        UserError: One of them cannot be used.
    """
    if options.search:
        JudgePrompts.load(options.judge_prompts)
    check_mesh_sizes(options)
    for name in ("trace", "page", "threshold_to"):
        if options[name] is not None:
            check_file_writable(as_path(options[name]))


def _questions(options: jsonargparse.Namespace) -> list[UserQuestion]:
    """Return the user's questions, each with its images, or, without any, questions about pictures drawn here."""
    if options.messages:
        if options.question:
            raise UserError("--messages ends with the question: leave out --question")
        return [read_messages(options.messages, options.image or [])]
    if options.question:
        return read_questions(options.question, options.image or [])
    if options.image:
        raise UserError("give --question: what is to be answered about the image")
    return draw_pictures(options.draw_to, 1 if options.draw is None else options.draw, options.seed)


if __name__ == "__main__":
    cli.run(main, leave=os._exit, command="generate")
