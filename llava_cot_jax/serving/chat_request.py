"""Requests for chat completions: what a body of JSON asks for. A field that is not known here is ignored."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llava_cot_jax.checks import check_text, shown
from llava_cot_jax.errors import UserError
from llava_cot_jax.processing.messages import Message
from llava_cot_jax.serving.api_errors import ApiError, invalid_value

MOST_CHOICES = 16
"""Largest number of answers to one request."""

MOST_STOPS = 16
"""Largest number of texts that end a conclusion."""

_LONGEST_NAME = 1024
"""Largest number of characters of a name, which every event of an answer repeats."""

_DECIMALS = 2
"""Decimals of settings of sampling, of which each value is compiled."""

_SYSTEM_ROLES = ("system", "developer")

_ROLES = (*_SYSTEM_ROLES, "user", "assistant")

_SEEDS = 1 << 32


@dataclass(frozen=True)
class ChatRequest:
    """Request for answers to the last question of a conversation.

    Attributes:
        model: Name of a model, perhaps with that of a search.
        search: Name of a search; None where the name of the model has it, or the server's own is meant.
        messages: Messages as the processor takes them, in which an image has its URL as ``url``.
        choices: Number of answers.
        seed: Seed of the first answer; the others have the following ones. None is the server's own.
        max_tokens: Largest number of tokens of a conclusion; None sets none.
        stop: Texts before which a conclusion ends.
        temperature: Temperature of sampling, in hundredths; None is the server's own.
        top_p: Probability up to which the likeliest tokens are sampled from, in hundredths; None is
            the server's own.
        stream: Whether the answer comes as events.
        include_usage: Whether an event at the end tells the numbers of tokens.
        trace: Whether the answer has the trace of its search.
    """

    model: str
    search: str | None
    messages: list[Message]
    choices: int
    seed: int | None
    max_tokens: int | None
    stop: tuple[str, ...]
    temperature: float | None
    top_p: float | None
    stream: bool
    include_usage: bool
    trace: bool

    @property
    def image_urls(self) -> list[str]:
        """URLs of the images, in their order."""
        return [part["url"] for part in _image_parts(self.messages)]

    def with_images(self, images: list[bytes | str]) -> list[Message]:
        """Return the messages with images, files or ``data:`` URLs, in place of the URLs."""
        places = iter(images)

        def filled(part: Mapping[str, Any]) -> Mapping[str, Any]:
            return {"type": "image", "image": next(places)} if part["type"] == "image" else part

        return [{**each, "content": [filled(part) for part in each["content"]]} for each in self.messages]


def read_body(body: bytes) -> ChatRequest:
    """Return what a body asks for.

    Raises:
        ApiError: It is no JSON, or a field that is known has a value that cannot be used.
    """
    try:
        return _read(json.loads(body))
    except (ValueError, RecursionError) as fault:
        reason = "too deeply nested" if isinstance(fault, RecursionError) else fault
        raise ApiError(400, "invalid_json", f"the body is not JSON: {reason}") from None


def _read(content: Any) -> ChatRequest:
    if not isinstance(content, dict):
        raise ApiError(400, "invalid_json", f"the body is {shown(content)}; it must be a JSON object")
    fields = {name: value for name, value in content.items() if value is not None}
    length = "max_completion_tokens" if "max_completion_tokens" in fields else "max_tokens"
    options = fields.get("stream_options")
    top_p = _number(fields, "top_p", lambda x: 0 < x <= 1, "a number above 0 and at most 1")
    return ChatRequest(
        model=_text(fields, "model") or "",
        search=_text(fields, "search"),
        messages=_messages(fields.get("messages")),
        choices=_whole_number(fields, "n", 1, MOST_CHOICES) or 1,
        seed=None if (seed := _whole_number(fields, "seed")) is None else seed % _SEEDS,
        max_tokens=_whole_number(fields, length, 1),
        stop=_stops(fields.get("stop", [])),
        temperature=_number(fields, "temperature", lambda x: x >= 0, "a number of at least 0"),
        top_p=None if top_p is None else max(top_p, 10**-_DECIMALS),
        stream=_flag(fields, "stream"),
        include_usage=isinstance(options, dict) and options.get("include_usage") is True,
        trace=_flag(fields, "trace"),
    )


def _text(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is None:
        return None
    try:
        check_text(name, value)
    except UserError as fault:
        raise invalid_value(name, str(fault)) from None
    if len(value) > _LONGEST_NAME:
        raise invalid_value(name, f"{name} has {len(value)} characters; it must have at most {_LONGEST_NAME}")
    return str(value)


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise invalid_value(name, f"{name} is {shown(value)}; it must be true or false")
    return value


def _whole_number(
    fields: Mapping[str, Any], name: str, least: int | None = None, most: int | None = None
) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise invalid_value(name, f"{name} is {shown(value)}; it must be a whole number")
    if least is not None and value < least:
        raise invalid_value(name, f"{name} is {shown(value)}; it must be at least {least}")
    if most is not None and value > most:
        raise invalid_value(name, f"{name} is {shown(value)}; it must be at most {most}")
    return value


def _number(fields: Mapping[str, Any], name: str, is_right: Any, wanted: str) -> float | None:
    value = fields.get(name)
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if not is_number or not is_right(value):
        raise invalid_value(name, f"{name} is {shown(value)}; it must be {wanted}")
    return round(float(value), _DECIMALS)


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops) or len(stops) > MOST_STOPS:
        raise invalid_value("stop", f"stop is {shown(value)}; it must be a text, or a list of at most {MOST_STOPS}")
    return tuple(filter(None, stops))


def _messages(value: Any) -> list[Message]:
    """Return the messages as the processor takes them: that of the system first, or with images in the user's first.

    The chat template of Llama-3.2-Vision refuses a message of the system beside an image.
    """
    if not isinstance(value, list) or not value:
        raise invalid_value("messages", f"messages is {shown(value)}; it must be a list of messages, at least one")
    read = [_message(each, f"messages[{i}]") for i, each in enumerate(value)]
    system = [part for each in read if each["role"] == "system" for part in each["content"]]
    others = [each for each in read if each["role"] != "system"]
    if not others:
        raise invalid_value("messages", "messages has no question: the last message must be the user's")
    if not system:
        return others
    text = "\n\n".join(part["text"] for part in system if part["type"] == "text")
    if len([part for part in system if part["type"] == "image"]):
        raise invalid_value("messages", "a message of the system has an image: give it in a message of the user")
    if not list(_image_parts(others)):
        return [{"role": "system", "content": [{"type": "text", "text": text}]}, *others]
    first = next((i for i, each in enumerate(others) if each["role"] == "user"), 0)
    parts = [{"type": "text", "text": f"{text}\n\n"}, *others[first]["content"]]
    return [*others[:first], {**others[first], "content": parts}, *others[first + 1 :]]


def _message(message: Any, place: str) -> Message:
    role = message.get("role") if isinstance(message, dict) else None
    if role not in _ROLES:
        raise invalid_value("messages", f"{place} has the role {shown(role)}; it must be {', '.join(_ROLES)}")
    content = message.get("content")
    if content is None and role == "assistant":
        content = ""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise invalid_value("messages", f"the content of {place} is {shown(content)}; it must be a text, or a list")
    return {
        "role": "system" if role in _SYSTEM_ROLES else role,
        "content": [_part(part, f"{place}.content[{i}]") for i, part in enumerate(parts)],
    }


def _part(part: Any, place: str) -> dict[str, str]:
    match part:
        case {"type": "text", "text": str(text)}:
            return {"type": "text", "text": text}
        case {"type": "image_url", "image_url": {"url": str(url)} | str(url)}:
            return {"type": "image", "url": url}
    raise invalid_value("messages", f'{place} is no part of type "text", nor of type "image_url" with a URL')


def _image_parts(messages: list[Message]) -> Any:
    return (part for each in messages for part in each["content"] if part["type"] == "image")
