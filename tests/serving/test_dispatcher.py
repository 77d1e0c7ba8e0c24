"""How many answers and searches there may be at a time, and what becomes of a question that is dropped."""

import asyncio

import pytest

from llava_cot_jax.search.strategies import BestOfN, Greedy, Sample, StageBeam
from llava_cot_jax.serving.api_errors import ApiError
from llava_cot_jax.serving.dispatcher import Dispatcher
from llava_cot_jax.serving.orders import Drop, Forget, NoAnswer, Order, Task
from tests.serving.servers import user


def ready(most_answers: int = 4, most_searches: int = 2) -> tuple[Dispatcher, list[Order]]:
    given: list[Order] = []
    dispatcher = Dispatcher(given.append, most_answers=most_answers, most_searches=most_searches)
    with pytest.raises(ApiError, match="loading and compiling"):
        dispatcher.check()
    dispatcher.ready([Greedy()])
    return dispatcher, given


def ask(dispatcher: Dispatcher, strategy=None, seeds=(0,)):
    return dispatcher.ask(strategy or Greedy(), [user("?")], list(seeds), tells_stages=False)


FAILED = NoAnswer("the search has failed", is_mistake=False)


def test_answers_past_the_bound_are_refused_until_some_are_there():
    dispatcher, given = ready()
    asked = ask(dispatcher, seeds=(5, 6, 7))
    assert [(task.number, task.seed) for task in given if isinstance(task, Task)] == [(1, 5), (2, 6), (3, 7)]
    with pytest.raises(ApiError) as caught:
        ask(dispatcher, seeds=(1, 2))
    assert (caught.value.status, caught.value.code, caught.value.headers) == (
        429,
        "too_many_requests",
        {"Retry-After": "1"},
    )
    dispatcher.report(2, FAILED)
    assert dispatcher.unanswered == 2 and asyncio.run(asked.reports.get()) == (1, FAILED)
    ask(dispatcher, seeds=(1, 2))
    assert dispatcher.unanswered == 4 and not dispatcher.idle.is_set()


def test_more_choices_than_are_ever_given_are_no_reason_to_ask_again():
    dispatcher, _ = ready()
    with pytest.raises(ApiError, match="n is 5; the server gives at most 4 answers") as caught:
        ask(dispatcher, seeds=range(5))
    assert (caught.value.status, caught.value.headers) == (400, {})


def test_requests_that_are_being_read_count():
    """Their bodies take memory. One that cannot be read counts no longer."""
    dispatcher, _ = ready(most_answers=2)
    ask(dispatcher)
    with pytest.raises(ValueError, match="no JSON"), dispatcher.being_read():
        for attempt in (dispatcher.check, dispatcher.being_read().__enter__):
            with pytest.raises(ApiError) as caught:
                attempt()
            assert (caught.value.status, caught.value.code) == (429, "too_many_requests")
        raise ValueError("no JSON")
    ask(dispatcher)


def test_a_question_that_is_dropped_is_reported_no_more():
    dispatcher, given = ready()
    asked = ask(dispatcher, seeds=(0, 1))
    dispatcher.report(1, FAILED)
    dispatcher.drop(asked)
    dispatcher.drop(asked)  # at the end of every stream
    assert given[2:] == [Drop(2)]
    dispatcher.report(2, FAILED)  # which was on its way
    assert asked.reports.qsize() == 1 and dispatcher.idle.is_set()


def test_the_search_that_was_used_longest_ago_makes_room():
    dispatcher, given = ready()
    for number, strategy in enumerate((Sample(0.5), Greedy(), Sample(0.7)), 1):
        ask(dispatcher, strategy)
        dispatcher.report(number, FAILED)
    assert [order for order in given if isinstance(order, Forget)] == [Forget(Sample(0.5))]


def test_searches_that_are_used_are_not_forgotten():
    dispatcher, given = ready()
    ask(dispatcher)
    ask(dispatcher, StageBeam())
    with pytest.raises(ApiError, match="2 other searches are being used") as caught:
        ask(dispatcher, BestOfN())
    assert (caught.value.status, caught.value.code) == (429, "too_many_searches")
    assert dispatcher.unanswered == 2 and not [order for order in given if isinstance(order, Forget)]


def test_nothing_is_taken_once_it_stops():
    dispatcher, _ = ready()
    dispatcher.stop()
    dispatcher.ready([])
    with pytest.raises(ApiError, match="the server is stopping") as caught:
        ask(dispatcher)
    assert caught.value.status == 503 and caught.value.headers["Retry-After"] == "60"


def test_a_failure_is_told_to_all_who_wait():
    dispatcher, _ = ready()
    asked = ask(dispatcher, seeds=(0, 1))
    dispatcher.give_up()
    assert [asked.reports.get_nowait()[1].message for _ in range(2)] == ["the server has failed"] * 2
    assert dispatcher.idle.is_set()
