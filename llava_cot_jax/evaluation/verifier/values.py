"""Values and scores of candidates, as ``rollout`` writes them into a folder.

The value of a candidate is the share of right conclusions among answers that continue it; its score is the probability
of yes against no, by which a verifier rates it.
"""

import hashlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from typing import Any

from llava_cot_jax.checks import check_int, check_number, check_text, shown
from llava_cot_jax.errors import UserError
from llava_cot_jax.evaluation.results import cluster_of
from llava_cot_jax.paths import as_path, reading_errors
from llava_cot_jax.question_files import json_lines

WHOLE_ANSWERS = "whole answers"
"""Name under which the measures of whole answers stand beside those of the stages."""

_VALUES = "values.jsonl"


@dataclass(frozen=True)
class ValuedText:
    """Text that was drawn once or more as a candidate, with means over its draws.

    Attributes:
        text: The text.
        draws: Number of candidates that are this text.
        value: Share of right conclusions, from 0 to 1.
        score: Probability of yes against no.
        other_probability: Probability of anything but yes and no.
        mean_log_prob: Mean log-probability of its tokens; None with a whole answer that a continuation ends, whose
            beginning was not sampled with it.
    """

    text: str
    draws: int
    value: float
    score: float
    other_probability: float
    mean_log_prob: float | None


@dataclass(frozen=True)
class CandidateGroup:
    """Candidates among which a search chooses: those of one question and one stage, or its whole answers.

    Attributes:
        key: Question's id, and the place of the stage among those of the question.
        after: Question, and the text that all candidates follow.
        cluster: Images of the question, or where it has none, its id.
        texts: Different texts of the candidates, in the order of their first draws. Candidates of one text are one:
            where their values differ, that is luck.
    """

    key: Hashable
    after: tuple[str, str]
    cluster: Hashable
    texts: tuple[ValuedText, ...]


@dataclass(frozen=True)
class ScoredValues:
    """Values and scores of a verifier.

    Attributes:
        name: Name of the folder, as it was given.
        sha256: SHA-256 of its file.
        questions: Number of questions that have an answer.
        clusters: Number of groups of these that share an image.
        unanswered: Number of questions that have an error in the place of an answer, and are left out.
        unscored: Number of sets of candidates that have no scores, and are left out.
        parts: Candidates of each stage by its name, and of whole answers.
    """

    name: str
    sha256: str
    questions: int
    clusters: int
    unanswered: int
    unscored: int
    parts: Mapping[str, Sequence[CandidateGroup]]


def read_values(name: str) -> ScoredValues:
    """Read the values and scores in a folder that ``rollout`` has written.

    Args:
        name: Path of the folder.

    Raises:
        UserError: The folder has no such file, a line is none of it, two questions have the same id, or no candidate
            has a score.
    """
    path = as_path(name) / _VALUES
    if not path.is_file():
        raise UserError(f"{path} does not exist: --values takes folders that llava-cot rollout has written")
    with reading_errors(path):
        content = path.read_bytes()
    known: dict[Hashable, Hashable] = {}
    parts: dict[str, list[CandidateGroup]] = {}
    unanswered = unscored = 0
    for place, row in json_lines(path, content):
        if "error" in row:
            unanswered += 1
            continue
        try:
            _check_question(row)
            if row["id"] in known:
                raise UserError(f"the id {shown(row['id'])} is that of an earlier line")
            known[row["id"]] = cluster_of(row)
            for part, group in _groups_of(row):
                if group is None:
                    unscored += 1
                else:
                    parts.setdefault(part, []).append(group)
        except UserError as fault:
            raise UserError(f"{place}: {fault}") from None
    if not known:
        raise UserError(f"{path} has no question with an answer")
    if not parts:
        raise UserError(f"{path} has no scores: let a verifier score the candidates of the rollout")
    parts |= {WHOLE_ANSWERS: parts.pop(WHOLE_ANSWERS)} if WHOLE_ANSWERS in parts else {}  # after all stages
    digest = hashlib.sha256(content).hexdigest()
    return ScoredValues(name, digest, len(known), len(set(known.values())), unanswered, unscored, parts)


def _check_question(row: Mapping[str, Any]) -> None:
    for key in ("id", "question", "images", "stages", "answers"):
        if key not in row:
            raise UserError(f"there is no {key}, which each line of a rollout has")
    if isinstance(row["id"], bool) or not isinstance(row["id"], str | int):
        raise UserError(f"id is {shown(row['id'])}; it must be a text or a whole number")
    check_text("question", row["question"])
    if not isinstance(row["images"], list) or not all(isinstance(image, str) for image in row["images"]):
        raise UserError(f"images is {shown(row['images'])}; it must be a list of texts")


def _groups_of(row: Mapping[str, Any]) -> Iterator[tuple[str, CandidateGroup | None]]:
    """Yield the candidates of each stage and the whole answers with the part's name; None where they have no scores."""
    sets: list[tuple[str, str, list[dict[str, Any]]]] = []
    for stage in _objects("stages", row["stages"]):
        for key in ("stage", "before"):
            check_text(f"{key} of a stage", stage.get(key))
        sets.append((stage["stage"], stage["before"], _objects("candidates", stage.get("candidates"))))
    answers = _objects("answers", row["answers"])
    sets.append((WHOLE_ANSWERS, "", [answer | {"value": _value_of(answer)} for answer in answers]))
    for i, (part, before, candidates) in enumerate(sets):
        if candidates:
            texts = _texts_of(part, candidates)
            yield (
                part,
                CandidateGroup((row["id"], i), (row["question"], before), cluster_of(row), texts) if texts else None,
            )


def _objects(name: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise UserError(f"{name} is {shown(value)}; it must be a list of objects")
    return value


def _value_of(answer: Mapping[str, Any]) -> float:
    if not isinstance(is_right := answer.get("right"), bool):
        raise UserError(f"right of a whole answer is {shown(is_right)}; it must be true or false")
    return float(is_right)


def _texts_of(part: str, candidates: Sequence[Mapping[str, Any]]) -> tuple[ValuedText, ...] | None:
    """Return the different texts of candidates; None where these have no scores."""
    has_score = [candidate.get("score") is not None for candidate in candidates]
    if any(has_score) != all(has_score):
        raise UserError(f"{sum(has_score)} of {len(candidates)} candidates of {part} have a score: score all or none")
    has_log_prob = part != WHOLE_ANSWERS or any("mean_log_prob" in candidate for candidate in candidates)
    drawn: dict[str, list[Mapping[str, Any]]] = {}
    for candidate in candidates:
        check_text(f"text of {part}", candidate.get("text"))
        _check_share(part, candidate, "value")
        if has_log_prob:
            check_number(f"mean_log_prob of {part}", candidate.get("mean_log_prob"))
        if all(has_score):
            _check_share(part, candidate, "score")
            # It is one less the others, which may be rounded below 0.
            check_number(f"other_probability of {part}", candidate.get("other_probability"))
        check_int(f"draws of {part}", draws := candidate.get("draws", 1))
        drawn.setdefault(candidate["text"], []).extend([candidate] * draws)
    if not all(has_score):
        return None
    return tuple(_valued_text(text, draws, has_log_prob=has_log_prob) for text, draws in drawn.items())


def _check_share(part: str, candidate: Mapping[str, Any], key: str) -> None:
    value: Any = candidate.get(key)
    check_number(f"{key} of {part}", value)
    if not 0 <= value <= 1:
        raise UserError(f"{key} of {part} is {shown(value)}; it must be from 0 to 1")


def _valued_text(text: str, draws: Sequence[Mapping[str, Any]], *, has_log_prob: bool) -> ValuedText:
    def mean(key: str) -> float:
        return fsum(draw[key] for draw in draws) / len(draws)

    log_prob = mean("mean_log_prob") if has_log_prob else None
    return ValuedText(text, len(draws), mean("value"), mean("score"), mean("other_probability"), log_prob)
