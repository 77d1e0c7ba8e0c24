"""Outcome of a row: the answers that are kept, the turns that are rejected, and why."""

import hashlib
import json
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, Protocol

from llava_cot_jax.annotation.checking import Fault, Problem
from llava_cot_jax.annotation.rows import RowToAnnotate

REFUSED, UNUSABLE, FAILED = "refused", "image", "failed"
"""Ends of a reply that stand for none: the endpoint refused the request, an image cannot be sent, or a try failed."""


class RowRequest(Protocol):
    """Request about a row whose reply is kept in a journal."""

    @property
    def key(self) -> str:
        """Digest of everything that the reply depends on."""

    @property
    def about(self) -> dict[str, Any]:
        """Words by which a reader of the journal finds the request: its row, turn, try and kind."""


RowSteps = Generator[Any, dict[str, Any], "RowOutcome"]
"""Requests about a row, one after the other, each of which waits for the reply; then the outcome."""


@dataclass(frozen=True)
class FailedTry:
    """Try that was not kept.

    Attributes:
        turn: Index of the turn.
        fault: What is wrong with it.
        reply: Text of the reply; of several, that which came closest.
    """

    turn: int
    fault: Fault
    reply: str


@dataclass
class RowOutcome:
    """Outcome of a row.

    Attributes:
        kept: Answers that are kept, by the index of the turn.
        failed: Tries that were not kept, in their order, also of turns of which a later try was.
    """

    kept: dict[int, str] = field(default_factory=dict)
    failed: list[FailedTry] = field(default_factory=list)

    @classmethod
    def of_unusable(cls, row: RowToAnnotate) -> "RowOutcome":
        """Return the outcome of a row that cannot be asked."""
        fault = Fault(Problem.IMAGE, row.fault)
        return cls(failed=[FailedTry(turn, fault, "") for turn in range(len(row.turns))])

    def rejected(self, row: RowToAnnotate) -> list[dict[str, Any]]:
        """Return what the file of rejected turns has of a row: a row for each of its turns that has no answer."""
        rows = []
        for turn, asked in enumerate(row.turns):
            if turn in self.kept:
                continue
            failed = [each for each in self.failed if each.turn == turn]
            answers = list(asked.answers)
            rows.append(
                {
                    "id": row.id,
                    "turn": turn + 1,
                    "question": asked.question,
                    "answer": answers[0] if len(answers) == 1 else answers,
                    "reason": failed[-1].fault.kind.value,
                    "detail": failed[-1].fault.text,
                    "tries": [{"reason": each.fault.kind.value, "reply": each.reply} for each in failed],
                }
            )
        return rows


def request_key(*parts: Any) -> str:
    """Return a digest of 32 hexadecimal digits of what JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
