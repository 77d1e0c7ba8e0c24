"""Rejection sampling with this project's own model: what is sampled next for a row, given the candidates so far."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_cot_jax.annotation.checking import (
    Fault,
    Problem,
    fault_of_form,
    fits_standard_answer,
    plain_conclusion,
    staged_text,
)
from llava_cot_jax.annotation.outcomes import FailedTry, RowOutcome, RowSteps, request_key
from llava_cot_jax.annotation.rows import RowToAnnotate, TurnToAnnotate
from llava_cot_jax.processing.messages import Message, user_message

_SEEDS = 2**32


@dataclass(frozen=True)
class SampleRequest:
    """Request for candidates of the answer to a turn. The standard answer is not shown.

    Attributes:
        row: Row that it is about.
        turn: Index of the turn.
        attempt: Index of the try.
        messages: Conversation that ends with the question.
        settings: All else that the candidates depend on.
    """

    row: RowToAnnotate
    turn: int
    attempt: int
    messages: tuple[Message, ...]
    settings: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Digest of everything that the candidates depend on. Images count by their names, sizes and checksums."""
        images = [image.identity for image in self.row.images]
        return request_key(dict(self.settings), self.about, self.messages, images)

    @property
    def about(self) -> dict[str, Any]:
        """Row, turn, try and kind."""
        return {"row": self.row.id, "turn": self.turn + 1, "try": self.attempt + 1, "kind": "sample"}

    @property
    def seed(self) -> int:
        """Seed of the draws, so that hardly any two requests share theirs."""
        drawn = repr((self.settings["seed"], self.row.id, self.turn, self.attempt)).encode()
        return int.from_bytes(hashlib.sha256(drawn).digest()[:4]) % _SEEDS


def sample_for_row(row: RowToAnnotate, settings: Mapping[str, Any], tries: int) -> RowSteps:
    """Yield the requests for candidates of a row, each of which waits for its reply, and return the outcome.

    A reply is a dict with ``candidates``, each with ``text``, ``score`` and ``mean_log_prob``, or with ``error``. Of
    the candidates whose form is right and whose conclusion agrees with the standard answer, the one with the highest
    score is kept, of equal ones that with the highest mean log-probability.

    Args:
        row: The row.
        settings: All that the candidates depend on, besides the conversation; ``seed`` is one of them.
        tries: Largest number of times that candidates are sampled for a turn.
    """
    if row.fault:
        return RowOutcome.of_unusable(row)
    outcome = RowOutcome()
    for turn, asked in enumerate(row.turns):
        messages = _conversation(row, outcome.kept, turn)
        for attempt in range(tries):
            reply = yield SampleRequest(row, turn, attempt, messages, settings)
            if "error" in reply:
                outcome.failed.append(FailedTry(turn, Fault(Problem.QUESTION, reply["error"]), ""))
                break
            best, fault = _best(reply["candidates"], asked)
            if fault is None:
                outcome.kept[turn] = staged_text(best)
                break
            outcome.failed.append(FailedTry(turn, fault, best))
    return outcome


def _conversation(row: RowToAnnotate, kept: Mapping[int, str], turn: int) -> tuple[Message, ...]:
    """Return the messages that ask the question of a turn, after the turns that were kept."""
    messages: list[Message] = []
    for asked in (*kept, turn):
        messages.append(user_message(row.asked(asked), 0 if messages else len(row.images)))
        if asked in kept:
            messages.append({"role": "assistant", "content": kept[asked]})
    return tuple(messages)


def _best(candidates: Sequence[Mapping[str, Any]], asked: TurnToAnnotate) -> tuple[str, Fault | None]:
    """Return the text of the best candidate that agrees, or of the best of all with what is wrong with it."""
    ranked = sorted(candidates, key=lambda each: (each["score"], each["mean_log_prob"]), reverse=True)
    faults = [_fault_of(each["text"], asked) for each in ranked]
    # Another conclusion is nearer to an answer than another form.
    places = sorted(range(len(ranked)), key=lambda i: (faults[i] is not None, _is_of_form(faults[i])))
    return ranked[places[0]]["text"], faults[places[0]]


def _is_of_form(fault: Fault | None) -> bool:
    return fault is not None and fault.kind != Problem.CONCLUSION


def _fault_of(text: str, asked: TurnToAnnotate) -> Fault | None:
    if fault := fault_of_form(text):
        return fault
    conclusion = plain_conclusion(text)
    if fits_standard_answer(conclusion, asked):
        return None
    answers = " or ".join(map(str, asked.answers))
    return Fault(Problem.CONCLUSION, f"its conclusion {conclusion!r} is not the standard answer {answers!r}")
