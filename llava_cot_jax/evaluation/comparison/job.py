"""Job of answering the same questions by several methods, with one queue of questions and one load of the weights."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_cot_jax import cli
from llava_cot_jax.answering_model import AnsweringModel
from llava_cot_jax.evaluation.comparison.methods import Method, plan_runs
from llava_cot_jax.evaluation.comparison.seconds import CompilationTimer, Seconds
from llava_cot_jax.evaluation.job import ENVIRONMENTS, EvaluationJob, environments, scored_row
from llava_cot_jax.evaluation.question_sets import EvaluationSet
from llava_cot_jax.hosts.question_queue import AnswerRow, QuestionQueue, QuestionSource
from llava_cot_jax.progress import ProgressUpdate
from llava_cot_jax.question_job import UnansweredError

if TYPE_CHECKING:
    from llava_cot_jax.model.mllama import Mllama
    from llava_cot_jax.processing.processor import Processor

_LINES = 20
"""Number of lines that tell how far a comparison is where there is no terminal."""

_SECONDS = "seconds"
"""Key of a row with the seconds that it took, on its way to the file, which does not get it."""


COMPARED = ("id", "images", "error", "right", "category", "match", "tokens", "flops")
"""Keys of a row that a comparison reads. The others, which are long, are not kept for each method."""


@dataclass(frozen=True)
class MethodAnswers:
    """Answers of a method to all questions.

    Attributes:
        method: The method.
        run: Method that was run for it.
        rows: Scored row of each question, as far as ``COMPARED`` goes.
        is_derived: Whether the answers are derived from those of a run that did more.
        seconds_per_question: Seconds that a process took for a question; None where the answers are derived, or where
            none was timed.
        environments: Devices and versions of packages that the run was computed with.
    """

    method: Method
    run: Method
    rows: list[AnswerRow]
    is_derived: bool
    seconds_per_question: float | None
    environments: list[dict[str, str]]


class ComparisonJob:
    """Job of answering the same questions by several methods. Each run is an evaluation in a folder of its own.

    A question of a run has a number: that of the run times the number of questions, and its own.

    Args:
        options: Options of the command.
        questions: The questions, with what is known of them.
        folder: Folder of the comparison.
        methods: Methods to compare.
        model: Model that answers.
        writes: Whether this process has the output.

    Attributes:
        questions: The questions, with what is known of them.
        methods: Methods to compare.
        unanswered: Numbers of the questions that are still to be answered; empty in a process without the output.

    Raises:
        UserError: The output of a run cannot be used, or was begun with other settings.
    """

    def __init__(
        self,
        options: Any,
        questions: EvaluationSet,
        folder: Path,
        methods: list[Method],
        model: AnsweringModel,
        *,
        writes: bool = True,
    ) -> None:
        self.questions, self.methods = questions, methods
        self._model, self._folder = model, folder
        self._run_of = plan_runs(methods, options)
        self._runs = {run.name: run for run in self._run_of.values()}
        self._jobs = [
            EvaluationJob(options, questions, folder / run.folder, run.strategy, model, writes=writes)
            for run in self._runs.values()
        ]
        self._seconds = [Seconds(folder / run.folder) if writes else None for run in self._runs.values()]
        self._count = len(questions.rows)
        self._on_progress: ProgressUpdate = lambda done, total, note="": None

    @property
    def unanswered(self) -> list[int]:
        """Numbers of the questions that are still to be answered, run after run."""
        return [self._count * run + question for run, job in enumerate(self._jobs) for question in job.unanswered]

    def fields(self) -> dict[str, str]:
        """Return what must be the same in all processes that answer the questions, by name."""
        each = (job.fields() for job in self._jobs)
        told = (
            {f"{name}: {key}": value for key, value in of.items()} for name, of in zip(self._runs, each, strict=True)
        )
        return dict(chain.from_iterable(of.items() for of in told))

    def prepare(self, processor: Processor) -> None:
        """Check the searches, before the weights are loaded.

        Raises:
            UserError: One cannot be used with this checkpoint.
        """
        for job in self._jobs:
            job.prepare(processor)

    def share_unanswered(self) -> None:
        """Let every process know which questions are still to be answered, as the one with the output does."""
        for job in self._jobs:
            job.share_unanswered()

    def queue(self) -> QuestionQueue:
        """Return the queue of the questions still to be answered, whose rows go to the files of the runs."""
        self._began, self._left = time.perf_counter(), len(self.unanswered)
        ids = [row.id for row in self.questions.rows]
        return QuestionQueue(
            self.unanswered, self._keep, lambda number, row: row.get("id") == ids[number % self._count]
        )

    def _keep(self, number: int, row: AnswerRow) -> None:
        run, question = divmod(number, self._count)
        kept = {key: value for key, value in row.items() if key != _SECONDS}
        self._jobs[run].keep(question, kept)
        if seconds := self._seconds[run]:
            seconds.add(row[_SECONDS])
        self._left -= 1
        total = self._count * len(self._jobs)
        self._on_progress(total - self._left, total, f"answering by {list(self._runs)[run]}")

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show how far the job is while the block is run."""
        every = max(1, self._count * len(self._jobs) // _LINES)
        with cli.progress_bar("comparing", unit="answers", every=every) as self._on_progress:
            yield

    def run(self, model: Mllama, source: QuestionSource) -> None:
        """Answer questions with a model until all are answered, here or in other processes.

        Raises:
            UserError: An answer, or what it runs on, cannot be stored.
        """
        timer = CompilationTimer()
        number = source.wait()
        while number is not None:
            run = number // self._count
            part = _QuestionsOfRun(source, run, self._count, number, timer)
            self._jobs[run].run(model, part)
            number = part.held

    def finish(self) -> None:
        """Score all answers anew, and put them in the order of the questions.

        Raises:
            UserError: An output cannot be written.
        """
        for job in self._jobs:
            job.finish()

    def check_answered(self) -> None:
        """Check that a question has an answer by a method, once ``finish`` has been called.

        Raises:
            UnansweredError: None has one.
        """
        faults = []
        for job in self._jobs:
            try:
                job.check_answered()
            except UnansweredError as fault:
                faults.append(fault)
        if len(faults) == len(self._jobs):
            raise faults[0]

    def about(self) -> dict[str, Any]:
        """Return what was asked, and what of all runs is the same."""
        runs = [job.report()["run"] for job in self._jobs]
        same = {name: value for name, value in runs[0].items() if all(run[name] == value for run in runs)}
        name, digest = self.questions.name, self.questions.sha256
        return {"benchmark": name, "sha256": digest, "questions": self._count, "run": same}

    def answers(self) -> list[MethodAnswers]:
        """Return the answers of each method, once ``finish`` has been called in the process with the output."""
        return [self._answers(method) for method in self.methods]

    def scored_rows(self, method: Method) -> Iterator[AnswerRow]:
        """Yield the scored row of each question by a method, once ``finish`` has been called."""
        run = self._run_of[method.name]
        rows = self._jobs[list(self._runs).index(run.name)].scored
        if run.name == method.name:
            yield from rows
            return
        from llava_cot_jax.evaluation.comparison.derived import derived_row

        format = method.strategy.to_spec().format
        right = [known for known in self.questions.known if known is not None]  # which is all of them
        for row, known in zip(rows, right, strict=True):
            yield scored_row(derived_row(row, method, self._model.config, known.right), known, format)

    def _answers(self, method: Method) -> MethodAnswers:
        run = self._run_of[method.name]
        place = list(self._runs).index(run.name)
        seconds = self._seconds[place]
        same_work = run.num_candidates == method.num_candidates and run.has_verifier == method.has_verifier
        return MethodAnswers(
            method,
            run,
            [{key: row[key] for key in COMPARED if key in row} for row in self.scored_rows(method)],
            is_derived=not same_work,
            seconds_per_question=seconds.per_question if seconds and same_work else None,
            environments=environments(self._folder / run.folder / ENVIRONMENTS),
        )


class _QuestionsOfRun:
    """Source of the questions of one run.

    Args:
        source: Source of the questions of all runs.
        run: Number of the run.
        count: Number of questions of a run.
        first: The number that was taken last, of a question of this run.
        timer: Timer of compilations, which do not count.

    Attributes:
        held: The number of a question that was taken, until it is begun; of another run once this one is left.
    """

    def __init__(self, source: QuestionSource, run: int, count: int, first: int, timer: CompilationTimer) -> None:
        self._source, self._run, self._count, self._timer = source, run, count, timer
        self.held: int | None = first
        self._since = time.perf_counter() - timer.seconds

    def take(self) -> int | None:
        """Return the next question, or None where there is none to begin now in this run."""
        return self._next(self._source.take)

    def wait(self) -> int | None:
        """Wait for a question. Return None once all are answered, or the next one is of another run."""
        return self._next(self._source.wait)

    def finish(self, question: int, row: AnswerRow) -> None:
        """Hand in the row with the answer to a question, with the seconds since the row before it."""
        now = time.perf_counter() - self._timer.seconds
        seconds, self._since = now - self._since, now
        self._source.finish(self._count * self._run + question, {**row, _SECONDS: seconds})

    def _next(self, get: Any) -> int | None:
        if self.held is None:
            self.held = get()
        if self.held is None or self.held // self._count != self._run:
            return None
        question, self.held = self.held % self._count, None
        return question
