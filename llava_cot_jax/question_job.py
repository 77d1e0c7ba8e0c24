"""The part of ``generate`` that answers a file of questions into a file of answers, as a stream."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llava_cot_jax import cli
from llava_cot_jax.checks import check_int
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.paths import as_path, reading_errors
from llava_cot_jax.question_files import AnswerFile, QuestionRow, read_question_rows
from llava_cot_jax.question_result import result_of
from llava_cot_jax.search.strategies import Strategy

if TYPE_CHECKING:
    from llava_cot_jax.model.mllama import Mllama
    from llava_cot_jax.processing.processor import Processor
    from llava_cot_jax.search.request_builder import RequestBuilder
    from llava_cot_jax.search.stream import StreamedAnswer

_LOG = logging.getLogger("llava_cot_jax.generate")

_OF_SINGLE_QUESTIONS = (
    "question",
    "messages",
    "image",
    "draw",
    "trace",
    "threshold_to",
    "page",
    "show_search",
    "live",
    "show_reasoning",
    "json",
)
"""Options that have no meaning with a file of questions."""

_LINES = 20
"""Number of lines that tell how far a job is where there is no terminal."""


def add_question_file_options(parser: Any) -> None:
    """Add the options of this part to a parser of ``jsonargparse``."""
    add = parser.add_argument_group("Files of questions").add_argument
    add(
        "--questions",
        type=str,
        help="JSONL file of any number of questions to answer into --output, some of them at a time. A row has an id, "
        "a question, and optionally image or images (paths relative to the file's folder) and a seed.",
    )
    add(
        "--output",
        type=str,
        help="JSONL file that takes the answers to --questions as they come. The same command goes on with it after an "
        "interruption, and asks no question twice. A question without an answer has a row with the error, and is asked "
        "again once that row is deleted.",
    )
    add("--slots", type=int, default=8, help="Number of questions of --questions that are answered at a time.")


def check_question_file_options(options: Any) -> None:
    """Check the options that stand beside ``--questions``.

    Raises:
        UserError: The output is missing, or an option has no meaning with it.
    """
    if options.output is None:
        raise UserError("--questions needs --output: a JSONL file that takes the answers")
    for name in _OF_SINGLE_QUESTIONS:
        if options[name]:
            raise UserError(f"--{name} has no meaning with --questions, whose answers go to --output")
    check_int("slots", options.slots)


class QuestionFileJob:
    """Job of answering those questions of a file whose answers the output does not have yet.

    Args:
        options: Options of the command.
        strategy: Strategy to search with.
        config: Configuration of the model.
        stated_length: Largest number of tokens of an answer that the checkpoint states.

    Attributes:
        rows: Questions that are still to be answered.

    Raises:
        UserError: A file cannot be used, or the output was begun with other settings.
    """

    def __init__(self, options: Any, strategy: Strategy, config: MllamaConfig, stated_length: int | None) -> None:
        if not strategy.to_spec().can_stream:
            raise UserError(
                f"--search {options.search} answers no file of --questions: give --question, or another --search"
            )
        self._options, self._strategy, self._stated_length = options, strategy, stated_length
        questions = read_question_rows(as_path(options.questions))
        self._file = AnswerFile(as_path(options.output), self._settings(config))
        self.rows: list[QuestionRow] = self._file.unanswered(questions)
        self._total = len(questions)
        self._builder: RequestBuilder | None = None
        self._prompt_tokens, self._images = 1, 0

    def _settings(self, config: MllamaConfig) -> dict[str, Any]:
        """Return what the answers depend on, besides the questions."""
        options = self._options
        prompts = as_path(options.judge_prompts)
        with reading_errors(prompts):
            digest = hashlib.sha256(prompts.read_bytes()).hexdigest()
        return {
            "checkpoint": options.checkpoint,
            "adapter": options.adapter,
            "convention": config.convention,
            "dtype": options.dtype,
            "quantize": options.quantize,
            "search": repr(self._strategy),
            "format": hashlib.sha256(repr(self._strategy.to_spec().format).encode()).hexdigest(),
            "default_max_new_tokens": self._stated_length,
            "judge_prompts": digest,
            "seed": options.seed,
        }

    def prepare(self, processor: Processor) -> None:
        """Check the search, before the weights are loaded.

        Raises:
            UserError: It cannot be used with this checkpoint.
        """
        from llava_cot_jax.search.request_builder import RequestBuilder
        from llava_cot_jax.search.room import Room

        options = self._options
        self._builder = RequestBuilder(processor, self._strategy, options.judge_prompts, self._stated_length)
        self._prompt_tokens = self._longest_prompt(self._builder)
        self._images = max(len(row.sources) for row in self.rows)
        Room.at_least(self._builder, self._prompt_tokens, self._images)

    def _longest_prompt(self, builder: RequestBuilder) -> int:
        """Return the number of tokens of the longest prompt that can be answered, at least 1."""
        from llava_cot_jax.processing.conversation import read_conversation
        from llava_cot_jax.search.tables import token_ids

        lengths = {1}
        for row in self.rows:
            with contextlib.suppress(UserError):  # which the stream tells in the row
                prompt = builder.prompt(read_conversation(row.question, row.sources))
                lengths.add(len(token_ids(builder.processor, prompt)))
        header = builder.chat_headers([max(len(row.sources) for row in self.rows)]).capacity
        for length in sorted(lengths, reverse=True):
            with contextlib.suppress(UserError):
                builder.fitting_spec(length, length, header)
                return length
        return 1

    def run(self, model: Mllama) -> None:
        """Answer the questions with a model, each of which is on the disk as soon as it is answered."""
        from llava_cot_jax.search.stream import AnswerStream, Question

        assert self._builder is not None
        seeds = [self._options.seed if row.seed is None else row.seed for row in self.rows]
        asked = (Question(row.question, row.sources, seed) for row, seed in zip(self.rows, seeds, strict=True))
        stream = AnswerStream(
            model,
            self._builder,
            asked,
            slots=self._options.slots,
            ordered=False,
            prompt_tokens=self._prompt_tokens,
            images=self._images,
        )
        known, failed = self._total - len(self.rows), 0
        start = time.perf_counter()
        every = max(1, self._total // _LINES)
        with self._file, cli.progress_bar("answering", unit="questions", every=every) as on_progress:
            for done, streamed in enumerate(stream, 1):
                row = self.rows[streamed.index]
                failed += streamed.error is not None
                said = _said(streamed, stream.is_shrunk)
                about = {"id": row.id, "question": row.question, "images": row.images}
                self._file.append({**about, "seed": seeds[streamed.index], **said})
                pace = (time.perf_counter() - start) / done
                on_progress(known + done, self._total, f"{pace:.1f} s each" + (f", {failed} failed" if failed else ""))
        if failed:
            _LOG.warning(
                f"{failed} of {len(self.rows)} questions have no answer: the rows with the key error in "
                f"{self._options.output} say why; delete these to ask them again"
            )


def _said(streamed: StreamedAnswer, is_shrunk: bool) -> dict[str, Any]:
    """Return what a row says of a question besides the question."""
    if streamed.answer is None:
        return {"error": str(streamed.error)}
    result = result_of(streamed.answer, is_shrunk)
    return {**asdict(result), "notes": result.notes(streamed.answer.trace.format)}
