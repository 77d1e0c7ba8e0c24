"""Checks of a reply: that it has the form of a staged answer, and that its conclusion agrees with a standard answer."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from llava_cot_jax.annotation.rows import TurnToAnnotate
from llava_cot_jax.checks import check_text
from llava_cot_jax.errors import UserError
from llava_cot_jax.evaluation.matching import RightAnswer, form_of, without_marks
from llava_cot_jax.processing.control_tokens import CONTROL_TOKEN
from llava_cot_jax.stage_format import LLAVA_COT, STAGES
from llava_cot_jax.stages import locate_stages, normalize_answer

_TAG = re.compile(rf"</?({'|'.join(STAGES)})>")

_QUOTES = " \"'`\u201c\u201d\u2018\u2019\u00ab\u00bb"

_QUOTED = re.compile(rf"[{_QUOTES}](.+)[{_QUOTES}]", re.DOTALL)

_STOPS = ".,;:!?"
"""Marks that end a sentence or a part of one."""

_ENDED = re.compile(r"(.*?)(?:[.,;:?]|(?<![\d)])(?<!\b\w)!)", re.DOTALL)
"""Text with such a mark. An exclamation mark after a number, a parenthesis or a single letter is a factorial."""

_SHOWN_CHARACTERS = 60


class Problem(StrEnum):
    """Kind of what is wrong with a reply."""

    MISSING = "missing section"
    ORDER = "wrong order"
    UNCLOSED = "section not closed"
    REPEATED = "repeated tag"
    OUTSIDE = "text outside"
    EMPTY = "empty section"
    CUT = "cut off"
    CHARACTERS = "unusable characters"
    REFUSAL = "refusal"
    CONCLUSION = "wrong conclusion"
    VERDICT = "unreadable verdict"
    REQUEST = "refused request"
    QUESTION = "unusable question"
    IMAGE = "unusable image"


@dataclass(frozen=True)
class Fault:
    """Reason why a reply cannot be used.

    Attributes:
        kind: Kind of the fault.
        text: What is wrong, as the end of a sentence.
    """

    kind: Problem
    text: str


def fault_of_form(reply: str) -> Fault | None:
    """Return what is wrong with the form of a reply, or None.

    It must have the four sections of LLaVA-CoT in order, each opened and closed once, none empty, and nothing but white
    space outside them.
    """
    try:
        check_text("the reply", reply)
    except UserError as fault:
        return Fault(Problem.CHARACTERS, str(fault))
    if token := CONTROL_TOKEN.search(reply):
        return Fault(Problem.CHARACTERS, f"it spells the control token {token[0]}")
    tags = [found[0] for found in _TAG.finditer(reply)]
    for name in STAGES:
        if f"<{name}>" not in tags:
            return Fault(Problem.MISSING, f"the section <{name}> is missing")
    if twice := next((tag for tag in tags if tags.count(tag) > 1), None):
        return Fault(Problem.REPEATED, f"the tag {twice} is there more than once")
    if [tag for tag in tags if not tag.startswith("</")] != [f"<{name}>" for name in STAGES]:
        return Fault(Problem.ORDER, f"the sections are in another order than {', '.join(STAGES)}")
    end = 0
    for name, stage in locate_stages(reply).items():
        if not stage.closed:
            return Fault(Problem.UNCLOSED, f"the section <{name}> is not closed by </{name}> before the next one")
        if outside := reply[end : stage.start].strip():
            return Fault(Problem.OUTSIDE, f"there is text before <{name}>: {_cut(outside)}")
        if not stage.body:
            return Fault(Problem.EMPTY, f"the section <{name}> is empty")
        end = stage.end
    if outside := reply[end:].strip():
        return Fault(Problem.OUTSIDE, f"there is text after </{STAGES[-1]}>: {_cut(outside)}")
    return None


def _cut(text: str) -> str:
    """Return the beginning of a text, on one line."""
    short = " ".join(text.split())
    return short if len(short) <= _SHOWN_CHARACTERS else f"{short[:_SHOWN_CHARACTERS]}..."


def staged_text(reply: str) -> str:
    """Return a reply without a fault of form as LLaVA-CoT-100k writes it: a space inside tags, a blank line between."""
    return "\n\n".join(f"<{name}> {stage.body} </{name}>" for name, stage in locate_stages(reply).items())


def plain_conclusion(reply: str) -> str:
    """Return the conclusion of a reply without a fault of form, without Markdown's emphasis."""
    return without_marks(locate_stages(reply)[LLAVA_COT.conclusion].body, LLAVA_COT)


def is_same_text(conclusion: str, turn: TurnToAnnotate) -> bool:
    """Whether a conclusion is a standard answer but for case, spacing, quotes at its ends, and a mark at its end."""
    return _bare(conclusion) in {_bare(str(answer)) for answer in turn.answers}


def _bare(text: str) -> str:
    """Return a text without what never changes its meaning: quotes around it, and a mark at its end.

    Other marks do: C# is not C, .5 and 5% are not 5, and A' is not A.
    """
    spaced = bare = " ".join(text.casefold().split())
    while found := _QUOTED.fullmatch(bare) or _ENDED.fullmatch(bare):
        bare = found[1].strip()
    return bare or spaced


def fits_standard_answer(conclusion: str, turn: TurnToAnnotate) -> bool:
    """Whether a conclusion agrees with a standard answer, compared as the form of the answer asks for it.

    It is the rule by which ``evaluate`` compares where a row names none.
    """
    return RightAnswer(turn.answers, form_of(turn.answers)).accepts(conclusion)


def _first_word(text: str) -> tuple[str, str]:
    """Return the first word of a text, without a number before it as in a list, and what follows the word."""
    found = re.match(r"\W*(?:\d+\W+)?(\w+)(?!/)(.*)", text, re.DOTALL)
    return (found[1], found[2]) if found else ("", "")


def fault_of_verdict(reply: str, words: Mapping[str, str], conclusion: str, answers: str) -> Fault | None:
    """Return what a verdict says is wrong with a conclusion, or None where it says that the meaning is the same.

    Args:
        reply: The verdict, whose first word counts, or the one after a label such as ``Verdict:``.
        words: First word of each verdict.
        conclusion: The conclusion.
        answers: The standard answers, as the model was told them.
    """
    reply = reply.encode(errors="replace").decode()  # half of a character can be neither sent nor written
    word, rest = _first_word(normalize_answer(without_marks(reply, LLAVA_COT)))
    if rest.startswith((":", " -", "\u2014")) and word not in words.values():  # a label
        word, rest = _first_word(normalize_answer(rest))
    rest = rest.lstrip(_QUOTES + _STOPS + "-\u2013\u2014")
    if word == words["same"]:
        return None
    if word == words["refusal"]:
        return Fault(Problem.REFUSAL, "its conclusion declines to answer")
    text = f"its conclusion {_cut(conclusion)!r} does not mean the same as the standard answer {_cut(answers)!r}"
    if word == words["different"]:
        return Fault(Problem.CONCLUSION, f"{text}{f' ({_cut(rest)})' if rest else ''}")
    return Fault(Problem.VERDICT, f"{text}, as far as a check could tell")
