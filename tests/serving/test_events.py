"""Events of a stream that no quick answer shows: those that keep it alive, and a failure in its middle."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.search.strategies import Greedy
from llava_cot_jax.serving import app as module
from llava_cot_jax.serving.dispatcher import Asked
from llava_cot_jax.serving.orders import NoAnswer, Report, StageWon
from llava_cot_jax.serving.replies import KEEP_ALIVE, LAST_EVENT, ReplyHeader
from llava_cot_jax.serving.searches import ChosenSearch
from tests.serving.test_chat_request import read
from tests.serving.test_replies import STAGED, whole


@pytest.fixture
def endpoint(monkeypatch) -> module.Endpoint:
    monkeypatch.setattr(module, "PING_SECONDS", 0.001)
    unused: Any = None
    processor = Processor.from_pretrained("shapes")
    return module.Endpoint(
        unused, (), processor, unused, unused, 0, 0, None, ThreadPoolExecutor(1), compilations=lambda: 0
    )


def events_of(endpoint: module.Endpoint, reports: list[Report]) -> list[bytes]:
    """Return the events of a stream whose first report is missing for a time, and whose others come at once."""

    async def collect() -> list[bytes]:
        asked, header = Asked(), ReplyHeader("chatcmpl-x", 0, "m", ChosenSearch("", Greedy()))
        events = []
        async for event in endpoint._events(asked, read(stream=True), header, await module._first_report(asked)):
            events.append(event)
            if event == KEEP_ALIVE and events.count(KEEP_ALIVE) == 2:
                for report in reports:
                    asked.reports.put_nowait((0, report))
        return events

    return asyncio.run(collect())


def test_a_stream_without_events_is_kept_alive(endpoint):
    role, *pings, first, rest, content, end, last = events_of(
        endpoint, [StageWon(["<SUMMARY> s </SUMMARY>"]), whole(STAGED)]
    )
    assert b'"role": "assistant"' in role and pings == [KEEP_ALIVE] * 2 and last == LAST_EVENT
    assert b'{"reasoning_content": "<SUMMARY> s </SUMMARY>"}' in first
    assert rb'{"reasoning_content": "\n\n<REASONING> r </REASONING>"}' in rest
    assert b'{"content": "two stars"}' in content and b'"finish_reason": "stop"' in end


def test_a_failure_in_the_middle_is_an_event(endpoint):
    """OpenAI's client raises an error for it."""
    reports = [StageWon(["<SUMMARY> s </SUMMARY>"]), NoAnswer("the search has failed", is_mistake=False)]
    *_, last = events_of(endpoint, reports)
    assert last.startswith(b'data: {"error": {"message": "the search has failed", "type": "server_error"')
