"""What a body asks for: lenient where clients differ, strict where a value has no meaning."""

import json
from typing import Any

import pytest

from llava_cot_jax.serving.api_errors import ApiError
from llava_cot_jax.serving.chat_request import read_body
from tests.serving.servers import user


def read(**fields: Any):
    return read_body(json.dumps({"model": "m", "messages": [user("?")], **fields}).encode())


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def test_what_is_left_out_or_null_is_the_servers_own():
    bare, null = read(), read(n=None, seed=None, stop=None, temperature=None, top_p=None, max_tokens=None, stream=None)
    assert bare == null
    assert (bare.choices, bare.seed, bare.max_tokens, bare.stop, bare.stream) == (1, None, None, (), False)
    assert read(frequency_penalty=0, tools=[], user="x", logprobs=True) == bare


def test_every_field():
    found = read(
        model="m:greedy",
        n=2.0,
        seed=-1,
        stop=["a", "", "b"],
        temperature=1,
        top_p=0.5,
        max_tokens=9,
        max_completion_tokens=7,
        stream=True,
        stream_options={"include_usage": True},
        search="sample",
        trace=True,
    )
    assert (found.model, found.search, found.choices, found.max_tokens) == ("m:greedy", "sample", 2, 7)
    assert found.seed == 2**32 - 1 and found.stop == ("a", "b")
    assert (found.temperature, found.top_p) == (1.0, 0.5)
    assert found.stream and found.include_usage and found.trace
    assert read(stop="a").stop == ("a",) and read(seed=2**40 + 3).seed == 3


def test_images_are_put_in_their_places():
    first, second = user("one", "data:,a", detail="high"), {"role": "user", "content": "two"}
    second["content"] = [text("two"), {"type": "image_url", "image_url": "data:,b"}]
    found = read(messages=[first, {"role": "assistant", "content": None}, second])
    assert found.image_urls == ["data:,a", "data:,b"]
    filled = found.with_images([b"A", b"B"])
    assert [part.get("image", part.get("text")) for each in filled for part in each["content"]] == [
        b"A",
        "one",
        "",
        "two",
        b"B",
    ]


def test_messages_of_the_system():
    """Without an image they are one message, which comes first. With one they are in the user's first message."""
    told = [{"role": "system", "content": "a"}, {"role": "developer", "content": [text("b")]}]
    plain = read(messages=[*told, user("?")]).messages
    assert plain == [{"role": "system", "content": [text("a\n\nb")]}, {"role": "user", "content": [text("?")]}]
    seen = read(messages=[*told, user("?", "data:,x")]).messages
    assert seen == [{"role": "user", "content": [text("a\n\nb\n\n"), {"type": "image", "url": "data:,x"}, text("?")]}]


def test_each_setting_of_sampling_that_is_compiled_is_a_hundredth():
    """What is as good as 0 is 0: in float32, a division by it is not finite."""
    found = read(temperature=0.70000001, top_p=1e-9)
    assert (found.temperature, found.top_p) == (0.7, 0.01)
    assert read(temperature=1e-40).temperature == 0


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "model": ({"model": 3}, "model is 3; it must be a text"),
    "n": ({"n": 0}, "n is 0; it must be at least 1"),
    "a choice": ({"n": True}, "n is True; it must be a whole number"),
    "max_tokens": ({"max_tokens": 1.5}, "max_tokens is 1.5; it must be a whole number"),
    "stop": ({"stop": ["x"] * 17}, "at most 16"),
    "top_p": ({"top_p": 0}, "top_p is 0; it must be a number above 0"),
    "a temperature of 400 digits": ({"temperature": 10**400}, "temperature is 1000"),
    "half of a character": ({"model": "\ud800"}, "model has no valid character at position 0"),
    "a long name": ({"search": "x" * 1025}, "search has 1025 characters; it must have at most 1024"),
    "temperature": ({"temperature": "hot"}, "temperature is 'hot'; it must be a number"),
    "stream": ({"stream": "yes"}, "stream is 'yes'; it must be true or false"),
    "messages": ({"messages": {}}, "messages is .*; it must be a list"),
    "a message": ({"messages": ["x"]}, r"messages\[0\] has the role None"),
    "a role": ({"messages": [{"role": "tool", "content": "x"}]}, "has the role 'tool'; it must be system"),
    "a content": ({"messages": [{"role": "user", "content": None}]}, "the content of messages.* is None"),
    "a part": ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, r"content\[0\] is no part"),
    "only a system": ({"messages": [{"role": "system", "content": "x"}]}, "has no question"),
    "an image of the system": ({"messages": [user("?", "data:,x") | {"role": "system"}, user("?")]}, "has an image"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_value_that_has_no_meaning(name):
    fields, message = WRONG[name]
    with pytest.raises(ApiError, match=message) as caught:
        read(**fields)
    assert (caught.value.status, caught.value.code) == (400, "invalid_value")


def test_a_value_too_deep_to_be_shown_is_refused():
    """Whatever the depth, among which there are some that are read, but not shown."""
    for depth in range(600, 1000, 10):
        with pytest.raises(ApiError):
            read_body(b'{"messages": [{"role": "user", "content": "?"}], "stop": %s}' % (b"[" * depth + b"]" * depth))


@pytest.mark.parametrize("body", [b"", b"\xff", b"[" * 100_000, b'{"n": NaN, "messages"', b"3", b"1" * 5000])
def test_a_body_that_is_no_object(body):
    with pytest.raises(ApiError) as caught:
        read_body(body)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")
