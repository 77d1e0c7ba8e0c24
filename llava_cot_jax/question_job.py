"""Job of answering questions into a file of answers, as a stream, and its options for ``generate``."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_cot_jax import cli
from llava_cot_jax.answering_model import AnsweringModel
from llava_cot_jax.checks import check_int
from llava_cot_jax.errors import UserError
from llava_cot_jax.files import short_digest
from llava_cot_jax.hosts.question_queue import AnswerRow, QuestionQueue, QuestionSource
from llava_cot_jax.paths import as_path, is_remote, reading_errors
from llava_cot_jax.progress import ProgressUpdate
from llava_cot_jax.question_files import AnswerFile, QuestionRow, files_digest, read_question_rows
from llava_cot_jax.question_result import has_all_sentences, result_of
from llava_cot_jax.search.strategies import Strategy

if TYPE_CHECKING:
    from llava_cot_jax.model.mllama import Mllama
    from llava_cot_jax.processing.processor import Processor
    from llava_cot_jax.search.batches import AnswerBatches
    from llava_cot_jax.search.request_builder import RequestBuilder
    from llava_cot_jax.search.stream import AnswerStream, Question, StreamedAnswer

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
        help="JSONL file that takes the answers to --questions as they come, and is put in the order of the questions "
        "at the end. The same command goes on with it after an interruption, and asks no question twice. A question "
        "without an answer has a row with the error, and is asked again once that row is deleted.",
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


class UnansweredError(UserError):
    """Error of a job of whose questions none has an answer. It ends a command with exit code 1."""

    exit_code = 1


@dataclass(frozen=True)
class QuestionSet:
    """Questions of a job.

    Attributes:
        rows: The questions.
        digest: Digest of what they are made of, but for images that are files.
    """

    rows: list[QuestionRow]
    digest: str


def read_question_set(path: Path) -> QuestionSet:
    """Read a file of questions.

    Raises:
        UserError: ``read_question_rows`` refuses it.
    """
    rows = read_question_rows(path)
    with reading_errors(path):
        return QuestionSet(rows, short_digest(path.read_bytes()))


class QuestionJob:
    """Job of answering those questions whose answers the output does not have yet.

    Args:
        options: Options of the command.
        questions: The questions.
        output: File of the answers.
        strategy: Strategy to search with.
        model: Model that answers.
        writes: Whether this process has the output.

    Attributes:
        rows: All questions.
        unanswered: Numbers of the questions that are still to be answered; empty in a process without the output.

    Raises:
        UserError: The output cannot be used, or was begun with other settings.
    """

    def __init__(
        self,
        options: Any,
        questions: QuestionSet,
        output: Path,
        strategy: Strategy,
        model: AnsweringModel,
        *,
        writes: bool = True,
    ) -> None:
        self._options, self._questions, self._output = options, questions, output
        self._strategy, self._model = strategy, model
        self.rows = questions.rows
        self._given = self._settings()
        self.unanswered: list[int] = []
        self._file: AnswerFile | None = None
        if writes:
            self._file = AnswerFile(output, self._given)
            self.unanswered = self._file.unanswered(self.rows, options.seed)
        self._done, self._failed = len(self.rows) - len(self.unanswered), 0
        self._fault: UnansweredError | None = None
        self._on_progress: ProgressUpdate = lambda done, total, note="": None
        self._builder: RequestBuilder | None = None
        self._prompt_tokens, self._images = 1, 0

    def _settings(self) -> dict[str, Any]:
        """Return what the answers depend on, besides the questions."""
        options = self._options
        prompts = as_path(options.judge_prompts)
        with reading_errors(prompts):
            digest = hashlib.sha256(prompts.read_bytes()).hexdigest()
        return {
            "checkpoint": options.checkpoint,
            "adapter": options.adapter,
            **({"verifier_adapter": options.verifier_adapter} if options.verifier_adapter else {}),
            "convention": self._model.config.convention,
            "dtype": options.dtype,
            "quantize": options.quantize,
            "search": repr(self._strategy),
            "format": hashlib.sha256(repr(self._strategy.to_spec().format).encode()).hexdigest(),
            "default_max_new_tokens": self._model.stated_length,
            "judge_prompts": digest,
            "seed": options.seed,
            **self._model.digests,
        }

    def fields(self) -> dict[str, str]:
        """Return what must be the same in all processes that answer the questions, by name.

        The paths of the checkpoint and the adapters may differ.
        """
        own = ("checkpoint", "adapter", "verifier_adapter")
        settings = {name: str(value) for name, value in self._given.items() if name not in own}
        return {
            **settings,
            "slots": str(self._options.slots),
            "the number of questions": str(len(self.rows)),
            "the digest of the questions": self._questions.digest,
            "the digest of their ids": short_digest(repr([row.id for row in self.rows]).encode()),
            "the digest of the sizes of the images": short_digest(repr(self._image_sizes()).encode()),
        }

    def _image_sizes(self) -> list[int | str]:
        return [_size(source) for row in self.rows for source in row.sources]

    def prepare(self, processor: Processor) -> None:
        """Check the search, before the weights are loaded.

        Raises:
            UserError: It cannot be used with this checkpoint.
        """
        from llava_cot_jax.search.room import Room

        self._builder = self._new_builder(processor)
        # The room is that of all questions, so that an answer does not depend on where the job was interrupted.
        self._prompt_tokens = self._longest_prompt(self._builder)
        self._images = max(len(row.sources) for row in self.rows)
        Room.at_least(self._builder, self._prompt_tokens, self._images)

    def _new_builder(self, processor: Processor) -> RequestBuilder:
        from llava_cot_jax.search.request_builder import RequestBuilder

        return RequestBuilder(processor, self._strategy, self._options.judge_prompts, self._model.stated_length)

    def _longest_prompt(self, builder: RequestBuilder) -> int:
        """Return the number of tokens of the longest prompt that can be answered, at least 1."""
        from llava_cot_jax.processing.conversation import read_conversation
        from llava_cot_jax.search.tables import token_ids

        lengths = {1}
        for row in self.rows:
            with contextlib.suppress(UserError):  # which the stream tells in the row
                # A prompt does not depend on its images, which are not read here.
                prompt = builder.prompt(read_conversation(row.question, [b""] * len(row.sources)))
                lengths.add(len(token_ids(builder.processor, prompt)))
        header = builder.chat_headers([max(len(row.sources) for row in self.rows)]).capacity
        for length in sorted(lengths, reverse=True):
            with contextlib.suppress(UserError):
                builder.fitting_spec(length, length, header)
                return length
        return 1

    def share_unanswered(self) -> None:
        """Let every process know which questions are still to be answered, as the one with the output does.

        All processes that jax has connected must call this.
        """
        import jax
        import numpy as np

        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            mask = np.zeros(len(self.rows), bool)
            mask[self.unanswered] = True
            self.unanswered = np.flatnonzero(multihost_utils.broadcast_one_to_all(mask)).tolist()

    def queue(self) -> QuestionQueue:
        """Return the queue of the questions still to be answered, whose rows go to the output, if it is here."""
        self._began = time.perf_counter()
        return QuestionQueue(self.unanswered, self._keep, lambda question, row: row.get("id") == self.rows[question].id)

    def keep(self, question: int, row: AnswerRow) -> None:
        """Store the row with the answer to a question, if the output is here, and count it.

        Raises:
            UserError: It cannot be stored.
        """
        if self._file:
            self._file.append(self._completed(row))
        self._done += 1
        self._failed += "error" in row

    def _keep(self, question: int, row: AnswerRow) -> None:
        self.keep(question, row)
        new = self._done - (len(self.rows) - len(self.unanswered))
        pace = (time.perf_counter() - self._began) / new
        failed = f", {self._failed} failed" if self._failed else ""
        self._on_progress(self._done, len(self.rows), f"{pace:.1f} s each{failed}")

    def _completed(self, row: AnswerRow) -> AnswerRow:
        """Return what is written of a row, which may be one that was written before."""
        return row

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show how far the job is while the block is run."""
        every = max(1, len(self.rows) // _LINES)
        self._began = time.perf_counter()
        with cli.progress_bar("answering", unit="questions", every=every) as self._on_progress:
            yield

    def finish(self) -> list[AnswerRow]:
        """Put the answers in the order of the questions, and say how many questions have none.

        Returns:
            The rows of the file; none in a process without it.

        Raises:
            UserError: The output cannot be written.
        """
        if self._file is None:
            return []
        rows = self._file.put_in_order([row.id for row in self.rows], self._completed)
        self._file.close()
        asked = rows[: len(self.rows)]  # those to other questions come after them
        if all("error" in row for row in asked):
            self._fault = UnansweredError(
                f"none of {len(asked)} questions has an answer ({asked[0]['error']}): delete the rows with the key "
                f"error in {self._output} to ask them again"
            )
        elif self._failed:
            _LOG.warning(
                f"{self._failed} of {len(self.unanswered)} questions have no answer: the rows with the key error in "
                f"{self._output} say why; delete these to ask them again"
            )
        return rows

    def check_answered(self) -> None:
        """Check that a question has an answer, once ``finish`` has been called.

        Raises:
            UnansweredError: None has one.
        """
        if self._fault:
            raise self._fault

    def run(self, model: Mllama, source: QuestionSource) -> None:
        """Answer questions with a model until all are answered, here or in other processes.

        Args:
            model: The model.
            source: Source of the questions, which takes the answers.

        Raises:
            UserError: An answer cannot be stored.
        """
        while (first := source.wait()) is not None:
            asked = [first]
            answers = self._answers(model, self._take_questions(asked, source))
            for streamed in answers:
                question = asked[streamed.index]
                source.finish(question, self._row(question, streamed, answers))

    def _answers(self, model: Mllama, questions: Iterator[Question]) -> AnswerStream | AnswerBatches:
        """Return the answers to questions, as they come."""
        from llava_cot_jax.search.batches import AnswerBatches
        from llava_cot_jax.search.stream import AnswerStream

        assert self._builder is not None
        slots, prompt_tokens, images = self._options.slots, self._prompt_tokens, self._images
        if not self._builder.spec.can_stream:
            return AnswerBatches(
                model, self._builder, questions, size=slots, prompt_tokens=prompt_tokens, images=images
            )
        return AnswerStream(
            model, self._builder, questions, slots=slots, ordered=False, prompt_tokens=prompt_tokens, images=images
        )

    def _take_questions(self, asked: list[int], source: QuestionSource) -> Iterator[Question]:
        """Yield the question in ``asked``, and then those that the source has, whose numbers are added to ``asked``."""
        from llava_cot_jax.search.stream import Question

        question: int | None = asked[0]
        while question is not None:
            row = self.rows[question]
            yield Question(row.question, row.sources, self._seed(row))
            if (question := source.take()) is not None:
                asked.append(question)

    def _seed(self, row: QuestionRow) -> int:
        return int(self._options.seed if row.seed is None else row.seed)

    def _row(self, question: int, streamed: StreamedAnswer, answers: AnswerStream | AnswerBatches) -> dict[str, Any]:
        """Return the row with the answer to a question. It has no times, so that it is the same wherever it is made."""
        row = self.rows[question]
        about = {"id": row.id, "question": row.question, "images": row.images, "seed": self._seed(row)}
        if streamed.answer is None:
            error = str(streamed.error)
            # The images of a data set have no paths, and one that cannot be read may be what the error is about.
            sources = row.sources if isinstance(row.sources, list) else []
            for source, name in zip(sources, row.images, strict=False):
                if isinstance(source, str):
                    error = error.replace(source, name)  # which is another path in another process
            return {**about, "error": error}
        if digest := files_digest(row.sources):
            about["files_digest"] = digest
        result = result_of(streamed.answer, answers.is_shrunk)
        if has_all_sentences(streamed.answer.trace, answers.spec):
            result = replace(result, bounded_by="max_sentences")
        said = {name: value for name, value in asdict(result).items() if name != "seconds"}
        return {**about, **said, "notes": result.notes(streamed.answer.trace.format)}


def _size(source: str | bytes) -> int | str:
    """Return the size of an image in bytes, or what there is to say of one that is no file here."""
    from llava_cot_jax.processing.images import is_data_url

    if isinstance(source, bytes) or is_data_url(source):
        return len(source)
    try:
        path = as_path(source)
        return source if is_remote(path) else path.stat().st_size
    except (OSError, UserError) as fault:
        return type(fault).__name__
