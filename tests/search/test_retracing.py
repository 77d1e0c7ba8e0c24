"""The retracing search against one in plain Python, its rounds, its threshold, and what it refuses."""

import json

import jax
import pytest

from llava_cot_jax import generate
from llava_cot_jax.cli import CompilationCounter
from llava_cot_jax.errors import UserError
from llava_cot_jax.search import reasoner as module
from llava_cot_jax.search.prompts import JudgePrompts
from llava_cot_jax.search.reasoner import Reasoner
from llava_cot_jax.search.retracing import DEVIATIONS, Retracing, Threshold, read_threshold, reasoning_scores
from llava_cot_jax.search.retracing_search import search_retracing
from llava_cot_jax.stage_format import StageFormat
from llava_cot_jax.stages import STAGES
from tests.search.brute_force_retracing import RetracingSearch
from tests.search.models import random_model, scene
from tests.search.test_search import plain

SMALL = Retracing(captions=3, max_rounds=3, temperature=1.0, max_new_tokens=5, threshold=1.0)


@pytest.fixture(scope="module")
def ending():
    """A random model that often ends an answer: one token in sixty does."""
    return random_model(1, eos=tuple(range(0, 500, 60)))


def check_against_brute_force(monkeypatch, model, processor, strategy, prompts, image, question, seed):
    """Check that tokens, ends, scores, parents and winners are the same. Return the answer."""
    found = []

    def keep(*arguments, **static):
        found.append(search_retracing(*arguments, **static))
        return found[-1]

    monkeypatch.setattr(module, "search_retracing", keep)
    answer = Reasoner(model, processor, strategy, prompts).answer(image, question, seed=seed)
    want = RetracingSearch(model, processor, strategy, image, question, seed, JudgePrompts.load(prompts)).run()
    tokens = jax.device_get(found[0].candidates.tokens)
    rounds = [stage for pair in zip(want.captions, want.reasonings, strict=True) for stage in pair]
    expected = [[want.summary], *rounds, want.conclusions]
    assert len(answer.trace.stages) == len(expected)
    for index, (stage, others) in enumerate(zip(answer.trace.stages, expected, strict=True)):
        place = index if index + 1 < len(expected) else len(tokens) - 1
        for i, (one, other) in enumerate(zip(stage.candidates, others, strict=True)):
            assert tokens[place, 0, i, : one.tokens].tolist() == other.draws.ids, (index, i)
            assert one.ended == other.draws.ended
            assert one.log_prob == pytest.approx(other.draws.log_prob, abs=2e-3)
            if stage.stage != STAGES[0]:
                assert one.score == pytest.approx(other.score[0], abs=1e-4)
            if stage.stage == STAGES[2]:
                assert one.parent == other.parent
            if stage.stage == STAGES[3]:
                per_round = strategy.keep * strategy.reasonings
                assert (one.parent_round - 1) * per_round + one.parent == other.parent
    won = want.conclusions[want.winner]
    assert answer.trace.stages[-1].winner == want.winner
    reasoning = [one for stage in want.reasonings for one in stage][won.parent]
    told = answer.trace.path
    assert list(told) == list(STAGES) == list(answer.stages)
    assert told["REASONING"].log_prob == pytest.approx(reasoning.draws.log_prob, abs=2e-3)
    ids = [processor.decode(one.draws.ids) for one in (want.summary, reasoning, won)]
    assert [told[name].text for name in ("SUMMARY", "REASONING", "CONCLUSION")] == ids
    return answer


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [1.0, 0.0])
def test_a_random_model_searches_as_brute_force_does(ending, prompts, monkeypatch, threshold):
    """With the highest threshold it retraces as often as it may, with the lowest never."""
    strategy = Retracing(3, 2, 2, 3, threshold, 2, temperature=1.0, max_new_tokens=5)
    image, question = scene(3)
    answer = check_against_brute_force(monkeypatch, *ending, strategy, prompts, image, question, seed=5)
    rounds = [stage.round for stage in answer.trace.stages]
    assert rounds == ([0, 1, 1, 2, 2, 0] if threshold else [0, 1, 1, 0])
