"""Job of answering questions whose right answers are known, and of scoring what is answered."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from llava_cot_jax.answering_model import AnsweringModel
from llava_cot_jax.evaluation.matching import scored_text
from llava_cot_jax.evaluation.question_sets import EvaluationSet, KnownAnswer
from llava_cot_jax.evaluation.results import print_result, summarize
from llava_cot_jax.files import read_json, write_json
from llava_cot_jax.hosts.question_queue import AnswerRow, QuestionSource
from llava_cot_jax.hosts.surroundings import package_version
from llava_cot_jax.paths import writing_errors
from llava_cot_jax.question_job import QuestionJob
from llava_cot_jax.search.strategies import Strategy
from llava_cot_jax.stage_format import StageFormat

if TYPE_CHECKING:
    from llava_cot_jax.model.mllama import Mllama
    from llava_cot_jax.search.batches import AnswerBatches
    from llava_cot_jax.search.stream import AnswerStream, StreamedAnswer

ANSWERS, RESULT, ENVIRONMENTS = "answers.jsonl", "result.json", "environments.json"
"""Files in the folder of an evaluation."""

_NAMED_VERSIONS = ("llava_cot_jax", "jax", "jaxlib", "flax", "transformers", "numpy", "pillow")
"""Packages whose versions stand beside a result."""


class EvaluationJob(QuestionJob):
    """Job of answering questions whose right answers are known.

    Args:
        options: Options of the command.
        questions: The questions, with what is known of them.
        folder: Folder of the evaluation.
        strategy: Strategy to search with.
        model: Model that answers.
        writes: Whether this process has the output.

    Attributes:
        scored: Scored row of each question, once ``finish`` has been called in the process with the output.

    Raises:
        UserError: The output cannot be used, or was begun with other settings.
    """

    def __init__(
        self,
        options: Any,
        questions: EvaluationSet,
        folder: Path,
        strategy: Strategy,
        model: AnsweringModel,
        *,
        writes: bool = True,
    ) -> None:
        self._benchmark, self._sha256, self._folder = questions.name, questions.sha256, folder
        self._known = {row.id: known for row, known in zip(questions.rows, questions.known, strict=True)}
        self._format = strategy.to_spec().format
        self.scored: list[AnswerRow] = []
        super().__init__(options, questions, folder / ANSWERS, strategy, model, writes=writes)

    def run(self, model: Mllama, source: QuestionSource) -> None:
        """Answer questions with a model, and write down the devices and packages.

        Raises:
            UserError: An answer, or what it runs on, cannot be stored.
        """
        if self._file:
            note_environment(self._folder / ENVIRONMENTS)
        super().run(model, source)

    def finish(self) -> list[AnswerRow]:
        """Score all answers anew, and put them in the order of the questions.

        A right answer that was corrected, or another way to compare, so counts without asking anything again.

        Raises:
            UserError: The output cannot be written.
        """
        rows = super().finish()
        self.scored = rows[: len(self.rows)]  # those to other questions come after them
        return rows

    def check_judge(self) -> None:
        """Check that the judge of the benchmark answers, if it has one, where answers are still to be generated.

        Raises:
            UserError: It does not.
        """

    def report(self) -> dict[str, Any]:
        """Return the accuracy of the scored rows, what they took, and what was run."""
        matching = {"match": self._options.match, "tolerance": self._options.tolerance}
        return {
            "benchmark": self._benchmark,
            "sha256": self._sha256,
            **summarize(self.scored),
            "run": self._run() | matching,
            "environments": self._environments(),
        }

    def show(self, result: dict[str, Any], console: Console) -> None:
        """Print a result.

        Args:
            result: The result.
            console: Console to print on.
        """
        print_result(result, console)

    def _run(self) -> dict[str, Any]:
        """Return what was run, besides the questions."""
        run = {**self._given, "format": self._format.name}
        del run["benchmark"]
        return run

    def _environments(self) -> list[dict[str, str]]:
        return environments(self._folder / ENVIRONMENTS)

    def _settings(self) -> dict[str, Any]:
        return {"benchmark": self._benchmark, **super()._settings()}

    def _completed(self, row: AnswerRow) -> dict[str, Any]:
        known = self._known.get(row["id"])
        return scored_row(row, known, self._format) if known else dict(row)

    def _row(self, question: int, streamed: StreamedAnswer, answers: AnswerStream | AnswerBatches) -> dict[str, Any]:
        row = super()._row(question, streamed, answers)
        if streamed.answer is None:
            return row
        trace = streamed.answer.trace
        return row | {"flops": trace.flops, "trace": trace.without_seconds()}


def scored_row(row: AnswerRow, known: KnownAnswer, format: StageFormat) -> dict[str, Any]:
    """Return the row of an answer with the right answer, how both are compared, and whether it is right.

    A question without an answer counts as wrong.

    Args:
        row: Row as ``generate`` writes it.
        known: What is known of the question.
        format: Format of the stages.
    """
    answers = list(known.right.answers)
    scored: dict[str, Any] = {"answer": answers[0] if len(answers) == 1 else answers, "match": known.right.match_name}
    if "error" in row:
        scored["right"] = False
    else:
        scored["scored"] = scored_text(row["text"], format, row["stages"].get(format.conclusion))
        scored["right"] = known.right.accepts(scored["scored"])
    return {**row, **scored, "category": known.category}


def note_environment(path: Path) -> None:
    """Add the devices and the versions of packages to those that a file lists, unless they are there.

    Raises:
        UserError: The file cannot be written.
    """
    import jax

    found = {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        **{name: package_version(name) for name in _NAMED_VERSIONS},
    }
    known = environments(path)
    if found not in known:
        with writing_errors(path):
            write_json(path, {"environments": [*known, found]})


def environments(path: Path) -> list[dict[str, str]]:
    """Return what the answers of an evaluation were computed on, each once, as ``note_environment`` wrote it."""
    return list(read_json(path)["environments"]) if path.exists() else []
