"""Job of giving values to the candidates of searches: the share of their continuations that are right.

Whole answers, which are not continued, are right or wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_cot_jax.answering_model import AnsweringModel
from llava_cot_jax.checks import shown
from llava_cot_jax.errors import UserError
from llava_cot_jax.evaluation.matching import RightAnswer, scored_text
from llava_cot_jax.evaluation.question_sets import EvaluationSet
from llava_cot_jax.files import short_digest, write_bytes
from llava_cot_jax.hosts.question_queue import AnswerRow
from llava_cot_jax.paths import writing_errors
from llava_cot_jax.processing.probe import WHOLE_ANSWER
from llava_cot_jax.question_files import AnswerFile, files_digest
from llava_cot_jax.question_job import QuestionJob
from llava_cot_jax.search.strategies import Strategy
from llava_cot_jax.stage_format import StageFormat

if TYPE_CHECKING:
    from llava_cot_jax.model.mllama import Mllama
    from llava_cot_jax.processing.processor import Processor
    from llava_cot_jax.search.batches import AnswerBatches
    from llava_cot_jax.search.request_builder import RequestBuilder
    from llava_cot_jax.search.rollout_search import StageRollouts, WholeAnswer
    from llava_cot_jax.search.stream import AnswerStream, Question, StreamedAnswer
    from llava_cot_jax.search.trace import CandidateTrace

VALUES = "values.jsonl"
"""File of the values in the folder of a run."""

_LOG = logging.getLogger("llava_cot_jax.rollout")


class RolloutJob(QuestionJob):
    """Job of searching for the answers to questions, and of giving a value to every candidate.

    Args:
        options: Options of the command.
        questions: The questions, with their right answers.
        folder: Folder that takes the values and the images.
        strategy: Search by stages, or of whole answers.
        model: Model that answers.
        writes: Whether this process has the output.

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
        self._name, self._known, self._folder = questions.name, questions.known, folder
        spec = strategy.to_spec()
        self._format, self._has_stages = spec.format, bool(spec.stages)
        super().__init__(options, questions, folder / VALUES, strategy, model, writes=writes)
        if self._file:
            self._check_right_answers(self._file)

    def _settings(self) -> dict[str, Any]:
        names = ("continuations", "match", "tolerance")
        return {"data": self._name, **super()._settings(), **{name: self._options[name] for name in names}}

    def _check_right_answers(self, file: AnswerFile) -> None:
        """Check that the values in a file are by the right answers of now.

        Raises:
            UserError: Those of a question are by another one.
        """
        known = {row.id: each for row, each in zip(self.rows, self._known, strict=True)}
        for row in file.rows():
            if "error" in row or (now := known.get(row["id"])) is None:
                continue
            for name, value in _about(now.right).items():
                if row.get(name) != value:
                    raise UserError(
                        f"{self._output} has values of the id {shown(row['id'])} by {name} = {shown(row.get(name))}, "
                        f"which is {shown(value)} now: name another output"
                    )

    def _image_sizes(self) -> list[int | str]:
        """Return the sizes of images that are files; the digest of a data set stands for its own."""
        from llava_cot_jax.values.questions import RowImages

        return [] if any(isinstance(row.sources, RowImages) for row in self.rows) else super()._image_sizes()

    def _new_builder(self, processor: Processor) -> RequestBuilder:
        from llava_cot_jax.search.rollout_search import RolloutBuilder

        if not self._has_stages:
            return super()._new_builder(processor)
        return RolloutBuilder(processor, self._strategy, self._options.judge_prompts, self._model.stated_length)

    def _answers(self, model: Mllama, questions: Iterator[Question]) -> AnswerStream | AnswerBatches:
        from llava_cot_jax.search.batches import AnswerBatches
        from llava_cot_jax.search.rollout_search import roll_out_together

        if not self._has_stages:
            return super()._answers(model, questions)
        assert self._builder is not None
        search = partial(roll_out_together, continuations=self._options.continuations)
        return AnswerBatches(
            model,
            self._builder,
            questions,
            size=self._options.slots,
            prompt_tokens=self._prompt_tokens,
            images=self._images,
            search=search,
        )

    def finish(self) -> list[AnswerRow]:
        """Put the values in the order of the questions, and say how many questions have none, and what was cut.

        Raises:
            UserError: The output cannot be written.
        """
        rows = super().finish()
        if self._has_stages:
            valued = [each for row in rows for stage in row.get("stages", ()) for each in stage["candidates"]]
        else:
            answers = [answer for row in rows for answer in row.get("answers", ())]
            draws = [each.get("draws", 1) for each in answers]  # files that were begun earlier do not say it
            valued = [{"cut": each["cut"] * n, "continuations": n} for each, n in zip(answers, draws, strict=True)]
        if cut := sum(each["cut"] for each in valued):
            share = cut / sum(each["continuations"] for each in valued)
            _LOG.warning(
                f"{share:.1%} of the answers by which candidates have their values were cut, and count as not right: "
                "give more --max_new_tokens, into another output"
            )
        return rows

    def keep(self, question: int, row: AnswerRow) -> None:
        """Store the values of a question, after its images, if the output is here, and count it.

        Raises:
            UserError: They cannot be stored.
        """
        if self._file and "error" not in row:
            asked = self.rows[question]
            for name, source in zip(asked.images, asked.sources, strict=True):
                _keep_image(self._folder / name, _content_of(source))
        super().keep(question, row)

    def _row(self, question: int, streamed: StreamedAnswer, answers: AnswerStream | AnswerBatches) -> dict[str, Any]:
        from llava_cot_jax.search.rollout_search import RolledOutAnswer
        from llava_cot_jax.values.questions import RowImages

        if streamed.answer is None:
            return super()._row(question, streamed, answers)
        row, known = self.rows[question], self._known[question]
        assert known is not None
        if isinstance(streamed.answer, RolledOutAnswer):
            values = value_stages(streamed.answer.rollouts, known.right, self._format)
        else:
            values = value_answers(streamed.answer.trace.stages[0].candidates, known.right, self._format)
        digest = files_digest(row.sources)
        return {
            "id": row.id,
            "question": row.question,
            "images": row.images,
            "image_digests": [short_digest(_content_of(source)) for source in row.sources],
            **({"files_digest": digest} if digest else {}),
            **({"split": row.sources.split} if isinstance(row.sources, RowImages) else {}),
            **_about(known.right),
            "seed": self._seed(row),
            "format": self._format.name,
            **values,
        }


def value_answers(candidates: Sequence[CandidateTrace], right: RightAnswer, format: StageFormat) -> dict[str, Any]:
    """Return the whole answers of a question, each text once with the number of its draws, as a row has them.

    The row has no stages.

    Args:
        candidates: The answers, with the scores of the verifier.
        right: The right answer.
        format: Format of the answers.
    """
    from llava_cot_jax.search.answers import tagged_text

    whole = dict[str, dict[str, Any]]()
    for candidate in candidates:
        text, is_cut = tagged_text(format, WHOLE_ANSWER, candidate), candidate.ended == "max_new_tokens"
        told: dict[str, Any] = {
            "text": text,
            "right": not is_cut and right.accepts(scored_text(text, format)),
            "cut": is_cut,
        }
        told |= {"mean_log_prob": candidate.mean_log_prob, "score": candidate.score}
        whole.setdefault(text, {**told, "other_probability": candidate.other_probability, "draws": 0})["draws"] += 1
    return {"stages": [], "answers": list(whole.values())}


def value_stages(rollouts: Sequence[StageRollouts], right: RightAnswer, format: StageFormat) -> dict[str, Any]:
    """Return the stages of a question with the values of their candidates, and whole answers, as a row has them.

    An answer that is cut is not right, whatever it says so far.

    Args:
        rollouts: Continuations of each stage's candidates.
        right: The right answer.
        format: Format of the stages.
    """
    verdicts: dict[WholeAnswer, bool] = {}  # many continuations are equal

    def is_right(answer: WholeAnswer) -> bool:
        if answer not in verdicts:
            scored = scored_text(answer.text, format, answer.conclusion)
            verdicts[answer] = not answer.is_cut and right.accepts(scored)
        return verdicts[answer]

    stages, whole = list[dict[str, Any]](), dict[str, dict[str, Any]]()
    for name, stage in zip(format.names, rollouts, strict=True):
        candidates = []
        for i, text in enumerate(stage.texts):
            answers, (score, other) = stage.answers[i], stage.scores[i]
            count = sum(map(is_right, answers))
            candidates.append(
                {
                    "text": text,
                    "value": count / len(answers),
                    "right": count,
                    "continuations": len(answers),
                    "cut": sum(answer.is_cut for answer in answers),
                    "mean_log_prob": stage.mean_log_probs[i],
                    "score": score,
                    "other_probability": other,
                }
            )
            first, (score, other) = answers[0], stage.answer_scores[i]
            told: dict[str, Any] = {"text": first.text, "right": is_right(first), "cut": first.is_cut}
            told |= {"score": score, "other_probability": other, "draws": 0}
            whole.setdefault(first.text, told)["draws"] += 1
        stages.append({"stage": name, "before": stage.before, "winner": stage.winner, "candidates": candidates})
    return {"stages": stages, "answers": list(whole.values())}


def _about(right: RightAnswer) -> dict[str, Any]:
    """Return what a row has of the right answer, by which its candidates can be given values again."""
    answers = list(right.answers)
    return {
        "answer": answers[0] if len(answers) == 1 else answers,
        "match": right.match_name,
        "options": dict(right.options),
        "tolerance": right.tolerance,
    }


def _keep_image(path: Path, content: bytes) -> None:
    """Write an image, unless it is there.

    Raises:
        UserError: It cannot be written, or there is another one, which other questions are about.
    """
    with writing_errors(path):
        if not path.exists():
            write_bytes(path, content)
            return
        is_same = path.read_bytes() == content
    if not is_same:
        raise UserError(f"{path} is another picture than the question's, which has changed: name another output")


def _content_of(source: str | bytes) -> bytes:
    """Return the bytes of the file of an image."""
    from llava_cot_jax.processing.images import read_image_file

    return source if isinstance(source, bytes) else read_image_file(source)
