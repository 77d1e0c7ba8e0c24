"""Answer questions about images with a Llama-3.2-Vision checkpoint.

llava-cot generate --checkpoint DIR_OR_HUB_ID --image FILE --question TEXT

Without ``--search`` the text streams as it is generated. With it, one compiled program searches for the answer. Without
``--checkpoint`` the small model of the package answers, and without ``--question`` it is asked about pictures that this
command draws.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import jsonargparse
from rich.console import Console

from llava_cot_jax import cli
from llava_cot_jax.errors import UserError
from llava_cot_jax.files import check_file_writable, write_text
from llava_cot_jax.inference.settings import Sampling
from llava_cot_jax.model.checkpoint.folder import read_config, read_max_new_tokens, resolve_checkpoint
from llava_cot_jax.model.choices import MESH_AXES, Dtype
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.paths import BUNDLED_MODEL, as_path, writing_errors
from llava_cot_jax.processing.messages import user_turn
from llava_cot_jax.search.options import STRATEGIES, add_arguments, strategy_or_sampling
from llava_cot_jax.search.prompts import JudgePrompts
from llava_cot_jax.search.request_options import add_request_options
from llava_cot_jax.search.strategies import Strategy
from llava_cot_jax.stages import find_stages

if TYPE_CHECKING:
    import numpy as np
    from jax.sharding import Mesh

    from llava_cot_jax.model.mllama import Mllama
    from llava_cot_jax.processing.processor import Processor
    from llava_cot_jax.search.request_builder import Requests
    from llava_cot_jax.search.trace import Trace

DEFAULT_MAX_NEW_TOKENS = 2048
"""Longest answer without a search, in tokens, where neither the user nor the checkpoint sets it."""

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
    _search_or_sampling(options)
    if uses_default_model := options.checkpoint is None:
        options.checkpoint = BUNDLED_MODEL
    folder = resolve_checkpoint(options.checkpoint)
    config = read_config(folder, options.convention)
    _default_to_stated_length(options, folder)
    questions = _questions(options)
    _check_files(options)

    # These imports take longer than all checks so far.
    from llava_cot_jax.processing.processor import Processor

    processor = Processor.from_pretrained(folder, config)

    import jax

    from llava_cot_jax.model.mllama import Mllama

    cli.enable_compilation_cache()
    compilations = cli.CompilationCounter()
    mesh = _mesh(options.mesh, config)
    method = _search_or_sampling(options)
    if isinstance(method, Sampling):
        answerer: _StreamingAnswerer | _SearchAnswerer = _StreamingAnswerer(processor, method, options)
    else:
        answerer = _SearchAnswerer(processor, method, options)
    prepared = [answerer.prepare(question) for question in questions]
    if uses_default_model:
        Console(stderr=True).print(DEFAULT_MODEL_NOTE, style="bold yellow")

    start = time.perf_counter()
    with cli.progress_bar("loading weights") as on_progress:
        model = Mllama.from_pretrained(folder, config=config, dtype=options.dtype, mesh=mesh, on_progress=on_progress)
        if options.quantize:
            model.quantize()
    loading_seconds = time.perf_counter() - start

    for question, answer in zip(questions, prepared, strict=True):
        compiled_before = compilations.count
        shows_right_answer = question.right_answer and not options.json and not options.show_search
        if shows_right_answer:
            print(f"{question.question} ({question.image})", flush=True)
        result = answer(model)
        if options.json:
            result.seconds["load"] = loading_seconds
            about = {**asdict(question), "compilations": compilations.count - compiled_before}
            print(json.dumps({**about, **asdict(result), "device": jax.devices()[0].device_kind}), flush=True)
        elif shows_right_answer:
            print(f"(the right answer: {question.right_answer})", flush=True)
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
    return parser


def _search_or_sampling(options: jsonargparse.Namespace) -> Strategy | Sampling:
    """Return the search, or, without one, how tokens are sampled.

    Raises:
        UserError: An option out of range, or one that has no meaning with the others.
    """
    method = strategy_or_sampling(options)
    if options.search is None:
        for name in ("trace", "page", "show_search"):
            if options[name]:
                raise UserError(f"--{name} needs a search: give --search too ({', '.join(STRATEGIES)})")
    return method


def _default_to_stated_length(options: jsonargparse.Namespace, folder: Path) -> None:
    """Take the length of an answer, or of a stage, from the checkpoint where the user does not give it."""
    if options.max_new_tokens is None:
        options.max_new_tokens = read_max_new_tokens(folder)


def _check_files(options: jsonargparse.Namespace) -> None:
    """Check the files to read, the files to write, and the sizes of the mesh, before anything slow is imported.

    Raises:
        UserError: One of them cannot be used.
    """
    from llava_cot_jax.processing.images import check_image

    for image in options.image or []:
        check_image(image)
    if options.search:
        JudgePrompts.load(options.judge_prompts)
    for axis, size in vars(options.mesh).items():
        if size is not None and size < 1:
            raise UserError(f"mesh.{axis} is {size}; it must be at least 1")
    for name in ("trace", "page"):
        if options[name] is not None:
            check_file_writable(as_path(options[name]))


def _mesh(sizes: jsonargparse.Namespace, config: MllamaConfig) -> Mesh | None:
    from llava_cot_jax.model.sharding import check_mesh, default_mesh, make_mesh

    given = {axis: size for axis, size in vars(sizes).items() if size is not None}
    mesh = make_mesh(**given) if given else default_mesh(config)
    if mesh is not None:
        check_mesh(config, mesh)
    return mesh


@dataclass(frozen=True)
class UserQuestion:
    """A question to answer.

    Attributes:
        question: Text of the question.
        image: Path of the image that the question is about, if it is about one.
        right_answer: Right answer, which is known for drawn pictures.
    """

    question: str
    image: str | None
    right_answer: str | None = None


def _questions(options: jsonargparse.Namespace) -> list[UserQuestion]:
    """Return the user's questions, each with its image, or, without any, questions about pictures drawn here."""
    images: list[str] = options.image or []
    if not options.question:
        if images:
            raise UserError("give --question: what is to be answered about the image")
        from llava_cot_jax.data.shapes.drawn import draw_questions

        folder, count = options.draw_to, 1 if options.draw is None else options.draw
        drawn = draw_questions(as_path(folder), count, options.seed)
        return [UserQuestion(each.question, str(Path(folder) / each.image.name), each.answer) for each in drawn]
    if len(images) not in (0, 1, len(options.question)):
        raise UserError(f"{len(images)} images for {len(options.question)} questions: give none, one, or one for each")
    image_of: list[str | None] = [*images] or [None]
    return [UserQuestion(question, image_of[i % len(image_of)]) for i, question in enumerate(options.question)]


@dataclass
class QuestionResult:
    """The answer to a question.

    Attributes:
        text: The whole answer.
        stages: Body of each stage in the answer, by name.
        ended: Why the answer, or the last stage of a search, ended: "eos", "tag", or "max_new_tokens" where
            it was cut off.
        tokens: Numbers of tokens, by what they are for: "prompt" and "new", or the parts of a search.
        seconds: Seconds by what they were spent on: "first_token" and "total", counted from the question on, or the
            parts of a search.
    """

    text: str
    stages: dict[str, str]
    ended: str
    tokens: dict[str, int]
    seconds: dict[str, float]


class _SearchAnswerer:
    """Answers questions by a search."""

    def __init__(self, processor: Processor, strategy: Strategy, options: jsonargparse.Namespace) -> None:
        from llava_cot_jax.search.request_builder import RequestBuilder

        self._builder = RequestBuilder(processor, strategy, options.judge_prompts)
        self._options = options
        self._searches: list[tuple[UserQuestion, Trace]] = []

    def prepare(self, question: UserQuestion) -> Callable[[Mllama], QuestionResult]:
        """Return a function that answers the question with a model.

        Raises:
            UserError: The question or its image cannot be used.
        """
        requests = self._builder.build([question.image], [question.question], self._options.seed)
        return functools.partial(self._answer, question, requests)

    def _answer(self, question: UserQuestion, requests: Requests, model: Mllama) -> QuestionResult:
        from llava_cot_jax.search.reasoner import run_search

        options = self._options
        with contextlib.nullcontext() if options.json else cli.status("searching"):
            (answer,) = cli.run_interruptible(lambda: run_search(model, self._builder, requests))
        trace, last = answer.trace, answer.trace.stages[-1]
        self._searches.append((question, trace))
        if options.show_search and not options.json:
            from llava_cot_jax.search.show import describe_search

            Console(highlight=False).print(describe_search(trace, question.right_answer))
        elif not options.json:
            print(answer.text if options.show_reasoning else answer.conclusion, flush=True)
        self._write_files(model)
        return QuestionResult(
            answer.text, answer.stages, last.candidates[last.winner].ended, trace.tokens, trace.seconds
        )

    def _write_files(self, model: Mllama) -> None:
        """Write all searches so far to the files that the user asked for."""
        options = self._options
        if options.trace:
            traces = [asdict(trace) for _, trace in self._searches]
            path = as_path(options.trace)
            with writing_errors(path):
                write_text(path, json.dumps(traces, indent=1, ensure_ascii=False))
        if options.page:
            import jax

            from llava_cot_jax.search.page import PageEntry, write_page

            facts = {
                "checkpoint": options.checkpoint,
                "convention": model.config.convention,
                "weights": f"{model.dtype}{', text in int8' if model.is_quantized else ''}",
                "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
                "date": datetime.date.today(),
                **{name: version(name) for name in ("llava_cot_jax", "jax")},
            }
            entries = [PageEntry(trace, [q.image] if q.image else [], q.right_answer) for q, trace in self._searches]
            write_page(as_path(options.page), entries, facts)


class _StreamingAnswerer:
    """Answers questions without a search, and shows tokens as they come."""

    def __init__(self, processor: Processor, sampling: Sampling, options: jsonargparse.Namespace) -> None:
        self._processor, self._sampling, self._options = processor, sampling, options
        self._max_new_tokens = DEFAULT_MAX_NEW_TOKENS if options.max_new_tokens is None else options.max_new_tokens

    def prepare(self, question: UserQuestion) -> Callable[[Mllama], QuestionResult]:
        """Return a function that answers the question with a model.

        Raises:
            UserError: The question or its image cannot be used.
        """
        from llava_cot_jax.inference.generator import check_request

        processor, images = self._processor, [] if question.image is None else [question.image]
        inputs = processor([processor.prompt(user_turn(question.question, len(images)))], [images])
        check_request(processor.config, inputs["input_ids"].shape[1], self._max_new_tokens, self._options.seed)
        return functools.partial(self._answer, inputs)

    def _answer(self, inputs: dict[str, np.ndarray], model: Mllama) -> QuestionResult:
        from llava_cot_jax.inference.generator import Generator
        from llava_cot_jax.inference.screen import Screen

        options = self._options
        start, first_token_seconds, text = time.perf_counter(), 0.0, ""
        ids: list[int] = []
        stream = Generator(model, self._sampling).stream(
            inputs, max_new_tokens=self._max_new_tokens, seeds=options.seed
        )
        with contextlib.nullcontext() if options.json else Screen(options.show_reasoning) as screen:
            for tokens in stream:
                first_token_seconds = first_token_seconds or time.perf_counter() - start
                ids += tokens[0].tolist()
                text = self._processor.decode(ids)
                if screen:
                    screen.show(text.rstrip("\ufffd"))  # hide a character whose last bytes are still to come
            if screen:
                screen.finish(text)
        ended = "eos" if ids[-1] in model.config.text.eos_token_ids else "max_new_tokens"
        counts = {"prompt": int(inputs["attention_mask"].sum()), "new": len(ids)}
        seconds = {"first_token": first_token_seconds, "total": time.perf_counter() - start}
        return QuestionResult(text, find_stages(text), ended, counts, seconds)


if __name__ == "__main__":
    cli.run(main, leave=os._exit, command="generate")
