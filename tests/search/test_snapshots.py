"""Snapshots of a search: the answer is the same bit for bit, nothing compiles again, and texts only grow."""

from dataclasses import replace

import jax
import pytest

from llava_cot_jax import UserError
from llava_cot_jax.cli import CompilationCounter
from llava_cot_jax.search import snapshots as module
from llava_cot_jax.search.reasoner import Reasoner
from llava_cot_jax.search.request_builder import RequestBuilder
from llava_cot_jax.search.retracing import Retracing
from llava_cot_jax.search.scorers import Judge, LogProbability
from llava_cot_jax.search.sentence_beam import SentenceBeam
from llava_cot_jax.search.slot_search import run_in_slots
from llava_cot_jax.search.snapshots import SearchSnapshot
from llava_cot_jax.search.strategies import BestOfN, Greedy, StageBeam
from llava_cot_jax.stage_format import StageFormat
from tests.search.models import random_model, scene
from tests.search.test_stream import STRATEGIES, plain
from tests.tiers import in_tiers

ALL = STRATEGIES | {
    "greedy": Greedy(40),
    "best of n": BestOfN(3, Judge(), 1.2, 20, top_p=1.0),
    "headings": StageBeam(3, LogProbability(), 1.0, 20, format=StageFormat.load("mulberry")),
}


@pytest.fixture(scope="module")
def ending():
    """A random model that often ends an answer."""
    return random_model(1, eos=tuple(range(0, 500, 60)))


def check_snapshots(told: list[SearchSnapshot], answer) -> None:
    """Check snapshots against the answer: stages as the trace has them, texts that grow to the trace's."""
    stages = answer.trace.stages
    before: dict[tuple[int, int], tuple[int, str]] = {}
    for snapshot in told:
        number = len(snapshot.finished)
        assert snapshot.finished == tuple(stages[:number])
        assert snapshot.stages == tuple(stage.stage for stage in stages)
        assert len(snapshot.candidates) in (0, len(stages[min(number, len(stages) - 1)].candidates))
        for i, candidate in enumerate(snapshot.candidates):
            final = stages[number].candidates[i]
            tokens, text = before.get((number, i), (0, ""))
            assert candidate.tokens >= tokens and candidate.text.startswith(text)
            assert final.tokens >= candidate.tokens and final.text.startswith(candidate.text)
            assert not candidate.ended or candidate == replace(final, score=None, other_probability=None)
            before[number, i] = (candidate.tokens, candidate.text)
    for number, stage in enumerate(stages):
        of_stage = [each for each in told if len(each.finished) == number and each.candidates]
        assert of_stage[-1].num_ended == len(stage.candidates)
    assert len(told[-1].finished) == len(stages) and not told[-1].candidates


def check_close(answer, expected) -> None:
    """Check that answers of different programs are the same but for rounding, by the bounds of ``test_search.py``."""
    assert (answer.text, answer.conclusion) == (expected.text, expected.conclusion)
    found, wanted = ((each.trace.to_dict() | {"seconds": None})["stages"] for each in (answer, expected))
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, one), other in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        bound = 2e-3 if path[-1].key == "log_prob" else 1e-4  # that is a sum over all tokens
        assert one == (pytest.approx(other, abs=bound) if isinstance(other, float) else other), path


@pytest.mark.parametrize("name", in_tiers(ALL, suite=["sample", "stages"]))
def test_an_answer_that_is_watched_is_the_same_bit_for_bit(ending, prompts, monkeypatch, name):
    """Snapshots of single steps and of several; only the first question compiles.

    The same compiled pieces without a bound give the same bits, and ``Reasoner.answer``, one program, the same but for
    rounding.
    """
    reasoner, builder, counts = Reasoner(*ending, ALL[name], prompts), RequestBuilder(ending[1], ALL[name], prompts), []
    for i, seconds in enumerate((-1.0, 1e9, -1.0)):  # each step takes longer, or none does
        monkeypatch.setattr(module, "_SECONDS", seconds)
        image, question = scene(i)
        told: list[SearchSnapshot] = []
        counter = CompilationCounter()
        answer = reasoner.answer(image, question, seed=i, on_progress=told.append)
        (unwatched,) = run_in_slots(ending[0], builder, builder.build([image], [question], i))
        counts.append(counter.count)
        assert plain(answer) == plain(unwatched)
        if name != "own scorers":  # which run in slots in any case
            check_close(answer, reasoner.answer(image, question, seed=i))
        check_snapshots(told, answer)
        steps = sum(max(c.tokens + (c.ended == "eos") for c in stage.candidates) - 1 for stage in answer.trace.stages)
        if seconds < 0 and name != "headings":  # of whose candidates not all tokens are kept
            assert len(told) >= steps + len(answer.trace.stages)
    assert counts[1:] == [0, 0]


@pytest.mark.slow
def test_what_raises_ends_the_search(ending, prompts):
    def refuse(*_):
        raise KeyError("no score")

    image, question = scene(0)
    reasoner, told = Reasoner(*ending, BestOfN(2, refuse, max_new_tokens=4), prompts), list[SearchSnapshot]()
    with pytest.raises(UserError, match=r"in the stage whole of question 1 .* raised KeyError: 'no score'"):
        reasoner.answer(image, question, on_progress=told.append)
    assert told and told[-1].num_ended == 2 and not told[-1].finished
    with pytest.raises(KeyError, match="no score"):
        reasoner.answer(image, question, on_progress=refuse)


@pytest.mark.parametrize("strategy", [SentenceBeam(), Retracing()])
def test_a_search_of_one_program_tells_no_progress(ending, prompts, strategy):
    reasoner = Reasoner(*ending, strategy, prompts)
    with pytest.raises(UserError, match=f"{type(strategy).__name__} runs as one program.*search with StageBeam"):
        reasoner.answer(None, "red?", on_progress=print)
