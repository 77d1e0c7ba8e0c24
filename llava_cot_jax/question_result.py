"""Result of a question as ``generate`` tells it, with notes on what cut the answer off."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llava_cot_jax.search.strategies import SearchSpec
from llava_cot_jax.stage_format import StageFormat

if TYPE_CHECKING:
    from llava_cot_jax.search.answers import Answer
    from llava_cot_jax.search.trace import Trace

MORE_TOKENS = "give a higher --max_new_tokens for the rest, if the model's context holds it"
"""Remedy for an answer that was cut off."""

CUT_AT = {
    "max_new_tokens": ("the limit of new tokens", MORE_TOKENS),
    "max_sentences": ("the limit of sentences", "give a higher --max_sentences for the rest"),
    "context": ("what the prompt leaves of the model's context", "shorten the question for the rest"),
}
"""Where an answer is cut off, by what bounds its length, and the remedy."""


@dataclass
class QuestionResult:
    """The answer to a question.

    Attributes:
        text: The whole answer.
        conclusion: Body of its last stage, or the whole text of an answer without stages.
        stages: Body of each stage in the answer, by name.
        ended: Why the answer, or the last stage or sentence of a search, ended: "eos", "tag", "turn" where the format
            has it end with the model's turn, or "max_new_tokens" or "sentence" where it was cut off.
        tokens: Numbers of tokens, by what they are for: "prompt" and "new", or the parts of a search.
        seconds: Seconds by what they were spent on: "first_token" and "total", counted from the question on, or the
            parts of a search.
        forced_stages: Stages that the search closed itself, and why each ended: "eos" or "max_new_tokens".
        bounded_by: What bounds the length of the answer: "max_new_tokens"; "context" where no length was given and the
            prompt leaves less than the default of the model's context; or "max_sentences" where there are as many
            sentences as there may be.
    """

    text: str
    conclusion: str
    stages: dict[str, str]
    ended: str
    tokens: dict[str, int]
    seconds: dict[str, float]
    forced_stages: dict[str, str] = field(default_factory=dict)
    bounded_by: str = "max_new_tokens"

    def notes(self, format: StageFormat) -> list[str]:
        """Lines about an end that the reader of the answer should know of: a limit, or tags that a search added."""
        cut = [stage for stage, ended in self.forced_stages.items() if ended == "max_new_tokens"]
        left = [stage for stage in self.forced_stages if stage not in cut]
        notes, (place, remedy) = [], CUT_AT[self.bounded_by]
        if cut:
            notes.append(f"{', '.join(cut)} cut at {place}, and closed by the search: {remedy}")
        elif self.ended in ("max_new_tokens", "sentence") and not self.forced_stages:
            notes.append(f"the answer was cut at {place}: {remedy}")
        if left:
            missing = sorted({"a closing tag" if format[stage].closing else "the next heading" for stage in left})
            notes.append(f"{', '.join(left)} ended without {' or '.join(missing)}, which the search added")
        return notes


def result_of(answer: Answer, is_shrunk: bool) -> QuestionResult:
    """Return the answer of a search.

    Args:
        answer: The answer.
        is_shrunk: Whether the context left less than the default length.
    """
    trace, last = answer.trace, answer.trace.stages[-1]
    return QuestionResult(
        answer.text,
        answer.conclusion,
        answer.stages,
        last.candidates[last.winner].ended,
        trace.tokens,
        trace.seconds,
        trace.forced_stages,
        "context" if is_shrunk else "max_new_tokens",
    )


def has_all_sentences(trace: Trace, spec: SearchSpec) -> bool:
    """Return whether an answer has as many sentences as it may have, and fewer tokens than it may have."""
    written = sum(stage.candidates[stage.winner].tokens for stage in trace.stages)
    return len(trace.stages) == spec.max_sentences and written < spec.max_new_tokens[0]
