"""Failures that no right request shows: what they leave behind, and how they are told."""

import asyncio
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.search.strategies import Greedy
from llava_cot_jax.serving import engine as module
from llava_cot_jax.serving.api_errors import ApiError
from llava_cot_jax.serving.app import Endpoint
from llava_cot_jax.serving.dispatcher import Dispatcher
from llava_cot_jax.serving.engine import AnsweringEngine, EngineSettings, QuestionPool
from llava_cot_jax.serving.image_urls import ImageLoader
from llava_cot_jax.serving.orders import NoAnswer, OrderQueue, Stop, Task
from llava_cot_jax.stage_format import LLAVA_COT
from tests.serving.servers import user
from tests.serving.test_chat_request import read


class _Builder:
    """Builder of requests on a device whose memory is full."""

    def build(self, *_: Any) -> None:
        raise MemoryError


class _NoSlots:
    num_occupied = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass


class _Run:
    """Engine whose slots and builder are replaced, with what it reports."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "GrowingSlots", _NoSlots)
        self.orders, self.reports = OrderQueue(), {}
        unused: Any = None
        new_builder: Any = lambda strategy: _Builder()  # noqa: E731
        settings = EngineSettings(slots=2, prompt_tokens=64, images=0)
        self.engine = AnsweringEngine(unused, new_builder, settings, self.orders, self.reports.__setitem__)

    def ask(self, *numbers: int) -> None:
        for number in numbers:
            self.orders.give(Task(number, Greedy(), [user("?")], seed=0))


def test_a_question_that_cannot_be_encoded_is_not_lost(monkeypatch):
    """Else its client would wait for ever, and SIGTERM for it."""
    run = _Run(monkeypatch)
    run.ask(1, 2)
    run.orders.give(Stop())
    taken = run.orders.take(wait=False)
    monkeypatch.setattr(run.orders, "take", lambda wait: [taken.pop()] if len(taken) == 1 else [taken.pop(0)])
    run.engine.run()
    assert {number: type(report) for number, report in run.reports.items()} == {1: NoAnswer, 2: NoAnswer}


def test_what_has_failed_keeps_no_memory(monkeypatch):
    """When the next question comes, the caches of the search that failed are free, though the engine runs on."""
    run = _Run(monkeypatch)
    pools: list[weakref.ref[QuestionPool]] = []
    alive: list[bool] = []

    def fail(pool: QuestionPool) -> None:
        gc.collect()
        alive.extend(old() is not None for old in pools)
        pools.append(weakref.ref(pool))
        if len(pools) == 2:
            run.orders.give(Stop())
        else:
            run.ask(2)
        raise MemoryError

    monkeypatch.setattr(QuestionPool, "step", fail)
    run.ask(1)
    run.engine.run()
    assert alive == [False] and sorted(run.reports) == [1, 2]


def _endpoint(menu: Any, processor: Any = None) -> Endpoint:
    dispatcher = Dispatcher(lambda order: None, most_answers=4, most_searches=1)
    dispatcher.ready([])
    loader = ImageLoader(most=1, most_bytes=1 << 20, folder=None, fetches=False)
    return Endpoint(menu, (), processor, loader, dispatcher, 1 << 20, 0, None, ThreadPoolExecutor(1), lambda: 0)


def test_a_failure_of_the_server_has_the_form_of_an_error():
    def fail(chat: Any) -> None:
        raise RuntimeError("a secret")

    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(_endpoint(SimpleNamespace(choose=fail)).app(), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.post("/v1/chat/completions", json={"messages": [user("?")]})

    response = asyncio.run(post())
    assert response.status_code == 500
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "internal_error") and "secret" not in error["message"]


def test_an_error_can_quote_half_of_a_character():
    assert ApiError(400, "x", "a\udc80\nb").body["error"]["message"] == r"a\udc80 b"


def test_a_prompt_that_is_too_long_is_no_work_for_the_thread_that_owns_jax():
    """All others wait for that thread, and a body has room for a prompt of many megabytes."""
    endpoint = _endpoint(SimpleNamespace(format=LLAVA_COT), Processor.from_pretrained("shapes"))
    assert endpoint._load(read())
    with pytest.raises(ApiError, match=r"the prompt has \d+ tokens, more than the context of") as caught:
        endpoint._load(read(messages=[user("word " * 3000)]))
    assert (caught.value.status, caught.value.code) == (400, "invalid_value")
