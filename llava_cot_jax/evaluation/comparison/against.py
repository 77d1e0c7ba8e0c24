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

_KEYS = ("id", "question", "images", "seed", "category", "match", "right")
"""Keys that a row of an evaluation has."""

_KEYS_OF_ANSWERS = ("scored", "tokens", "flops")
"""Keys that it has as well where the question has an answer."""


@dataclass(frozen=True)
class MatchedAnswers:
    """Answers of an evaluation and of another one to the questions of both, in one order.

    Attributes:
        name: Path of the other evaluation's answers, as it was given.
        settings: What those answers depend on, by name; empty where that is not told.
        own: Scored rows of the evaluation.
        others: Scored rows of the other one.
        left_out: Number of questions of the evaluation that the other one has no row of.
        other_seeds: Number of questions whose draws have another seed in the other one.
    """

    name: str
    settings: Mapping[str, Any]
    own: Sequence[AnswerRow]
    others: Sequence[AnswerRow]
    left_out: int
    other_seeds: int


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
        self._known = {row.id: known for row, known in zip(questions.rows, questions.known, strict=True)}
        with reading_errors(path):
            content = path.read_bytes()
        settings = path.with_name(f"{path.name}.settings.json")
        if settings.exists():
            with reading_errors(settings):
                self._settings = read_json(settings)
            if (other := self._settings.get("benchmark", benchmark)) != benchmark:
                raise UserError(f"{path} has answers to the benchmark {other}, and this evaluation is of {benchmark}")
        self._rows: dict[Any, AnswerRow] = {}
        for place, row in json_lines(path, content):
            needed = _KEYS if "error" in row else (*_KEYS, *_KEYS_OF_ANSWERS)
            if missing := [key for key in needed if key not in row]:
                raise UserError(f"{place} has no {missing[0]}: --against takes answers.jsonl of another evaluation")
            if not isinstance(row["id"], str | int):
                raise UserError(f"{place}: id is {shown(row['id'])}; it must be a text or a whole number")
            self._rows[row["id"]] = row
        self._check([{"id": row.id, "question": row.question, "images": row.images} for row in questions.rows])

    def _check(self, asked: Sequence[Mapping[str, Any]]) -> None:
        """Check that there are answers to some of the questions, and that these are the same."""
        common = [row for row in asked if row["id"] in self._rows]
        if not common:
            raise UserError(f"{self._path} has no answer to any question of this evaluation")
        for row in common:
            self._check_same(row, self._rows[row["id"]])

    def match(self, scored: Sequence[AnswerRow]) -> MatchedAnswers:
        """Return the answers to the questions of both. Those of the other one are scored anew, as the own ones are.

        Args:
            scored: Scored rows of the evaluation.

        Raises:
            UserError: A question, its right answer, or the way to compare is not the same.
        """
        self._check(scored)
        own = [row for row in scored if row["id"] in self._rows]
        others = [self._scored(self._rows[row["id"]]) for row in own]
        other_seeds = sum(row["seed"] != other["seed"] for row, other in zip(own, others, strict=True))
        return MatchedAnswers(self._name, self._settings, own, others, len(scored) - len(own), other_seeds)

    def _scored(self, row: AnswerRow) -> AnswerRow:
        """Return a row with whether it is right by the own evaluation's tolerance and options."""
        known = self._known[row["id"]]
        is_right = "error" not in row and known is not None and known.right.accepts(row["scored"])
        return {**row, "right": is_right}

    def _check_same(self, own: Mapping[str, Any], other: Mapping[str, Any]) -> None:
        for key, says in _SAME:
            if key in own and own[key] != other.get(key):
                raise UserError(
                    f"{self._path} has {says} for the id {shown(own['id'])} than this evaluation: evaluate both on the "
                    "same questions"
                )
        if other.get("files_digest") and own.get("files_digest") not in (None, other["files_digest"]):
            raise UserError(
                f"{self._path} has other pictures of the same names for the id {shown(own['id'])} than this "
                "evaluation: evaluate both on the same questions"
            )
