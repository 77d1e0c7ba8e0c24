"""Scorers of a user's own: the candidate that they prefer wins, and what they do wrong is said in one line."""

import itertools
import json
import math
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from llava_cot_jax.cli import CompilationCounter
from llava_cot_jax.errors import UserError
from llava_cot_jax.search import scorers as module
from llava_cot_jax.search.page import PageEntry, write_page
from llava_cot_jax.search.prompts import JudgePrompts
from llava_cot_jax.search.reasoner import Reasoner
from llava_cot_jax.search.scorers import Judge, LogProbability, OwnScorer, call_scorer
from llava_cot_jax.search.show import describe_search
from llava_cot_jax.search.strategies import BestOfN, StageBeam
from llava_cot_jax.stage_format import STAGES
from tests.search import brute_force
from tests.search.models import random_model, scene
from tests.tiers import in_tiers


@pytest.fixture(scope="module")
def ending():
    """A random model that often ends an answer: one token in sixty does."""
    return random_model(1, eos=tuple(range(0, 500, 60)))


def brightness(images, question, stage, texts):
    """Score texts by what depends on each argument, in an order that looks random."""
    base = sum(float(np.asarray(image).mean()) for image in images) + len(question) + len(stage)
    return [math.sin(base + sum(map(ord, text))) for text in texts]


def not_the_longest(images, question, stage, texts):
    """Give the longest text no number, and the others their length."""
    longest = max(map(len, texts))
    return np.array([math.nan if len(text) == longest else len(text) for text in texts], np.float32)


JUDGE = Judge("token")
STRATEGIES = {
    "whole answers": BestOfN(5, brightness, temperature=1.0, max_new_tokens=8),
    "stages": StageBeam(3, brightness, temperature=0.9, max_new_tokens=9),
    "a scorer for each stage": StageBeam(
        (3, 4, 2, 3), (brightness, JUDGE, LogProbability(), not_the_longest), temperature=0.9, max_new_tokens=8
    ),
    "by name, and nothing to choose": StageBeam(
        (1, 3), {"PLAN": brightness, "CONCLUSION": not_the_longest}, 1.0, 8, stages=("PLAN", "CONCLUSION")
    ),
}


@pytest.mark.parametrize("name", in_tiers(STRATEGIES, suite=["a scorer for each stage"]))
def test_a_search_with_own_scorers_is_that_of_brute_force(ending, prompts, name):
    """Two questions are answered together; the second has no image."""
    model, processor = ending
    strategy = STRATEGIES[name]
    (image, question), (_, other) = scene(3), scene(4)
    answers = Reasoner(model, processor, strategy, prompts).answer_batch([image, None], [question, other], seeds=[5, 6])
    for answer, *asked in zip(answers, (image, None), (question, other), (5, 6), strict=True):
        want = brute_force.search(model, processor, strategy, *asked, JudgePrompts.load(prompts))
        for stage, expected in zip(answer.trace.stages, want, strict=True):
            assert [c.text for c in stage.candidates] == [processor.decode(c.ids) for c in expected.candidates]
            assert [c.ended for c in stage.candidates] == [c.ended for c in expected.candidates]
            assert stage.winner == expected.winner
            votes = [v.vote for match in stage.matches for v in match.verdicts]
            assert votes == pytest.approx([v.vote for v in expected.verdicts], abs=1e-4)


@pytest.mark.slow
def test_what_a_scorer_is_given_and_what_the_trace_tells(ending, prompts, monkeypatch, tmp_path):
    calls, now = [], iter(range(0, 1000, 7))
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(now)))

    class Reward:
        def __call__(self, images, question, stage, texts):
            calls.append((images, question, stage, texts))
            return not_the_longest(images, question, stage, texts)

    image, question = scene(3)
    strategy = StageBeam(3, Reward(), temperature=0.9, max_new_tokens=9)
    answer = Reasoner(*ending, strategy, prompts).answer([image, image], question, seed=5)
    assert [(asked, stage) for _, asked, stage, _ in calls] == [(question, stage) for stage in STAGES]
    for given, *_ in calls:
        assert [each.mode for each in given] == ["RGB", "RGB"]
        np.testing.assert_array_equal(given[1], image.convert("RGB"))
    trace = answer.trace
    won = [texts[stage.winner] for stage, (*_, texts) in zip(trace.stages, calls, strict=True)]
    assert won[-1] == answer.text
    assert all(later.startswith(earlier + "\n\n<") for earlier, later in itertools.pairwise(won))
    for stage, (*_, texts) in zip(trace.stages, calls, strict=True):
        scores = [candidate.score for candidate in stage.candidates]
        longest = max(map(len, texts))
        assert scores == [None if len(text) == longest else len(text) for text in texts]
        assert scores[stage.winner] == max(score for score in scores if score is not None)
        assert stage.own_scorer.endswith("Reward") and stage.scorer_seconds == 7
    assert trace.seconds["scorer"] == 28
    assert "Reward, Reward" not in trace.strategy and "object at" not in trace.strategy
    json.loads(trace.to_json())
    with (tmp_path / "shown.txt").open("w") as file:
        Console(file=file, width=200).print(describe_search(trace))
    shown = (tmp_path / "shown.txt").read_text()
    assert shown.count("no score that is a number, so it loses") == sum(
        candidate.score is None for stage in trace.stages for candidate in stage.candidates
    )
    assert "has the highest score of" in shown and "which took 7.0 s" in shown
    write_page(tmp_path / "page.html", [PageEntry(trace, [image], None)], {})
    assert "so it loses" in (tmp_path / "page.html").read_text()


@pytest.mark.slow
def test_another_function_compiles_nothing(ending, prompts):
    """The first has the shapes of the test before."""
    image, question = scene(3)
    texts = []
    for sign in (1, -1):
        counter = CompilationCounter()
        strategy = StageBeam(3, lambda i, q, s, texts: [sign * len(t) for t in texts], 0.9, 9)  # noqa: B023
        texts.append(Reasoner(*ending, strategy, prompts).answer([image, image], question).text)
    assert counter.count == 0
    assert len(texts[0]) > len(texts[1])


def raises(images, question, stage, texts):
    raise ConnectionError("no route\nto the reward model")


RETURNED = "the scorer f, called in the stage CAPTION of question 2 \\(What colour\\?\\), returned "
WANTED = ": it must return a sequence of 3 numbers, one for each text$"
FAULTS = {
    "nothing": (None, f"{RETURNED}None{WANTED}"),
    "a number": (0.5, f"{RETURNED}0.5{WANTED}"),
    "too few": ([1.0, 2.0], f"{RETURNED}2 scores for 3 texts{WANTED}"),
    "too many": (np.ones(4), f"{RETURNED}4 scores for 3 texts{WANTED}"),
    "none at all": ([], f"{RETURNED}0 scores for 3 texts{WANTED}"),
    "texts": (["1", "2", "3"], f"{RETURNED}\\['1', '2', '3'\\], a list{WANTED}"),
    "booleans": ([True, False, True], f"{RETURNED}.*a list{WANTED}"),
    "a None": ([1.0, None, 2.0], f"{RETURNED}.*a list{WANTED}"),
    "a table": (np.ones((3, 1)), f"{RETURNED}a ndarray{WANTED}"),
    "ragged": ([[1], [1, 2], [3]], f"{RETURNED}.*a list{WANTED}"),
    "a generator": ((x for x in (1, 2, 3)), f"{RETURNED}a generator{WANTED}"),
    "a mapping": ({"a": 1, "b": 2, "c": 3}, f"{RETURNED}.*a dict{WANTED}"),
    "no number": ([math.nan] * 3, f"{RETURNED}no score that is a number: at least one candidate must have one$"),
    "infinity": ([1, math.inf, 2], f"{RETURNED}a score of infinity: the highest score must be a number$"),
}


def ask(function):
    def f(*given):
        return function(*given)

    f.__qualname__ = "f"
    return call_scorer(OwnScorer(f), [], "What\ncolour?", "CAPTION", ["a", "b", "c"], "question 2")


@pytest.mark.parametrize("name", FAULTS)
def test_scores_that_cannot_be_used(name):
    returned, message = FAULTS[name]
    with pytest.raises(UserError, match=message) as told:
        ask(lambda *_: returned)
    assert "\n" not in str(told.value)


def test_a_scorer_that_raises_is_named_with_its_exception():
    called = (
        "the scorer f, called in the stage CAPTION of question 2 (What colour?), raised ConnectionError: no route to"
    )
    with pytest.raises(UserError, match="raised") as told:
        ask(raises)
    assert str(told.value) == f"{called} the reward model"
    assert isinstance(told.value.__cause__, ConnectionError)


def test_an_interruption_is_no_fault_of_the_scorer():
    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(interrupted)


@pytest.mark.parametrize(
    ("returned", "scores", "winner"),
    [
        ([3, 1, 3], [3, 1, 3], 0),
        (np.array([1, 2, 0], np.int8), [1, 2, 0], 1),
        (jnp.array([0.5, 0.25, 1], jnp.bfloat16), [0.5, 0.25, 1], 2),
        ((math.nan, -5, -math.inf), [None, -5, None], 1),
    ],
)
def test_scores_of_several_types(returned, scores, winner):
    """Of equal scores the first wins; one that is NaN or minus infinity loses."""
    found = ask(lambda *_: returned)
    assert (found.scores, found.winner) == (scores, winner)


@pytest.mark.slow
def test_a_fault_of_a_scorer_ends_the_call_and_names_the_question(ending, prompts):
    def fails_at_the_caption(images, question, stage, texts):
        return [0.0] * (len(texts) - (stage == "CAPTION" and "second" in question))

    strategy = StageBeam(2, fails_at_the_caption, max_new_tokens=6)
    reasoner = Reasoner(*ending, strategy, prompts)
    with pytest.raises(
        UserError, match=r"in the stage CAPTION of question 2 \(The second\?\), returned 1 scores for 2"
    ):
        reasoner.answer_batch([None, None], ["The first?", "The second?"])
    assert reasoner.answer(None, "The first?").text  # nothing of the failed search is left behind
