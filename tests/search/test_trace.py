"""A trace as JSON, and what it says of stages that the search closed."""

import json
from dataclasses import replace

import pytest

from llava_cot_jax.search.trace import Trace
from llava_cot_jax.stage_format import STAGES
from tests.search.traces import (
    HOSTILE,
    rationale_trace,
    sentence_trace,
    token_trace,
    untagged_trace,
    verified_trace,
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
