"""Dialogue with an endpoint about a row: what is asked next, given the replies so far. Nothing is sent here."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from llava_cot_jax.annotation.checking import (
    Fault,
    Problem,
    fault_of_form,
    fault_of_verdict,
    is_same_text,
    plain_conclusion,
    staged_text,
)
from llava_cot_jax.annotation.outcomes import REFUSED, UNUSABLE, FailedTry, RowOutcome, RowSteps, request_key
from llava_cot_jax.annotation.prompts import AnnotationPrompts
from llava_cot_jax.annotation.rows import RowToAnnotate

IMAGE_PART = "image"
"""Type of the part of a message that stands for an image of the row, in order."""

SPELLS_KEY = "key"
"""End of a reply whose text is dropped, since it has the key of the endpoint in it."""

_FAULTS = {
    "length": Fault(Problem.CUT, "it was cut off at the largest length: be shorter"),
    "refusal": Fault(Problem.REFUSAL, "it declines to answer"),
    "content_filter": Fault(Problem.REFUSAL, "it was held back by a filter of contents"),
    SPELLS_KEY: Fault(Problem.CHARACTERS, "it has the key of the endpoint in it"),
}
"""Faults by the ends of a reply, as chat endpoints name them, and ``refusal`` where the model declines."""

_FINAL = (Problem.REQUEST, Problem.IMAGE)
"""Faults that another try cannot mend."""

_NO_TEXT = "(no text)"


@dataclass(frozen=True)
class ReplySettings:
    """Settings that a reply depends on.

    Attributes:
        model: Name of the model.
        max_new_tokens: Largest number of tokens of a reply.
        temperature: Temperature of sampling; None is the endpoint's default.
        max_side: Longest side in pixels of an image that is sent.
    """

    model: str
    max_new_tokens: int
    temperature: float | None
    max_side: int


@dataclass(frozen=True)
class DialogueRequest:
    """Request to a chat endpoint.

    Attributes:
        row: Row that it is about.
        turn: Index of the turn.
        attempt: Index of the try.
        kind: "answer", or "check" for the question whether a conclusion is right, and "second check" where the reply to
            that was no verdict.
        messages: Messages, in which an image is ``{"type": "image"}``.
        settings: Settings of the reply.
    """

    row: RowToAnnotate
    turn: int
    attempt: int
    kind: str
    messages: tuple[dict[str, Any], ...]
    settings: ReplySettings

    @property
    def key(self) -> str:
        """Digest of everything that the reply depends on. Images count by their names, sizes and checksums."""
        settings = self.settings
        images = [image.identity for image in self.row.images] if self.has_images else []
        given = [settings.model, settings.max_new_tokens, settings.temperature, settings.max_side]
        return request_key(given, self.about, self.messages, images)

    @property
    def about(self) -> dict[str, Any]:
        """Row, turn, try and kind."""
        return {"row": self.row.id, "turn": self.turn + 1, "try": self.attempt + 1, "kind": self.kind}

    @property
    def has_images(self) -> bool:
        """Whether the row's images are sent."""
        return any(isinstance(message["content"], list) for message in self.messages)


def ask_about_row(row: RowToAnnotate, prompts: AnnotationPrompts, settings: ReplySettings, tries: int) -> RowSteps:
    """Yield the requests about a row, each of which waits for its reply, and return the outcome.

    A reply is a dict with ``text`` and ``finish``. A turn of which no try is good is left out of the dialogue, and the
    next turn follows.

    Args:
        row: The row.
        prompts: Words of the requests.
        settings: Settings of the replies.
        tries: Largest number of answers that are asked for in a turn.
    """
    if row.fault:
        return RowOutcome.of_unusable(row)
    outcome = RowOutcome()
    for turn, asked in enumerate(row.turns):
        messages = _dialogue(row, prompts, outcome.kept, turn)
        for attempt in range(tries):
            reply = yield DialogueRequest(row, turn, attempt, "answer", tuple(messages), settings)
            text = reply["text"]
            fault = _fault_of_end(reply) or fault_of_form(text)
            if fault is None and not is_same_text(plain_conclusion(text), asked):
                fault = yield from _check_meaning(row, prompts, settings, turn, attempt, text)
            if fault is None:
                outcome.kept[turn] = staged_text(text)
                break
            outcome.failed.append(FailedTry(turn, fault, text))
            if fault.kind in _FINAL:
                break
            said = text.encode(errors="replace").decode().strip()  # half of a character cannot be sent
            messages += [_says("assistant", said or _NO_TEXT), _says("user", prompts.retry(fault.text))]
    return outcome


def _dialogue(row: RowToAnnotate, prompts: AnnotationPrompts, kept: dict[int, str], turn: int) -> list[dict[str, Any]]:
    """Return the messages that ask for the answer of a turn, after the turns that were kept."""
    messages = []
    for earlier, answer in kept.items():
        messages += [_says("user", row.asked(earlier)), _says("assistant", answer)]
    messages.append(_says("user", prompts.ask(row.asked(turn), row.turns[turn])))
    if row.images:
        parts = [{"type": IMAGE_PART} for _ in row.images]
        messages[0] = {"role": "user", "content": [*parts, {"type": "text", "text": messages[0]["content"]}]}
    return [_says("system", prompts.texts["system"]), *messages]


def _check_meaning(
    row: RowToAnnotate, prompts: AnnotationPrompts, settings: ReplySettings, turn: int, attempt: int, text: str
) -> Generator[DialogueRequest, dict[str, Any], Fault | None]:
    """Ask whether a conclusion is right, and return what is wrong with it, or None.

    It is asked once more where the reply is no verdict.
    """
    asked, conclusion = row.turns[turn], plain_conclusion(text)
    messages = (_says("user", prompts.check(row.asked(turn), asked, conclusion)),)
    answers = " or ".join(map(str, asked.answers))
    fault = None
    for kind in ("check", "second check"):
        reply = yield DialogueRequest(row, turn, attempt, kind, messages, settings)
        end = _fault_of_end(reply)
        if end and end.kind == Problem.REQUEST:
            return Fault(end.kind, f"its conclusion could not be checked: {end.text}")
        verdict = (
            "" if end and end.kind != Problem.CUT else reply["text"]
        )  # the first word of one that was cut is there
        fault = fault_of_verdict(verdict, prompts.verdicts, conclusion, answers)
        if fault is None or fault.kind != Problem.VERDICT:
            break
    return fault


def _fault_of_end(reply: dict[str, Any]) -> Fault | None:
    """Return what the end of a reply says is wrong with it, or None."""
    if reply["finish"] in (REFUSED, UNUSABLE):
        return Fault(Problem.REQUEST if reply["finish"] == REFUSED else Problem.IMAGE, reply["text"])
    return _FAULTS.get(reply["finish"])


def _says(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}
