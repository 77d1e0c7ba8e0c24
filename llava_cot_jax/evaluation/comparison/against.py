"""Answers of another evaluation to the same questions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_cot_jax.checks import shown
from llava_cot_jax.errors import UserError
from llava_cot_jax.evaluation.question_sets import EvaluationSet
from llava_cot_jax.files import read_json
from llava_cot_jax.hosts.question_queue import AnswerRow
from llava_cot_jax.paths import as_path, reading_errors
from llava_cot_jax.question_files import json_lines

_SAME = (
    ("question", "another question"),
    ("images", "another image"),
    ("answer", "another right answer"),
    ("match", "another way to compare answers"),
)
"""Keys of a row that two evaluations must agree on, and what the other one has where they do not."""


@dataclass(frozen=True)
class MatchedAnswers:
    """Answers of an evaluation and of another one to the questions of both, in one order.

    Attributes:
        name: Path of the other evaluation's answers, as it was given.
        settings: What those answers depend on, by name; empty where that is not told.
        own: Scored rows of the evaluation.
        others: Scored rows of the other one.
        left_out: Number of questions of the evaluation that the other one has no row of.
    """

    name: str
    settings: Mapping[str, Any]
    own: Sequence[AnswerRow]
    others: Sequence[AnswerRow]
    left_out: int


class OtherAnswers:
    """Answers of another evaluation.

    Args:
        name: Path of its file answers.jsonl.
        questions: Questions of the evaluation that it is compared with.

    Raises:
        UserError: There is no such file, a row is none of an evaluation, it is of another benchmark, it has none of
            the questions, or another question of the same id.
    """

    def __init__(self, name: str, questions: EvaluationSet) -> None:
        self._path = path = as_path(name)
        self._name, self._settings, benchmark = name, dict[str, Any](), questions.name
        with reading_errors(path):
            content = path.read_bytes()
        self._rows: dict[Any, AnswerRow] = {}
        for place, row in json_lines(path, content):
            if missing := [key for key in ("id", "question", "images", "right") if key not in row]:
                raise UserError(f"{place} has no {missing[0]}: --against takes answers.jsonl of another evaluation")
            self._rows[row["id"]] = row
        settings = path.with_name(f"{path.name}.settings.json")
        if settings.exists():
            with reading_errors(settings):
                self._settings = read_json(settings)
            if (other := self._settings.get("benchmark", benchmark)) != benchmark:
                raise UserError(f"{path} has answers to the benchmark {other}, and this evaluation is of {benchmark}")
        self._check([{"id": row.id, "question": row.question, "images": row.images} for row in questions.rows])

    def _check(self, asked: Sequence[Mapping[str, Any]]) -> None:
        """Check that there are answers to some of the questions, and that these are the same."""
        common = [row for row in asked if row["id"] in self._rows]
        if not common:
            raise UserError(f"{self._path} has no answer to any question of this evaluation")
        for row in common:
            self._check_same(row, self._rows[row["id"]])

    def match(self, scored: Sequence[AnswerRow]) -> MatchedAnswers:
        """Return the answers to the questions of both.

        Args:
            scored: Scored rows of the evaluation.

        Raises:
            UserError: A question, its right answer, or the way to compare is not the same.
        """
        self._check(scored)
        own = [row for row in scored if row["id"] in self._rows]
        others = [self._rows[row["id"]] for row in own]
        return MatchedAnswers(self._name, self._settings, own, others, len(scored) - len(own))

    def _check_same(self, own: Mapping[str, Any], other: Mapping[str, Any]) -> None:
        for key, says in _SAME:
            if key in own and own[key] != other.get(key):
                raise UserError(
                    f"{self._path} has {says} for the id {shown(own['id'])} than this evaluation: evaluate both on the "
                    "same questions"
                )
