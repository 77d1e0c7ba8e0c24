"""What a search did to an answer: searches whose candidates, winners and verdicts are set by hand."""

from dataclasses import replace

import pytest

from llava_cot_jax.search.answer_change import answer_change, first_conclusion
from llava_cot_jax.search.trace import StageTrace, Trace
from llava_cot_jax.stage_format import STAGES
from tests.search import traces


def whole(conclusions: list[str], winner: int) -> Trace:
    texts = [f"<REASONING> {i} </REASONING> <CONCLUSION> {each} </CONCLUSION>" for i, each in enumerate(conclusions)]
    candidates = [traces.candidate(text) for text in texts]
    return traces.make_trace([StageTrace("whole", candidates, [], [], winner)], "MajorityVote()")


def staged(*stages: tuple[list[str], int]) -> Trace:
    """Return a search by stages: the texts of each stage's candidates, and its winner."""
    return traces.make_trace(
        [
            StageTrace(name, [traces.candidate(f"{text} </{name}>") for text in texts], [], [], winner)
            for name, (texts, winner) in zip(STAGES, stages, strict=True)
        ]
    )


FIRST = (["a", "b"], 0)


@pytest.mark.parametrize(
    ("trace", "change"),
    [
        (whole(["four", "five"], 0), "kept"),
        (whole(["four", "five"], 1), "changed"),
        (whole(["four", "five", " Four."], 2), "kept"),  # another answer with the same conclusion
        (staged(FIRST, FIRST, FIRST, (["four", "five"], 0)), "kept"),
        (staged(FIRST, FIRST, FIRST, (["four", "five"], 1)), "changed"),
        (staged(FIRST, FIRST, FIRST, (["four", "Four."], 1)), "kept"),
        (staged(FIRST, (["a", "b"], 1), FIRST, (["four", "five"], 0)), "unknown"),
        (staged(FIRST, (["a", "a"], 1), FIRST, (["four", "five"], 1)), "changed"),  # two captions of one text
        (traces.retracing_trace(), "unknown"),
        (traces.sentence_trace(), "kept"),
        (traces.untagged_trace(), "kept"),
    ],
)
def test_what_a_search_did(trace, change):
    assert answer_change(trace) == change
    if change == "changed":
        assert first_conclusion(trace) == "four"


def test_another_sentence_is_another_path():
    trace = traces.sentence_trace()
    trace.stages[1] = replace(trace.stages[1], winner=1)
    assert answer_change(trace) == "unknown"


def test_conclusions_after_different_reasonings_are_not_compared():
    """Of a retracing search with one round, whose winners are the first but for the last."""
    summary, caption, reasoning, *_, conclusion = traces.retracing_trace().stages
    first, second, third = conclusion.candidates
    after = [replace(first, parent=0, parent_round=1), replace(second, parent=0, parent_round=1), third]
    reasonings = [replace(one, parent=0) for one in reasoning.candidates]
    stages = [summary, replace(caption, winner=0), replace(reasoning, candidates=reasonings, winner=0)]

    def ending(winner: int) -> Trace:
        return traces.make_trace([*stages, replace(conclusion, candidates=after, winner=winner)], "Retracing()")

    assert [answer_change(ending(winner)) for winner in range(3)] == ["kept", "changed", "unknown"]
