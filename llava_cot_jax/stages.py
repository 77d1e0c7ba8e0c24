"""The four stages of an answer, how they are found in its text, and when two answers count as the same."""

import re
import string
from dataclasses import dataclass

from llava_cot_jax.checks import check_text

STAGES = ("SUMMARY", "CAPTION", "REASONING", "CONCLUSION")
"""LLaVA-CoT's stages in their order. Each is enclosed in ``<NAME>`` and ``</NAME>``."""


@dataclass(frozen=True)
class Stage:
    """A stage of a text.

    Attributes:
        start: Position of the opening tag, in characters.
        end: Position after the closing tag, or where the stage ends without one.
        body: Text between the tags, without the space around it.
        closed: Whether the closing tag is there.
    """

    start: int
    end: int
    body: str
    closed: bool


def locate_stages(text: str) -> dict[str, Stage]:
    """Return each stage of ``text`` that was opened, by name and in order.

    A stage that was never closed reaches to the next stage's opening tag, or to the end of the text. A stage counts
    once and in its order: a tag that is repeated or out of order is text.
    """
    found: dict[str, Stage] = {}
    position = 0
    for i, name in enumerate(STAGES):
        start = text.find(f"<{name}>", position)
        if start < 0:
            continue
        inside = start + len(f"<{name}>")
        later = "".join(f"|(?=<{n}>)" for n in STAGES[i + 1 :])
        stop = re.compile(rf"</{name}>{later}|\Z").search(text, inside)
        assert stop is not None  # \Z always matches
        position = stop.end()
        found[name] = Stage(start, position, text[inside : stop.start()].strip(), closed=bool(stop.group()))
    return found


def find_stages(text: str) -> dict[str, str]:
    """Return the body of each stage of ``text`` that was opened, as ``locate_stages`` finds it.

    Raises:
        UserError: ``text`` is no text.
    """
    check_text("text", text)
    return {name: stage.body for name, stage in locate_stages(text).items()}


def find_conclusion(text: str) -> str:
    """Return the body of the conclusion of a whole answer, or the whole text of an answer without one."""
    return find_stages(text).get("CONCLUSION", text.strip())


def normalize_answer(text: str) -> str:
    """Return an answer without case, spacing, and punctuation at its ends. Punctuation alone stays."""
    spaced = " ".join(text.casefold().split())
    return spaced.strip(string.punctuation + string.whitespace) or spaced


def is_staged(text: str) -> bool:
    """Whether ``text`` has all four stages in order, each one closed."""
    stages = locate_stages(text)
    return len(stages) == len(STAGES) and all(stage.closed for stage in stages.values())


def may_be_staged(text: str) -> bool:
    """Whether ``text``, the beginning of an answer, opens a stage or may yet do so."""
    start = text.lstrip()
    return any(f"<{name}>".startswith(start[: len(name) + 2]) for name in STAGES)
