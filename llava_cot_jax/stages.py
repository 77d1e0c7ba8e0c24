"""The stages of an answer, how they are found in its text, and when two answers count as the same."""

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

from llava_cot_jax.checks import check_text
from llava_cot_jax.stage_format import LLAVA_COT, StageFormat, StageMarks


@dataclass(frozen=True)
class Stage:
    """A stage of a text.

    Attributes:
        start: Position of the opening, in characters.
        end: Position after the closing, or where the stage ends without one.
        body: Text between the two, without the space around it.
        closed: Whether the stage ended as its format has it: with its closing; or, in a format without one, before the
            next opening, or with the text where no stage can follow.
    """

    start: int
    end: int
    body: str
    closed: bool


def locate_stages(text: str, format: StageFormat = LLAVA_COT) -> dict[str, Stage]:
    """Return each stage of ``text``, the text of one turn, that was opened, by name and in order.

    A stage that was never closed reaches to a later stage's opening, or to the end of the text. A stage counts once and
    in its order: an opening or a closing that is repeated or out of order is text.
    """
    found: dict[str, Stage] = {}
    position = 0
    for i, stage in enumerate(format.stages):
        if i and stage.ask is not None:
            break
        start = text.find(stage.mark, position) if text else -1
        if start < 0:
            continue
        inside = start + len(stage.mark)
        later = format.later_marks(i)
        closing = (stage.closing or "").strip()
        patterns = [re.escape(closing)] if closing else []
        patterns += [f"(?={re.escape(mark)})" for mark in later]
        stop = re.compile("|".join([*patterns, r"\Z"])).search(text, inside)
        assert stop is not None  # \Z always matches
        position = stop.end()
        closed = bool(stop.group()) if closing else not later or position < len(text)
        found[stage.name] = Stage(start, position, text[inside : stop.start()].strip(), closed)
    return found


def find_stages(text: str, format: StageFormat = LLAVA_COT) -> dict[str, str]:
    """Return the body of each stage of ``text`` that was opened, as ``locate_stages`` finds it.

    Raises:
        UserError: ``text`` is no text.
    """
    check_text("text", text)
    return {name: stage.body for name, stage in locate_stages(text, format).items()}


def find_conclusion(text: str, format: StageFormat = LLAVA_COT) -> str:
    """Return the body of the conclusion of a whole answer, or the whole text of an answer without one."""
    return find_stages(text, format).get(format.conclusion, text.strip())


def join_stages(texts: Sequence[str]) -> str:
    """Return the text of an answer whose stages have these texts, with their tags."""
    return "\n\n".join(texts)


def body_of(text: str, stage: StageMarks) -> str:
    """Return the body of a stage whose text, up to its end, comes without the opening."""
    closing = (stage.closing or "").strip()
    return (text.partition(closing)[0] if closing else text).strip()


_SIGN = re.compile(r"([-<>]?)[$€£¥]?((?<!\.)\.)?$")
"""Sign of a number, and the point that it may begin with, at the end of what stands before its digits."""


def normalize_answer(text: str) -> str:
    """Return an answer without case, spacing, and punctuation at its ends. Punctuation alone stays.

    The sign of a number at the beginning stays, but for a plus, and so does the point of one that begins with it: "-$5"
    becomes "-5", and "$5" becomes "5".
    """
    spaced = " ".join(text.casefold().replace("\u2212", "-").split())
    plain = spaced.strip(string.punctuation + string.whitespace)
    if not plain[:1].isdigit():
        return plain or spaced
    before = _SIGN.search(spaced[: spaced.index(plain)])
    return f"{before[1]}{before[2] or ''}{plain}" if before else plain


def is_staged(text: str) -> bool:
    """Whether ``text`` has all stages of LLaVA-CoT's format in order, each one closed."""
    stages = locate_stages(text)
    return len(stages) == len(LLAVA_COT.stages) and all(stage.closed for stage in stages.values())


def may_be_staged(text: str, format: StageFormat = LLAVA_COT) -> bool:
    """Whether ``text``, the beginning of an answer, opens a stage or may yet do so."""
    start = text.lstrip()
    return any(stage.mark.startswith(start[: len(stage.mark)]) for stage in format.stages)


def without_partial_mark(body: str, stage: str, format: StageFormat) -> str:
    """Return the body of a stage that is still being written without the beginning of what may end it."""
    index = format.names.index(stage)
    ends = [(format.stages[index].closing or "").strip(), *format.later_marks(index)]
    for start in range(max(len(body) - max(map(len, ends)), 0), len(body)):
        if any(end.startswith(body[start:]) for end in ends):
            return body[:start].rstrip()
    return body
