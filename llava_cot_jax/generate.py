"""Answer questions about images with a Llama-3.2-Vision checkpoint.

llava-cot generate --checkpoint DIR_OR_HUB_ID --image FILE --question TEXT
llava-cot generate --checkpoint DIR_OR_HUB_ID --questions FILE.jsonl --output FILE.jsonl

Without ``--search`` the text streams as it is generated. With it, one compiled program searches for the answer. Without
``--checkpoint`` the small model of the package answers, and without ``--question`` it is asked about pictures that this
command draws.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import jsonargparse
from rich.console import Console

from llava_cot_jax import cli
from llava_cot_jax.answerers import SearchAnswerer, StreamingAnswerer
from llava_cot_jax.errors import UserError
from llava_cot_jax.files import check_file_writable
from llava_cot_jax.hosts.joining import join_hosts, keep_to_own_devices
from llava_cot_jax.hosts.lifeline import Lifeline
from llava_cot_jax.hosts.options import add_hosts_options, group_in, hosts_option
from llava_cot_jax.hosts.process_group import ALONE, ProcessGroup, find_group
from llava_cot_jax.hosts.question_queue import QuestionSource, QueuedQuestions
from llava_cot_jax.hosts.question_server import QuestionServer, RemoteQuestions
from llava_cot_jax.hosts.surroundings import device_fields, surroundings
from llava_cot_jax.inference.settings import Sampling
from llava_cot_jax.model.checkpoint.adapter_settings import read_adapter_settings
from llava_cot_jax.model.checkpoint.folder import read_config, read_max_new_tokens, resolve_checkpoint
from llava_cot_jax.model.choices import MESH_AXES, Dtype
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.paths import BUNDLED_MODEL, as_path
from llava_cot_jax.question_job import QuestionFileJob, add_question_file_options, check_question_file_options
from llava_cot_jax.questions import UserQuestion, draw_pictures, read_messages, read_questions
from llava_cot_jax.search.options import STRATEGIES, add_arguments, strategy_or_sampling
from llava_cot_jax.search.prompts import JudgePrompts
from llava_cot_jax.search.request_options import add_request_options
from llava_cot_jax.search.strategies import Greedy, Sample, Strategy
from llava_cot_jax.stage_format import StageFormat

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from llava_cot_jax.model.mllama import Mllama
    from llava_cot_jax.processing.processor import Processor

_LOG = logging.getLogger("llava_cot_jax.generate")  # where the command is run, __name__ is "__main__"

DEFAULT_MODEL_NOTE = (
    "No --checkpoint was given: the small model of the package answers. It knows pictures of coloured "
    "shapes on a grid, such as it draws itself, and nothing else."
)


def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Raises:
        UserError: An argument, a file or a checkpoint that cannot be used, before anything expensive starts.
    """
    arguments = sys.argv[1:] if argv is None else argv
    report = partial(cli.report, command="generate")
    try:
        options = _parser().parse_args(arguments)
    except UserError:
        others = group_in(arguments) if hosts_option(arguments, "divide") == "model" else ProcessGroup()
        with Lifeline(others).shared_failures(report):
            raise
    group = find_group(options.hosts.coordinator, options.hosts.count, options.hosts.index)
    if group.count == 1 or options.hosts.divide == "questions":
        _generate(options, group)
        return
    lifeline = Lifeline(group)
    is_quiet = contextlib.redirect_stdout(io.StringIO()) if group.index else contextlib.nullcontext()
    with lifeline.shared_failures(report), is_quiet:
        _generate(options, group, lifeline)


def _generate(options: jsonargparse.Namespace, group: ProcessGroup, lifeline: Lifeline | None = None) -> None:
    """Answer the questions.

    Args:
        options: Options of the command.
        group: Processes of the run.
        lifeline: Bond of the processes that have one model over all their devices; None where each has its own.
    """
    checked = _check(options, group)
    if checked is None:
        return

    # This import takes longer than all checks so far.
    from llava_cot_jax.processing.processor import Processor

    processor = Processor.from_pretrained(checked.folder, checked.config)
    if lifeline:
        lifeline.meet()
        lifeline.agree(lambda: surroundings() | checked.fields())
        join_hosts(group)
        lifeline.catch_aborts()
        if group.index:  # the first process warns of what all of them compute
            for folder in ("inference", "search"):
                logging.getLogger(f"llava_cot_jax.{folder}").setLevel(logging.ERROR)
    else:
        keep_to_own_devices(group)
    cli.enable_compilation_cache()
    if lifeline:
        lifeline.agree(checked.model_fields)
    if checked.job:
        checked.job.prepare(processor)
        _answer_file(checked, checked.job, group, is_divided=lifeline is None and group.count > 1)
    else:
        _answer_questions(checked, processor, is_first=group.index == 0)


@dataclass(frozen=True)
class _Checked:
    """Arguments that can be used, as far as that is known without the model's processor."""

    options: jsonargparse.Namespace
    method: Strategy | Sampling
    format: StageFormat
    folder: Path
    config: MllamaConfig
    stated_length: int | None
    questions: list[UserQuestion]
    job: QuestionFileJob | None
    uses_default_model: bool

    def fields(self) -> dict[str, str]:
        """Return what must be the same in processes that share a model, by name."""
        shown = ("json", "show_search", "show_reasoning", "trace", "page", "threshold_to", "draw_to", "output")
        own = ("hosts", "checkpoint", "adapter", "config", "questions", *shown)
        given = {name: str(value) for name, value in vars(self.options).items() if name not in own}
        return given | (self.job.fields() if self.job else {})

    def model_fields(self) -> dict[str, str]:
        """Return the files of the model and the devices of this process, by name."""
        from llava_cot_jax.model.checkpoint.fingerprint import adapter_fields, checkpoint_fields

        adapter = {} if self.options.adapter is None else adapter_fields(self.options.adapter)
        return device_fields() | checkpoint_fields(self.folder, self.config) | adapter


def _check(options: jsonargparse.Namespace, group: ProcessGroup) -> _Checked | None:
    """Check the arguments and the files before anything slow is imported. Return None where nothing is left to do.

    Raises:
        UserError: One of them cannot be used.
    """
    method, format = _search_or_sampling(options), StageFormat.load(options.format)
    if uses_default_model := options.checkpoint is None:
        options.checkpoint = BUNDLED_MODEL
    if options.adapter is not None:
        read_adapter_settings(options.adapter)  # refuses before the weights are fetched
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
    folder = resolve_checkpoint(options.checkpoint)
    config = read_config(folder, options.convention)
    stated_length = read_max_new_tokens(folder)
    questions = [] if options.questions else _questions(options)
    _check_files(options)
    job = None
    if options.questions:
        strategy = _strategy(method, options, format)
        job = QuestionFileJob(options, strategy, config, stated_length, writes=group.index == 0)
        if not job.unanswered and group.count == 1:
            job.finish()
            print(f"{options.output} has the answers to all questions of {options.questions}", file=sys.stderr)
            return None
    return _Checked(options, method, format, folder, config, stated_length, questions, job, uses_default_model)


def _answer_file(checked: _Checked, job: QuestionFileJob, group: ProcessGroup, is_divided: bool) -> None:
    """Answer a file of questions.

    Args:
        checked: The arguments.
        job: The questions and the answers, prepared.
        group: Processes of the run.
        is_divided: Whether each process has the whole model, and answers some of the questions.
    """
    mesh = _mesh(checked.options.mesh, checked.config)

    def answer(source: QuestionSource) -> None:
        model = _load(checked, mesh, is_first=group.index == 0)
        with job.shown() if group.index == 0 else contextlib.nullcontext():
            cli.run_interruptible(lambda: job.run(model, source))

    def fields() -> dict[str, str]:
        return surroundings() | checked.model_fields() | job.fields() | {"the mesh": str(mesh and dict(mesh.shape))}

    if not is_divided:
        job.share_unanswered()
        queue = job.queue()
        if not queue.is_over:
            answer(QueuedQuestions(queue))
        job.finish()
    elif group.index == 0:
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
    mesh = _mesh(options.mesh, checked.config)
    if isinstance(method, Sampling):
        answerer: StreamingAnswerer | SearchAnswerer
        answerer = StreamingAnswerer(processor, method, options, format, checked.stated_length)
    else:
        answerer = SearchAnswerer(processor, method, options, checked.stated_length)
    prepared = [answerer.prepare(question) for question in questions]
    start = time.perf_counter()
    model = _load(checked, mesh, is_first)
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


def _load(checked: _Checked, mesh: Mesh | None, is_first: bool) -> Mllama:
    """Load the model."""
    from llava_cot_jax.model.mllama import Mllama

    options = checked.options
    if checked.uses_default_model and is_first:
        Console(stderr=True).print(DEFAULT_MODEL_NOTE, style="bold yellow")
    progress_bar = cli.progress_bar if is_first else cli.no_progress_bar
    with progress_bar("loading weights") as on_progress:
        model = Mllama.from_pretrained(
            checked.folder,
            config=checked.config,
            dtype=options.dtype,
            mesh=mesh,
            adapter=options.adapter,
            on_progress=on_progress,
        )
        if options.quantize:
            model.quantize()
    return model


def _parser() -> cli.Parser:
    parser = cli.Parser("generate")
    add = parser.add_argument
    add(
        "--checkpoint",
        type=str,
        help='Checkpoint to answer with: a folder in Hugging Face form, an id on the hub, or "shapes" (the default), '
        "the small model of the package.",
    )
    add("--dtype", choices=get_args(Dtype), help="Dtype of the weights. By default, the checkpoint's own.")
    add(
        "--quantize",
        choices=["int8"],
        help="Keep the text layers' weights in int8, which takes half the memory of bfloat16.",
    )
    for axis in MESH_AXES:
        add(
            f"--mesh.{axis}",
            type=int | None,
            default=None,
            help=f'Number of devices on the mesh axis "{axis}", by default 1; without any of these options, all '
            "devices are used.",
        )
    add_arguments(parser)
    add_request_options(parser)
    add_question_file_options(parser)
    add_hosts_options(parser)
    add(
        "--hosts.divide",
        choices=["questions", "model"],
        default="questions",
        help='Parts that several processes divide: the "questions" of a file, where each process has the whole model '
        'on its own devices, or the "model", which is one over the devices of all.',
    )
    return parser


def _search_or_sampling(options: jsonargparse.Namespace) -> Strategy | Sampling:
    """Return the search, or, without one, how tokens are sampled.

    Raises:
        UserError: An option out of range, or one that has no meaning with the others.
    """
    method = strategy_or_sampling(options)
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


def _strategy(method: Strategy | Sampling, options: jsonargparse.Namespace, format: StageFormat) -> Strategy:
    """Return the search, or, without one, the strategy that samples as is asked for."""
    if not isinstance(method, Sampling):
        return method
    length = options.max_new_tokens
    if method.temperature == 0:
        return Greedy(length, format=format)
    return Sample(method.temperature, length, method.top_k, method.top_p, format=format)


def _check_files(options: jsonargparse.Namespace) -> None:
    """Check the files to read, the files to write, and the sizes of the mesh, before anything slow is imported.

    Raises:
        UserError: One of them cannot be used.
    """
    if options.search:
        JudgePrompts.load(options.judge_prompts)
    for axis, size in vars(options.mesh).items():
        if size is not None and size < 1:
            raise UserError(f"mesh.{axis} is {size}; it must be at least 1")
    for name in ("trace", "page", "threshold_to"):
        if options[name] is not None:
            check_file_writable(as_path(options[name]))


def _mesh(sizes: jsonargparse.Namespace, config: MllamaConfig) -> Mesh | None:
    from llava_cot_jax.model.sharding import check_mesh, default_mesh, make_mesh

    given = {axis: size for axis, size in vars(sizes).items() if size is not None}
    mesh = make_mesh(**given) if given else default_mesh(config)
    if mesh is not None:
        check_mesh(config, mesh)
    return mesh


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
