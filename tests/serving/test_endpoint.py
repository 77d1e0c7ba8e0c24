"""A server that runs, asked by the real client of OpenAI and with the bodies that evaluation tools send.

Every answer is held to what ``Reasoner.answer_stream`` gives in this process for the same question and seed.
"""

import asyncio
import http.client
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
import requests
from PIL import Image

from llava_cot_jax.data.shapes.rows import ShapesRows
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.search.answers import Answer
from llava_cot_jax.search.reasoner import Reasoner
from llava_cot_jax.search.scorers import LogProbability
from llava_cot_jax.search.strategies import Greedy, StageBeam, Strategy
from llava_cot_jax.search.stream import Question
from llava_cot_jax.serving.replies import split_conclusion
from tests.serving.servers import KEY, Served, data_url, serving, user

pytestmark = pytest.mark.slow

ROOM = {"slots": 4, "prompt_tokens": 128, "images": 1}
BEAM = StageBeam(2, LogProbability(), temperature=1.3, max_new_tokens=40)
OPTIONS = ["--search", "stage_beam", "--num_candidates", "2", "--judge", "log_probability", "--max_new_tokens", "40"]
OPTIONS += ["--temperature", "1.3"]
OPTIONS += ["--searches", "greedy", "--slots", "4", "--prompt_tokens", "128", "--images", "1", "--max_body_mb", "1"]
OPTIONS += ["--max_requests", "70"]


@pytest.fixture(scope="module")
def server():
    with serving(*OPTIONS, LLAVA_COT_API_KEY=KEY) as served:
        early = requests.get(f"{served.root}/health", timeout=60)
        asked = post(served, {"model": "shapes", "messages": [user("?")]})
        assert (early.status_code, early.json()["status"]) == (503, "starting")
        assert (asked.status_code, code_of(asked), asked.headers["Retry-After"]) == (503, "starting", "2")
        served.wait_for("serving shapes")
        yield served


@dataclass(frozen=True)
class Reference:
    """Answers of this process."""

    model: Mllama
    processor: Processor

    def answers(self, asked: list[Question], strategy: Strategy = BEAM) -> list[Answer]:
        stream = Reasoner(self.model, self.processor, strategy).answer_stream(asked, **ROOM)
        return [each.answer for each in stream]


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(Mllama.from_pretrained("shapes"), Processor.from_pretrained("shapes"))


ROWS = ShapesRows("test", seed=3, size=64)


def picture(i: int) -> Image.Image:
    return ROWS[i].images[0]


def question(i: int) -> str:
    return ROWS[i].turns[0].question


def post(served: Served, body: Any, **headers: str) -> requests.Response:
    content = body if isinstance(body, bytes | str) else json.dumps(body)
    sent = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", **headers}
    return requests.post(f"{served.url}/chat/completions", data=content, headers=sent, timeout=120)


def code_of(response: requests.Response) -> str:
    """Return the code of an error, whose form is checked."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
    return error["code"]


def client(served: Served, **settings: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=served.url, api_key=KEY, max_retries=0, timeout=120, **settings)


def check_shape(body: dict[str, Any], choices: int = 1) -> None:
    """Check that an answer has all fields that a client may read."""
    assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-") and body["created"] > 0
    assert [choice["index"] for choice in body["choices"]] == list(range(choices))
    for choice in body["choices"]:
        assert choice["message"]["role"] == "assistant" and choice["message"]["content"].strip()
        assert choice["finish_reason"] in ("stop", "length") and "reasoning_content" in choice["message"]
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert 0 <= usage["completion_tokens_details"]["reasoning_tokens"] < usage["completion_tokens"]


def test_the_body_of_vlmevalkit(server, reference):
    """A JPEG, one choice, temperature 0 and 32,768 tokens. The search samples with its own temperature."""
    url = data_url(picture(0), "JPEG")
    body = {"model": "shapes", "messages": [user(question(0), url)], "n": 1, "max_tokens": 32768, "temperature": 0.0}
    found = post(server, body).json()
    check_shape(found)
    (answer,) = reference.answers([Question(question(0), url)])
    choice = found["choices"][0]
    assert choice["llava_cot"]["text"] == answer.text
    assert choice["message"]["content"] == answer.conclusion == split_conclusion(answer)[0]
    assert choice["message"]["reasoning_content"] == split_conclusion(answer)[1]
    assert found["llava_cot"]["ignored"] == ["temperature"]
    assert found["model"] == "shapes" and choice["finish_reason"] == "stop"
    assert found["usage"]["prompt_tokens"] == answer.trace.tokens["prompt"]
    assert found["usage"]["completion_tokens"] == sum(c.tokens for c in answer.trace.path.values())
    (unsure,) = ShapesRows("test", seed=0, size=1)[0].images  # the model hesitates to count its stars
    body |= {"messages": [user("How many stars are there?", data_url(unsure))], "trace": True, "n": 4}
    traced = post(server, body).json()["choices"]
    stages = [stage for choice in traced for stage in choice["llava_cot"]["trace"]["stages"]]
    assert max(len({c["text"] for c in stage["candidates"]}) for stage in stages) == 2  # they were sampled


def test_the_body_of_lmms_eval(server, reference):
    """A PNG and 16 tokens, which bound the conclusion alone: a staged answer takes more."""
    asked = {"model": "shapes", "messages": [user(question(1), data_url(picture(1)))], "temperature": 0}
    found = client(server).chat.completions.create(**asked, max_tokens=16)
    (answer,) = reference.answers([Question(question(1), picture(1))])
    assert found.choices[0].message.content == answer.conclusion
    assert found.choices[0].finish_reason == "stop" and found.usage.completion_tokens > 16
    assert found.choices[0].message.model_extra["reasoning_content"] == split_conclusion(answer)[1]


def test_the_body_of_evalscope_in_events(server, reference):
    """The stages come as they are won, then the conclusion, its end and the numbers of tokens."""
    message = user(question(2), data_url(picture(2)), detail="auto")
    asked = {"model": "shapes", "messages": [message], "temperature": 0.0, "seed": 42, "logprobs": False}
    events = list(client(server).chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    (answer,) = reference.answers([Question(question(2), picture(2), seed=42)])
    *parts, last = events
    deltas = [event.choices[0].delta for event in parts]
    reasoning = [text for delta in deltas if (text := (delta.model_extra or {}).get("reasoning_content"))]
    assert len(reasoning) == 3 and "".join(reasoning) == split_conclusion(answer)[1]
    assert "".join(delta.content or "" for delta in deltas) == answer.conclusion
    assert [event.choices[0].finish_reason for event in parts][-2:] == [None, "stop"]
    assert last.choices == [] and last.usage.total_tokens > last.usage.prompt_tokens > 0
    assert len({event.id for event in events}) == 1
    plain = client(server).chat.completions.create(**asked)
    assert plain.usage == last.usage and plain.choices[0].message.content == answer.conclusion


def test_events_are_those_of_the_standard(server):
    body = {"model": "shapes", "messages": [user(question(2), data_url(picture(2)))], "stream": True}
    response = post(server, body)
    assert response.headers["Content-Type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"} and "usage" not in chunks[-1]


def test_a_conversation_with_images_at_their_places(server, reference):
    """A message of the system, two turns, and a picture in the first: the texts go to the user's first message."""
    url = data_url(picture(3), "WEBP", lossless=True)
    messages = [
        {"role": "system", "content": "Look closely."},
        {"role": "user", "content": [{"type": "text", "text": "Here it is."}, *user("", url)["content"][:1]]},
        {"role": "assistant", "content": "I see it."},
        {"role": "user", "content": question(3)},
    ]
    found = client(server).chat.completions.create(model="shapes", messages=messages)
    image = {"type": "image", "image": picture(3)}
    first = [{"type": "text", "text": "Look closely.\n\n"}, {"type": "text", "text": "Here it is."}, image]
    asked = [{"role": "user", "content": first}, *messages[2:]]
    (answer,) = reference.answers([Question(asked)])
    assert found.choices[0].model_extra["llava_cot"]["text"] == answer.text


def test_choices_seeds_and_stops(server, reference):
    asked = {"model": "shapes", "messages": [user(question(5), data_url(picture(5)))]}
    found = client(server).chat.completions.create(**asked, n=3, seed=7, stop=["nothing that is there"])
    answers = reference.answers([Question(question(5), picture(5), seed=7 + i) for i in range(3)])
    assert [c.model_extra["llava_cot"]["text"] for c in found.choices] == [answer.text for answer in answers]
    check_shape(json.loads(found.model_dump_json()), 3)
    stop = answers[0].conclusion[1:]
    cut = client(server).chat.completions.create(**asked, seed=7, stop=stop).choices[0]
    assert (cut.message.content, cut.finish_reason) == (answers[0].conclusion[:1], "stop")


def test_a_search_by_the_name_of_the_model_or_by_a_field(server, reference):
    messages = [user(question(4), data_url(picture(4)))]
    (answer,) = reference.answers([Question(question(4), picture(4))], Greedy(128))
    named = client(server).chat.completions.create(model="shapes:greedy", messages=messages)
    given = client(server).chat.completions.create(model="shapes", messages=messages, extra_body={"search": "greedy"})
    for found in (named, given):
        assert found.choices[0].model_extra["llava_cot"]["text"] == answer.text
        assert found.model_extra["llava_cot"]["strategy"].startswith("Greedy(")
    assert [each.id for each in client(server).models.list()] == ["shapes", "shapes:greedy"]


def test_64_clients_at_a_time_are_all_answered(server, reference):
    async def ask_all() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=server.url, api_key=KEY, max_retries=0, timeout=300) as asking:
            requests_ = [
                asking.chat.completions.create(
                    model="shapes:greedy", messages=[user(question(i), data_url(picture(i)))], temperature=0
                )
                for i in range(64)
            ]
            return await asyncio.gather(*requests_)

    found = asyncio.run(ask_all())
    answers = reference.answers([Question(question(i), picture(i)) for i in range(64)], Greedy(128))
    assert [each.choices[0].model_extra["llava_cot"]["text"] for each in found] == [each.text for each in answers]
    assert len({answer.text for answer in answers}) > 50


REFUSED: dict[str, tuple[Any, int, str]] = {
    "no JSON": (b"{", 400, "invalid_json"),
    "a list": ([], 400, "invalid_json"),
    "an unknown model": ({"model": "gpt-4-1106-preview"}, 404, "model_not_found"),
    "an unknown search": ({"model": "shapes:best"}, 404, "model_not_found"),
    "a search that is not served": ({"search": "retracing"}, 400, "search_not_served"),
    "too many candidates": ({"search": "stage_beam-17"}, 400, "search_not_served"),
    "no messages": ({"messages": []}, 400, "invalid_value"),
    "an answer at the end": ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "invalid_value"),
    "a special token": ({"messages": [user("a <|image|> b")]}, 400, "invalid_value"),
    "a prompt that is too long": ({"messages": [user("word " * 1500)]}, 400, "invalid_value"),
    "no image": ({"messages": [user("?", "data:image/png;base64,aGVsbG8=")]}, 400, "invalid_image"),
    "a damaged image": ({"messages": [user("?", data_url(picture(0))[:-300])]}, 400, "invalid_image"),
    "a page of the network": ({"messages": [user("?", "http://localhost/x.png")]}, 400, "image_url_not_allowed"),
    "a file": ({"messages": [user("?", "file:///etc/passwd")]}, 400, "image_url_not_allowed"),
    "a path": ({"messages": [user("?", "/etc/passwd")]}, 400, "image_url_not_allowed"),
    "a temperature": ({"temperature": -1}, 400, "invalid_value"),
    "a stop": ({"stop": 3}, 400, "invalid_value"),
    "too many choices": ({"n": 17}, 400, "invalid_value"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_that_is_refused(server, name):
    body, status, code = REFUSED[name]
    whole = {"model": "shapes", "messages": [user("?")]} | body if isinstance(body, dict) else body
    response = post(server, whole)
    assert (response.status_code, code_of(response)) == (status, code)
    if isinstance(body, dict):  # a stream is refused by the same status, as nothing has been sent
        response = post(server, whole | {"stream": True})
        assert (response.status_code, code_of(response)) == (status, code)


def test_the_key_the_routes_and_the_size(server):
    body = {"model": "shapes", "messages": [user("?")]}
    for wrong in ("Bearer wrong", "", f"Basic {KEY}", "Bearer \u00e9"):
        response = post(server, body, Authorization=wrong.encode())  # type: ignore[arg-type]
        assert (response.status_code, code_of(response)) == (401, "invalid_api_key")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=server.url, api_key="wrong", max_retries=0).models.list()
    for method, path, status, code in (
        ("GET", "/v1/completions", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
    ):
        response = requests.request(method, server.root + path, timeout=60)
        assert (response.status_code, code_of(response)) == (status, code)
    large = {"model": "shapes", "messages": [user("x" * (5 << 20))]}
    response = post(server, large)
    assert (response.status_code, code_of(response)) == (413, "body_too_large")
    parts = iter([json.dumps(large).encode()])  # in chunks, so that no header tells the size
    headers = {"Authorization": f"Bearer {KEY}"}
    response = requests.post(f"{server.url}/chat/completions", data=parts, headers=headers, timeout=60)
    assert (response.status_code, code_of(response)) == (413, "body_too_large")


def health(served: Served) -> dict[str, Any]:
    return requests.get(f"{served.root}/health", timeout=60).json()


def wait_until_more_than(served: Served, unanswered: int) -> None:
    while health(served)["unanswered"] <= unanswered:
        assert served.process.poll() is None


def wait_until(served: Served, unanswered: int) -> None:
    """Wait until so many answers are waited for."""
    deadline = time.monotonic() + 60
    while health(served)["unanswered"] != unanswered:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def asking_for_16(served: Served, *, stream: bool = False) -> Iterator[None]:
    """Ask a question 16 times, four rounds of the slots, and close the connection at the end of the block."""
    place = urlsplit(served.url)
    leaving = http.client.HTTPConnection(place.hostname, place.port)
    body = {"model": "shapes", "messages": [user(question(0), data_url(picture(0)))], "n": 16, "stream": stream}
    leaving.request("POST", "/v1/chat/completions", json.dumps(body), {"Authorization": f"Bearer {KEY}"})
    yield
    leaving.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_not_answered(server, stream):
    """Once it is gone, none of its answers is waited for, and the slots are free."""
    with asking_for_16(server, stream=stream):
        wait_until(server, 16)
    wait_until(server, 0)
    found = client(server).chat.completions.create(model="shapes", messages=[user(question(0), data_url(picture(0)))])
    assert found.choices[0].message.content


def test_too_many_requests_are_sent_away(server):
    """Four requests for 16 answers each leave room for six more answers of the 70."""
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(asking_for_16(server))
        wait_until_more_than(server, 54)
        refused = post(server, {"model": "shapes", "messages": [user("?")], "n": 16})
    assert (refused.status_code, code_of(refused)) == (429, "too_many_requests")
    assert 1 <= int(refused.headers["Retry-After"]) <= 60
    wait_until(server, 0)


def test_nothing_was_compiled_for_any_request(server):
    """All those above that fit in the room. This test comes after them."""
    assert health(server)["compilations"] == 0


def test_what_was_begun_is_finished_after_sigterm(server):
    """Streams that have begun end with their conclusions, and requests that come later are sent away."""
    messages = [user(question(0), data_url(picture(0)))]
    asking, later = client(server), {"model": "shapes", "messages": messages}
    streams = [asking.chat.completions.create(**later, n=3, seed=i, stream=True) for i in range(4)]
    firsts = [next(iter(stream)) for stream in streams]
    os.kill(server.process.pid, signal.SIGTERM)
    while (response := post(server, later)).status_code == 200:
        pass  # the signal has not come yet
    assert (response.status_code, code_of(response)) == (503, "stopping") and response.headers["Retry-After"]
    assert health(server)["status"] == "stopping" and server.process.poll() is None
    ends: list[list[str]] = []
    threads = [threading.Thread(target=lambda s=stream: ends.append(_finished(s))) for stream in streams]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(firsts) == 4 and ends == [["stop"] * 3] * 4
    assert server.process.wait(timeout=60) == 0


def _finished(stream: Any) -> list[str]:
    """Return the reasons why the choices of a stream ended."""
    return [c.finish_reason for event in stream for c in event.choices if c.finish_reason]
