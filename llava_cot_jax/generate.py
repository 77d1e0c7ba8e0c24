"""Answer questions about images with a Llama-3.2-Vision checkpoint.

llava-cot generate --checkpoint DIR_OR_HUB_ID --image FILE --question TEXT
llava-cot generate --checkpoint DIR_OR_HUB_ID --questions FILE.jsonl --output FILE.jsonl

Without ``--search`` the text streams as it is generated. With it, one compiled program searches for the answer. Without
``--checkpoint`` the small model of the package answers, and without ``--question`` it is asked about pictures that this
command draws.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, get_args

import jsonargparse
from rich.console import Console

from llava_cot_jax import cli
from llava_cot_jax.errors import UserError
from llava_cot_jax.files import check_file_writable, write_text
from llava_cot_jax.inference.settings import DEFAULT_MAX_NEW_TOKENS, Sampling
from llava_cot_jax.model.checkpoint.adapter_settings import read_adapter_settings
from llava_cot_jax.model.checkpoint.folder import read_config, read_max_new_tokens, resolve_checkpoint
from llava_cot_jax.model.choices import MESH_AXES, Dtype
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.paths import BUNDLED_MODEL, as_path, writing_errors
from llava_cot_jax.question_job import QuestionFileJob, add_question_file_options, check_question_file_options
from llava_cot_jax.questions import UserQuestion, draw_pictures, read_messages, read_questions
from llava_cot_jax.search.options import STRATEGIES, add_arguments, strategy_or_sampling
from llava_cot_jax.search.prompts import JudgePrompts
from llava_cot_jax.search.request_options import add_request_options
from llava_cot_jax.search.retracing import Threshold, reasoning_scores
from llava_cot_jax.search.strategies import Greedy, Sample, SearchSpec, Strategy
from llava_cot_jax.stage_format import StageFormat
from llava_cot_jax.stages import find_conclusion, find_stages

if TYPE_CHECKING:
    import numpy as np
    from jax.sharding import Mesh

    from llava_cot_jax.model.mllama import Mllama
    from llava_cot_jax.processing.processor import Processor
    from llava_cot_jax.search.answers import Answer
    from llava_cot_jax.search.request_builder import Requests
    from llava_cot_jax.search.trace import Trace

_LOG = logging.getLogger("llava_cot_jax.generate")  # where the command is run, __name__ is "__main__"

MORE_TOKENS = "give a higher --max_new_tokens for the rest, if the model's context holds it"
"""Remedy for an answer that was cut off."""

CUT_AT = {
    "max_new_tokens": ("the limit of new tokens", MORE_TOKENS),
    "max_sentences": ("the limit of sentences", "give a higher --max_sentences for the rest"),
    "context": ("what the prompt leaves of the model's context", "shorten the question for the rest"),
}
"""Where an answer is cut off, by what bounds its length, and the remedy."""

DEFAULT_MODEL_NOTE = (
    "No --checkpoint was given: the small model of the package answers. It knows pictures of coloured "
    "shapes on a grid, such as it draws itself, and nothing else."
)


def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Raises:
        UserError: An argument, a file or a checkpoint that cannot be used, before anything expensive starts.
    """
    options = _parser().parse_args(argv)
    method, format = _search_or_sampling(options), StageFormat.load(options.format)
    if uses_default_model := options.checkpoint is None:
        options.checkpoint = BUNDLED_MODEL
    if options.adapter is not None:
        read_adapter_settings(options.adapter)  # refuses before the weights are fetched
    folder = resolve_checkpoint(options.checkpoint)
    config = read_config(folder, options.convention)
    stated_length = read_max_new_tokens(folder)
    questions = [] if options.questions else _questions(options)
    _check_files(options)
    job = None
    if options.questions:
        job = QuestionFileJob(options, _strategy(method, options, format), config, stated_length)
        if not job.rows:
            print(f"{options.output} has the answers to all questions of {options.questions}", file=sys.stderr)
            return

    # These imports take longer than all checks so far.
    from llava_cot_jax.processing.processor import Processor

    processor = Processor.from_pretrained(folder, config)

    import jax

    from llava_cot_jax.model.mllama import Mllama

    cli.enable_compilation_cache()
    compilations = cli.CompilationCounter()
    mesh = _mesh(options.mesh, config)
    if job:
        job.prepare(processor)
    else:
        if isinstance(method, Sampling):
            answerer: _StreamingAnswerer | _SearchAnswerer
            answerer = _StreamingAnswerer(processor, method, options, format, stated_length)
        else:
            answerer = _SearchAnswerer(processor, method, options, stated_length)
        prepared = [answerer.prepare(question) for question in questions]
    if uses_default_model:
        Console(stderr=True).print(DEFAULT_MODEL_NOTE, style="bold yellow")

    start = time.perf_counter()
    with cli.progress_bar("loading weights") as on_progress:
        model = Mllama.from_pretrained(
            folder,
            config=config,
            dtype=options.dtype,
            mesh=mesh,
            adapter=options.adapter,
            on_progress=on_progress,
        )
        if options.quantize:
            model.quantize()
    loading_seconds = time.perf_counter() - start

    if job:
        cli.run_interruptible(lambda: job.run(model, _result_of))
        return
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
        for note in result.notes(format):
            _LOG.warning(f"{question.header}: {note}" if len(questions) > 1 else note)
    if isinstance(answerer, _SearchAnswerer) and options.threshold_to:
        answerer.write_threshold()
    for name in ("trace", "page"):
        if options[name]:
            print(f"wrote the {name} of the search to {options[name]}", file=sys.stderr)


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
    if options.search is None:
        for name in ("trace", "page", "show_search"):
            if options[name]:
                raise UserError(f"--{name} needs a search: give --search too ({', '.join(STRATEGIES)})")
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


@dataclass
class QuestionResult:
    """The answer to a question.

    Attributes:
        text: The whole answer.
        conclusion: Body of its last stage, or the whole text of an answer without stages.
        stages: Body of each stage in the answer, by name.
        ended: Why the answer, or the last stage or sentence of a search, ended: "eos", "tag", "turn" where the format
            has it end with the model's turn, or "max_new_tokens" or "sentence" where it was cut off.
        tokens: Numbers of tokens, by what they are for: "prompt" and "new", or the parts of a search.
        seconds: Seconds by what they were spent on: "first_token" and "total", counted from the question on, or the
            parts of a search.
        forced_stages: Stages that the search closed itself, and why each ended: "eos" or "max_new_tokens".
        bounded_by: What bounds the length of the answer: "max_new_tokens"; "context" where no length was given and the
            prompt leaves less than the default of the model's context; or "max_sentences" where there are as many
            sentences as there may be.
    """

    text: str
    conclusion: str
    stages: dict[str, str]
    ended: str
    tokens: dict[str, int]
    seconds: dict[str, float]
    forced_stages: dict[str, str] = field(default_factory=dict)
    bounded_by: str = "max_new_tokens"

    def notes(self, format: StageFormat) -> list[str]:
        """Lines about an end that the reader of the answer should know of: a limit, or tags that a search added."""
        cut = [stage for stage, ended in self.forced_stages.items() if ended == "max_new_tokens"]
        left = [stage for stage in self.forced_stages if stage not in cut]
        notes, (place, remedy) = [], CUT_AT[self.bounded_by]
        if cut:
            notes.append(f"{', '.join(cut)} cut at {place}, and closed by the search: {remedy}")
        elif self.ended in ("max_new_tokens", "sentence") and not self.forced_stages:
            notes.append(f"the answer was cut at {place}: {remedy}")
        if left:
            missing = sorted({"a closing tag" if format[stage].closing else "the next heading" for stage in left})
            notes.append(f"{', '.join(left)} ended without {' or '.join(missing)}, which the search added")
        return notes


def _result_of(answer: Answer, is_shrunk: bool) -> QuestionResult:
    """Return the answer of a search.

    Args:
        answer: The answer.
        is_shrunk: Whether the context left less than the default length.
    """
    trace, last = answer.trace, answer.trace.stages[-1]
    return QuestionResult(
        answer.text,
        answer.conclusion,
        answer.stages,
        last.candidates[last.winner].ended,
        trace.tokens,
        trace.seconds,
        trace.forced_stages,
        "context" if is_shrunk else "max_new_tokens",
    )


def _has_all_sentences(trace: Trace, spec: SearchSpec) -> bool:
    """Return whether an answer has as many sentences as it may have, and fewer tokens than it may have."""
    written = sum(stage.candidates[stage.winner].tokens for stage in trace.stages)
    return len(trace.stages) == spec.max_sentences and written < spec.max_new_tokens[0]


class _SearchAnswerer:
    """Answers questions by a search."""

    def __init__(
        self, processor: Processor, strategy: Strategy, options: jsonargparse.Namespace, stated_length: int | None
    ) -> None:
        from llava_cot_jax.search.request_builder import RequestBuilder

        self._builder = RequestBuilder(processor, strategy, options.judge_prompts, stated_length)
        self._options = options
        self._searches: list[tuple[UserQuestion, Trace]] = []

    def prepare(self, question: UserQuestion) -> Callable[[Mllama], QuestionResult]:
        """Return a function that answers the question with a model.

        Raises:
            UserError: The question or its image cannot be used.
        """
        requests = self._builder.build([question.sources], [question.asked], self._options.seed)
        return functools.partial(self._answer, question, requests)

    def _answer(self, question: UserQuestion, requests: Requests, model: Mllama) -> QuestionResult:
        from llava_cot_jax.search.reasoner import run_search

        options = self._options
        with contextlib.nullcontext() if options.json else cli.status("searching"):
            (answer,) = cli.run_interruptible(lambda: run_search(model, self._builder, requests))
        trace = answer.trace
        self._searches.append((question, trace))
        if options.show_search and not options.json:
            from llava_cot_jax.search.show import describe_search

            Console(highlight=False).print(describe_search(trace, question.right_answer))
        elif not options.json:
            print(answer.text if options.show_reasoning else answer.conclusion, flush=True)
        self._write_files(model)
        result = _result_of(answer, requests.is_shrunk)
        return replace(result, bounded_by="max_sentences") if _has_all_sentences(trace, requests.spec) else result

    def write_threshold(self) -> None:
        """Write the threshold that the scores of all searches give, and print it.

        Raises:
            UserError: The file cannot be written.
        """
        scores = [score for _, trace in self._searches for score in reasoning_scores(trace)]
        found, path = Threshold.of(scores), self._options.threshold_to
        found.write(path)
        print(
            f"wrote the threshold {found.threshold:.4f} to {path}: the mean of {found.count} reasonings' scores is "
            f"{found.mean:.4f}, their standard deviation {found.std:.4f}",
            file=sys.stderr,
        )

    def _write_files(self, model: Mllama) -> None:
        """Write all searches so far to the files that the user asked for."""
        options = self._options
        if options.trace:
            traces = [trace.to_dict() for _, trace in self._searches]
            path = as_path(options.trace)
            with writing_errors(path):
                write_text(path, json.dumps(traces, indent=1, ensure_ascii=False, allow_nan=False))
        if options.page:
            import jax

            from llava_cot_jax.search.page import PageEntry, write_page

            facts = {
                "checkpoint": options.checkpoint,
                **({"adapter": options.adapter} if options.adapter else {}),
                "convention": model.config.convention,
                "weights": f"{model.dtype}{', text in int8' if model.is_quantized else ''}",
                "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
                "date": datetime.date.today(),
                **{name: version(name) for name in ("llava_cot_jax", "jax")},
            }
            entries = [PageEntry(trace, q.sources, q.right_answer) for q, trace in self._searches]
            write_page(as_path(options.page), entries, facts)


class _StreamingAnswerer:
    """Answers questions without a search, and shows tokens as they come."""

    def __init__(
        self,
        processor: Processor,
        sampling: Sampling,
        options: jsonargparse.Namespace,
        format: StageFormat,
        stated_length: int | None,
    ) -> None:
        self._processor, self._sampling, self._options, self._format = processor, sampling, options, format
        self._default_length = stated_length or DEFAULT_MAX_NEW_TOKENS

    def prepare(self, question: UserQuestion) -> Callable[[Mllama], QuestionResult]:
        """Return a function that answers the question with a model.

        Raises:
            UserError: The question or its image cannot be used.
        """
        from llava_cot_jax.inference.generator import check_request
        from llava_cot_jax.processing.conversation import read_conversation

        processor, asked = self._processor, read_conversation(question.asked, question.sources)
        inputs = processor([processor.prompt(asked.asked(*self._format.around_question))], [asked.images])
        options, prompt = self._options, inputs["input_ids"].shape[1]
        length = check_request(processor.config, prompt, options.max_new_tokens, options.seed, self._default_length)
        return functools.partial(self._answer, inputs, length)

    def _answer(self, inputs: dict[str, np.ndarray], length: int, model: Mllama) -> QuestionResult:
        from llava_cot_jax.inference.generator import Generator
        from llava_cot_jax.inference.screen import Screen

        options = self._options
        start, first_token_seconds = time.perf_counter(), 0.0
        generator = Generator(model, self._sampling, self._processor)
        stream = generator.stream_completions(inputs, max_new_tokens=length, seeds=options.seed)
        with contextlib.nullcontext() if options.json else Screen(options.show_reasoning, self._format) as screen:
            for (completion,) in stream:
                first_token_seconds = first_token_seconds or time.perf_counter() - start
                if screen:
                    screen.show(completion.text)
            if screen:
                screen.finish(completion.text)
        text = completion.text
        counts = {"prompt": int(inputs["attention_mask"].sum()), "new": len(completion.tokens)}
        seconds = {"first_token": first_token_seconds, "total": time.perf_counter() - start}
        is_shrunk = options.max_new_tokens is None and length < self._default_length
        return QuestionResult(
            text,
            find_conclusion(text, self._format),
            find_stages(text, self._format),
            completion.ended,
            counts,
            seconds,
            bounded_by="context" if is_shrunk else "max_new_tokens",
        )


if __name__ == "__main__":
    cli.run(main, leave=os._exit, command="generate")
