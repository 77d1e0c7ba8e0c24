"""A trace as JSON, and what it says of stages that the search closed."""

import json
from dataclasses import replace

import pytest

from llava_cot_jax.search.scorers import OwnScores
from llava_cot_jax.search.trace import Trace
from llava_cot_jax.stage_format import STAGES, StageFormat
from tests.search.traces import (
    HOSTILE,
    rationale_trace,
    retracing_trace,
    scored_trace,
    sentence_trace,
    token_trace,
    untagged_trace,
    verified_trace,
    weighted_trace,
    whole_trace,
)

MAKERS = [token_trace, rationale_trace, verified_trace, whole_trace, sentence_trace, untagged_trace]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("indent", [None, 1])
def test_json_has_the_whole_trace(make, indent):
    """Each field of each part is there by its name, and every text is the same."""
    trace = make()
    read = json.loads(trace.to_json(indent))
    assert read.keys() == Trace.__dataclass_fields__.keys()
    assert (read["question"], read["seed"], read["tokens"]) == (trace.question, trace.seed, trace.tokens)
    for stage, told in zip(trace.stages, read["stages"], strict=True):
        for parts, among in ((stage.candidates, "candidates"), (stage.checks, "checks"), (stage.matches, "matches")):
            for part, each in zip(parts, told[among], strict=True):
                plain = {name: value for name, value in vars(part).items() if name != "verdicts"}
                assert {name: each[name] for name in plain} == plain
    assert ("\n" in trace.to_json(indent)) == (indent is not None)
    assert rationale_trace().to_json().count(json.dumps(HOSTILE, ensure_ascii=False)[1:-1]) > 5


@pytest.mark.parametrize("make", [*MAKERS, retracing_trace, scored_trace, weighted_trace])
def test_a_trace_is_read_again(make):
    trace = make()
    assert Trace.from_dict(json.loads(trace.to_json())) == trace
    timeless = Trace.from_dict(json.loads(json.dumps(trace.without_seconds())))
    assert timeless == replace(trace, seconds={})


def test_a_trace_of_another_format_with_own_scores_is_read_again():
    mulberry = StageFormat.load("mulberry")
    trace = replace(scored_trace(), format=mulberry)
    trace.stages[0] = trace.stages[0].with_own_scores(OwnScores("mine", [0.5, None, 2.0], 1.5))
    content = json.loads(trace.to_json())
    assert content["format"] == "mulberry" and Trace.from_dict(content, mulberry) == trace
    assert Trace.from_dict(trace.without_seconds(), mulberry).stages[0].scorer_seconds == 0.0


def test_stages_that_the_search_closed():
    trace = token_trace()
    assert trace.forced_stages == {}
    for number, ended in ((1, "eos"), (3, "max_new_tokens")):
        stage = trace.stages[number]
        stage.candidates[stage.winner] = replace(stage.candidates[stage.winner], ended=ended)
    assert trace.forced_stages == {STAGES[1]: "eos", STAGES[3]: "max_new_tokens"}
    assert (
        sentence_trace().forced_stages == untagged_trace().forced_stages == whole_trace().forced_stages == {}
    )  # no stage was searched for
