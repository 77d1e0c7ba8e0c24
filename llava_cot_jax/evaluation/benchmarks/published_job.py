"""Job of answering the questions of a published benchmark, whose answers VLMEvalKit's own classes score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from llava_cot_jax import cli
from llava_cot_jax.answering_model import AnsweringModel
from llava_cot_jax.evaluation.benchmarks.grader import Grader
from llava_cot_jax.evaluation.benchmarks.kit_install import kit_fault
from llava_cot_jax.evaluation.benchmarks.kit_scores import KIT_FOLDER, score_predictions
from llava_cot_jax.evaluation.benchmarks.predictions import MODEL_NAME, prediction_of, write_predictions
from llava_cot_jax.evaluation.benchmarks.question_tables import PublishedSet
from llava_cot_jax.evaluation.benchmarks.score_report import print_scores
from llava_cot_jax.evaluation.job import RESULT, EvaluationJob
from llava_cot_jax.evaluation.results import mean_costs
from llava_cot_jax.files import write_json
from llava_cot_jax.hosts.question_queue import AnswerRow
from llava_cot_jax.paths import writing_errors
from llava_cot_jax.search.strategies import Strategy


class PublishedJob(EvaluationJob):
    """Job of answering the questions of a published benchmark.

    No row says whether its answer is right: the scores are those of VLMEvalKit alone.

    Args:
        options: Options of the command.
        questions: The questions.
        folder: Folder of the evaluation.
        strategy: Strategy to search with, which can answer a stream.
        model: Model that answers.
        grader: Judge of the benchmark; None has VLMEvalKit match exactly.
        writes: Whether this process has the output.

    Raises:
        UserError: The output cannot be used, or was begun with other settings.
    """

    def __init__(
        self,
        options: Any,
        questions: PublishedSet,
        folder: Path,
        strategy: Strategy,
        model: AnsweringModel,
        *,
        grader: Grader | None,
        writes: bool = True,
    ) -> None:
        self._published, self._grader = questions, grader
        self._categories = questions.categories()
        super().__init__(options, questions, folder, strategy, model, writes=writes)

    def check_judge(self) -> None:
        if self._grader and self.unanswered:
            self._grader.check()

    def report(self) -> dict[str, Any]:
        """Write the predictions in VLMEvalKit's layout, score them, and return the scores and what was run.

        Raises:
            UserError: The predictions cannot be scored, or the judge does not answer. The result then has no scores.
        """
        questions = self._published
        predictions = self._folder / KIT_FOLDER / f"{MODEL_NAME}_{questions.benchmark.dataset}.xlsx"
        write_predictions(predictions, questions.table, self.scored, self._format)
        result = {
            "benchmark": self._benchmark,
            "dataset": questions.benchmark.dataset,
            "sha256": questions.sha256,
            "md5": questions.md5,
            "published": questions.is_published,
            "questions": {
                "asked": len(self.scored),
                "of": questions.total,
                "unanswered": sum("error" in row for row in self.scored),
            },
            "scores": None,
            **mean_costs(self.scored),
            "run": self._run(),
            "environments": self._environments(),
        }
        path = self._folder / RESULT
        with writing_errors(path):
            write_json(path, result)  # scores of other answers must not stay where these cannot be scored
        if kit_fault() is None:
            asks = f", and asks {self._grader.model}" if self._grader else ""
            with cli.status(f"VLMEvalKit scores the answers{asks}"):
                result["scores"] = score_predictions(questions.benchmark, questions.table, predictions, self._grader)
        return result

    def show(self, result: dict[str, Any], console: Console) -> None:
        """Print a result.

        Args:
            result: The result.
            console: Console to print on.
        """
        print_scores(result, self._published, self._folder, console)

    def _settings(self) -> dict[str, Any]:
        return {"prompts": self._published.prompts, **super()._settings()}

    def _completed(self, row: AnswerRow) -> dict[str, Any]:
        scored = {} if "error" in row else {"scored": prediction_of(row, self._format)}
        return {**row, **scored, "category": self._categories.get(row["id"])}
