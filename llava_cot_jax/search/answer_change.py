"""Whether a search changed an answer, as far as its trace tells."""

from typing import Literal

from llava_cot_jax.processing.probe import WHOLE_ANSWER
from llava_cot_jax.search.trace import CandidateTrace, Trace
from llava_cot_jax.stages import body_of, find_conclusion, normalize_answer

AnswerChange = Literal["changed", "kept", "unknown"]
"""Words for what a search did to an answer."""


def answer_change(trace: Trace) -> AnswerChange:
    """Return whether a search gives another conclusion than the first candidates, which nothing was chosen for.

    Two conclusions are the same where they differ in case, spacing, and punctuation at their ends alone.

    Returns:
        "changed" where the conclusions of the winner and of the first candidate differ, and both follow the same text;
        "kept" where these are the same, or the winners have the texts of the first candidates throughout; "unknown"
        where the search left the first candidate before the conclusion, in an earlier stage, in a sentence or by
        another round, as what it would have led to was never generated.
    """
    for place, number in trace.winners:
        stage = trace.stages[place]
        won, first = stage.candidates[number], stage.candidates[0]
        if stage.stage in (WHOLE_ANSWER, trace.format.conclusion):
            if won.text == first.text:
                return "kept"
            if (won.parent, won.parent_round) != (first.parent, first.parent_round):
                return "unknown"
            same = normalize_answer(conclusion_in(won, trace)) == normalize_answer(conclusion_in(first, trace))
            return "kept" if same else "changed"
        if won.text != first.text or stage.round > 1:
            return "unknown"
    return "kept"


def first_conclusion(trace: Trace) -> str:
    """Return the conclusion of the first candidate, of a search that has changed the answer."""
    stage = next(each for each in trace.stages if each.stage in (WHOLE_ANSWER, trace.format.conclusion))
    return conclusion_in(stage.candidates[0], trace)


def conclusion_in(candidate: CandidateTrace, trace: Trace) -> str:
    """Return the body of the conclusion of a candidate, which is a whole answer or a conclusion."""
    if trace.whole_text is not None:
        return find_conclusion(candidate.text, trace.format)
    return body_of(candidate.text + candidate.added, trace.format[trace.format.conclusion])
