"""The thread that owns jax: what it reports, what survives a failure, and what it lets go."""

from collections import defaultdict

import jax
import pytest

from llava_cot_jax.search.reasoner import Reasoner
from llava_cot_jax.search.request_builder import RequestBuilder
from llava_cot_jax.search.strategies import MajorityVote, Sample
from llava_cot_jax.search.stream import Question
from llava_cot_jax.serving import engine as module
from llava_cot_jax.serving.engine import AnsweringEngine, EngineSettings
from llava_cot_jax.serving.orders import Answered, Drop, Forget, NoAnswer, OrderQueue, Stop, Task
from tests.search.models import random_model
from tests.serving.servers import user

PLAIN, VOTE = Sample(1.0, 12, None, 1.0), MajorityVote(2, 1.0, 12, None, 1.0)

pytestmark = pytest.mark.slow


class Harness:
    """An engine in this thread, with orders that are given before it runs."""

    def __init__(self, model, processor, *, survives: bool = True) -> None:
        self.orders, self.reports = OrderQueue(), defaultdict(list)
        self.on_report = lambda number: None
        settings = EngineSettings(slots=2, prompt_tokens=64, images=0, survives=survives)

        def deliver(number, report) -> None:
            self.reports[number].append(report)
            self.on_report(number)

        self.engine = AnsweringEngine(model, lambda s: RequestBuilder(processor, s), settings, self.orders, deliver)

    def ask(self, number: int, strategy=PLAIN, text: str = "What?") -> None:
        self.orders.give(Task(number, strategy, [user(text)], seed=number))

    def run(self, count: int) -> None:
        """Run until so many questions have a last report."""
        kinds = (Answered, NoAnswer)

        def stop_at_the_end(number: int) -> None:
            if sum(isinstance(each[-1], kinds) for each in self.reports.values()) == count:
                self.orders.give(Stop())

        self.on_report = stop_at_the_end
        self.engine.run()


@pytest.fixture(scope="module")
def small():
    return random_model(1, eos=tuple(range(0, 500, 60)))


def test_several_searches_side_by_side(small):
    """Each question has its own answer, one that cannot be encoded its error, and one that was dropped nothing."""
    harness = Harness(*small)
    for number in range(1, 9):
        harness.ask(number, VOTE if number % 2 else PLAIN)
    harness.ask(9, text="word " * 1500)
    harness.orders.give(Drop(8))
    harness.run(8)
    assert sorted(harness.reports) == [*range(1, 8), 9]
    for strategy, numbers in ((VOTE, (1, 3, 5, 7)), (PLAIN, (2, 4, 6))):
        asked = [Question([user("What?")], seed=number) for number in numbers]
        expected = Reasoner(*small, strategy).answer_stream(asked, slots=2, prompt_tokens=64)
        assert [harness.reports[n][-1].answer.text for n in numbers] == [each.answer.text for each in expected]
    (refused,) = harness.reports[9]
    assert refused.is_mistake and "tokens" in refused.message


def test_a_search_that_fails_begins_anew(small, monkeypatch, warnings_of):
    """All who wait for it are told, the other search goes on, and the next question is answered."""
    harness, real = Harness(*small), module.GrowingSlots.begin_decoding
    calls = []

    def fail_once(self, max_steps=None):
        calls.append(self)
        if len(calls) == 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4096 bytes.")
        return real(self, max_steps)

    monkeypatch.setattr(module.GrowingSlots, "begin_decoding", fail_once)
    for number in (1, 2, 3):
        harness.ask(number)
    harness.ask(4, VOTE)
    harness.run(4)
    harness.ask(5)
    harness.run(5)
    for number in (1, 2, 3):
        (failure,) = harness.reports[number]
        assert not failure.is_mistake and "memory" in failure.message
    assert isinstance(harness.reports[4][0], Answered) and isinstance(harness.reports[5][0], Answered)
    assert "RESOURCE_EXHAUSTED" in warnings_of.text


def test_a_failure_ends_processes_that_share_a_model(small, monkeypatch):
    def fail(self, max_steps=None):
        raise RuntimeError("broken")

    harness = Harness(*small, survives=False)
    monkeypatch.setattr(module.GrowingSlots, "begin_decoding", fail)
    harness.ask(1)
    with pytest.raises(RuntimeError, match="broken"):
        harness.run(1)


def test_what_is_forgotten_is_freed(small):
    harness = Harness(*small)
    before = sum(x.nbytes for x in jax.live_arrays())
    harness.ask(1)
    harness.run(1)
    held = sum(x.nbytes for x in jax.live_arrays())
    harness.orders.give(Forget(PLAIN))
    harness.orders.give(Stop())
    harness.reports.clear()
    harness.engine.run()
    assert held > before + 10_000
    assert sum(x.nbytes for x in jax.live_arrays()) <= before + 10_000
