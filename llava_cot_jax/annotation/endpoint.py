"""Endpoint that is asked for answers, through the openai package: each failure is counted, and mended where it can be.

The package's own retries are turned off: here every request that is sent counts against the bounds and keeps the pace,
and one that is refused because there are too many is sent again as long as others come through.
"""

import asyncio
import contextlib
import email.utils
import math
import os
import random
import re
import zlib
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

from llava_cot_jax.annotation.budget import Budget
from llava_cot_jax.annotation.dialogue import IMAGE_PART, SPELLS_KEY, DialogueRequest
from llava_cot_jax.annotation.journal import USAGE, Journal
from llava_cot_jax.annotation.outcomes import FAILED, REFUSED, UNUSABLE
from llava_cot_jax.annotation.pace import Pace, StopAsking
from llava_cot_jax.data.raw.images import RawImages
from llava_cot_jax.errors import UserError

DEFAULT_KEY_VARIABLE = "OPENAI_API_KEY"

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

_REFUSING = (400, 413, 415, 422)
"""Codes by which an endpoint refuses one request."""

_FATAL_AT_FIRST = (403, 404)
"""Codes by which an endpoint refuses one request where it has answered others, and otherwise all of them."""

_PASSING = (408, 409, 425, 429)
"""Codes, besides those from 500 on, of what may be gone at another try."""

_TOO_MANY = 429

_QUEUED = f"status {_TOO_MANY}"

_LEAST_KEY = 16
"""Number of characters from which a key is a secret. Shorter ones, such as EMPTY, may be words of any reply."""

_MOST_TOKENS = 2**31
"""Number of tokens that no request takes."""

_ENDS = ("stop", "length", "content_filter", "refusal")
"""Ends of a reply as endpoints name them. Any other is one that says nothing about the text."""

_BROKEN = ("error", "abort", "cancelled")
"""Ends by which gateways say that a reply failed on its way."""

_MOST_IMAGE_THREADS = 4
"""Number of images that are shrunk at a time at most. Each takes some ten bytes for a pixel meanwhile."""

_UNSENT = "unsent"
"""End of a reply that stands for none, as no connection was made."""

_NO_CONNECTION = ("ConnectError", "ConnectTimeout", "PoolTimeout", "ProxyError", "UnsupportedProtocol")
"""Names of the errors that keep a request from being sent, in each of the HTTP libraries that the package has used."""

_FIRST_DELAY, _LONGEST_DELAY = 0.5, 60.0
"""Seconds before a request is sent again, where the endpoint names none: after the first failure, and at most."""

_LONGEST_WAIT = 600.0
"""Longest delay in seconds that an endpoint may ask for, so that it is waited for."""

_LONGEST_CONNECT = 15.0
"""Seconds after which a connection that is not made is given up."""

_DEFAULT_URL = "https://api.openai.com/v1"
"""URL that the openai package takes by itself. It takes an empty OPENAI_BASE_URL for a URL."""

_NO_KEY = "none"
"""Key that is sent to an endpoint that needs none, as the package asks for one."""


class RequestFailed(Exception):
    """Failure of a request for this run: it was sent as often as it may be. Its text says how it failed last."""


def check_openai() -> None:
    """Check that the openai package is installed.

    Raises:
        UserError: It is not.
    """
    if find_spec("openai") is None:
        raise UserError("an endpoint is asked through the package openai: pip install 'llava-cot-jax[annotate]'")


def endpoint_url(given: str | None) -> str | None:
    """Return the URL of the endpoint, or None for the default of the openai package.

    Raises:
        UserError: It is no URL, or has a secret in it.
    """
    url = given or os.environ.get("OPENAI_BASE_URL") or None
    if url is None:
        return None
    try:
        parts = urlsplit(url)
        is_endpoint = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # an address or a port that is none
        is_endpoint = False
    if not is_endpoint:
        raise UserError("--base_url is no URL of an endpoint; give one such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError(
            "--base_url has a name, a password, a query or a fragment in it, and would be printed: put the key into "
            "the environment instead"
        )
    return url


def read_key(variable: str, url: str | None) -> str:
    """Return the key in an environment variable; where there is none, one that stands for none.

    Raises:
        UserError: There is none, and no other endpoint than that of the package's default was named. Or the name is
            none of a variable, or the key cannot be sent.
    """
    if not _VARIABLE.fullmatch(variable):  # which may be the key itself, and is not repeated
        raise UserError("--key_variable is no name of an environment variable: give one such as OPENAI_API_KEY")
    is_default = variable == DEFAULT_KEY_VARIABLE
    named = f"the environment variable {variable}" if is_default else "the variable of --key_variable"
    key = os.environ.get(variable, "").strip()
    if not key and url is None:
        raise UserError(f"{named} has no key: set it, or name an endpoint that needs none by --base_url")
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{named} has a key that cannot be sent: it must be printable ASCII on one line")
    return key or _NO_KEY


class EndpointClient:
    """Client of a chat endpoint, whose requests are bounded.

    Args:
        url: URL of the endpoint; None is the package's default.
        key: Key, which no message and no file shows.
        images: Images of the rows.
        journal: Journal, which takes each reply, and each failure.
        budget: Bounds on the requests.
        pace: Pace of the requests.
        timeout: Seconds after which a reply is given up.
        max_retries: Number of times that a request that failed is sent again.
        length_parameter: Name by which the endpoint takes the largest number of tokens of an answer.

    Attributes:
        troubles: Number of failed requests by what happened.
    """

    def __init__(
        self,
        url: str | None,
        key: str,
        images: RawImages,
        journal: Journal,
        budget: Budget,
        pace: Pace,
        timeout: float,
        max_retries: int,
        length_parameter: str,
    ) -> None:
        import openai

        from llava_cot_jax.annotation.sent_images import reading_images

        self._openai, self._key = openai, key
        bounds = openai.Timeout(timeout, connect=min(timeout, _LONGEST_CONNECT))
        try:
            self._client = openai.AsyncOpenAI(api_key=key, base_url=url or _DEFAULT_URL, timeout=bounds, max_retries=0)
        except (ImportError, OSError, ValueError, openai.OpenAIError) as fault:
            why = self._hide(" ".join(str(fault).split())) or type(fault).__name__
            raise UserError(
                f"the openai package cannot make a client: {why}; look at the environment variables of proxies and of "
                "certificates"
            ) from fault
        self._images, self._journal, self._budget, self._pace = images, journal, budget, pace
        self._timeout, self._max_retries, self._length_parameter = timeout, max_retries, length_parameter
        self.troubles: Counter[str] = Counter()
        self._replies = 0
        self._image_threads = ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST_IMAGE_THREADS))
        self._open = contextlib.ExitStack()
        self._open.enter_context(reading_images())

    @property
    def url(self) -> str:
        """URL of the endpoint."""
        return str(self._client.base_url)

    async def close(self) -> None:
        """Close the connections."""
        self._image_threads.shutdown(wait=False, cancel_futures=True)
        self._open.close()
        await self._client.close()

    async def ask(self, request: DialogueRequest) -> dict[str, Any]:
        """Return the reply to a request, as ``ask_about_row`` takes it, with the numbers of tokens.

        Raises:
            StopAsking: No request may be sent any more.
            RequestFailed: It was sent as often as it may be.
            UserError: The endpoint cannot be used, or a reply cannot be kept.
        """
        try:
            body = await self._body(request)
        except UserError as fault:
            unusable = {"text": str(fault), "finish": UNUSABLE}
            self._journal.hold(request, unusable)
            return unusable
        failures, before = 0, self._replies
        while True:
            async with self._budget.room_for(request):
                await self._pace.turn()
                self._budget.count_request()
                try:
                    reply, delay = await self._send(body, request)
                except (UserError, StopAsking) as end:
                    await self._journal.add_soon(request, {"text": str(end), "finish": FAILED})
                    raise
                if reply["finish"] == _UNSENT:
                    self._budget.uncount_request()
                else:
                    await self._journal.add_soon(request, reply)
                    if reply["finish"] not in (FAILED, REFUSED):
                        self._budget.note_usage(request, reply[USAGE[0]])
            if reply["finish"] not in (FAILED, _UNSENT):
                return reply
            trouble = reply["text"]
            self.troubles[trouble] += 1
            # Where others come through, a request that is refused because there are too many stands in a queue.
            in_queue = trouble == _QUEUED and self._replies > before
            failures, before = 0 if in_queue else failures + 1, self._replies
            if failures > self._max_retries:
                raise RequestFailed(trouble)
            # The endpoint may name a shorter time than it takes for a reply, which would use up all tries.
            least = _backoff(max(failures, 1)) if delay is None or failures > 1 else 0.0
            await self._pace.wait(max(least, delay or 0.0))

    async def _send(self, body: dict[str, Any], request: DialogueRequest) -> tuple[dict[str, Any], float | None]:
        """Return the reply, or one that stands for none, and the delay that the endpoint asks for.

        A request that the endpoint may have answered without a reply that came through is taken for one of full length.
        """
        try:
            async with asyncio.timeout(self._timeout):  # the package's own bounds the time between two parts
                raw = await self._client.chat.completions.with_raw_response.create(**body)
            return self._read(raw, request), None
        except self._openai.APIStatusError as fault:
            if self._is_refusal(fault):
                return self._refusal(fault), None
            trouble, delay = self._note_status(fault)
            return {"text": trouble, "finish": FAILED}, delay
        except (TimeoutError, self._openai.APIConnectionError) as fault:
            is_late = isinstance(fault, TimeoutError | self._openai.APITimeoutError)
            trouble = "no reply in time" if is_late else "broken connection"
            if type(fault.__cause__).__name__ in _NO_CONNECTION:
                return {"text": trouble, "finish": _UNSENT}, None
        except _UnreadableReply:
            trouble = "unreadable reply"
        return {"text": trouble, "finish": FAILED, **self._budget.assumed_usage(request)}, None

    async def _body(self, request: DialogueRequest) -> dict[str, Any]:
        """Return the arguments of the request.

        Raises:
            UserError: An image cannot be sent.
        """
        messages: list[dict[str, Any]] = list(request.messages)
        if request.has_images:
            loop = asyncio.get_running_loop()
            urls = iter(await loop.run_in_executor(self._image_threads, self._urls, request))
            messages = [_with_images(message, urls) for message in messages]
        settings = request.settings
        body = {"model": settings.model, "messages": messages, self._length_parameter: settings.max_new_tokens}
        return body if settings.temperature is None else {**body, "temperature": settings.temperature}

    def _urls(self, request: DialogueRequest) -> list[str]:
        """Return the URLs of the images of a request.

        Raises:
            UserError: An image cannot be sent, or is not the one that the request's key names.
            StopAsking: No request may be sent any more.
        """
        from llava_cot_jax.annotation.sent_images import image_url

        urls = []
        for image in request.row.images:
            self._pace.check()
            content = self._images.read(image.name)
            if zlib.crc32(content) != image.checksum:
                raise UserError(f"the image {image.path} has changed since the start: run the command again")
            urls.append(image_url(content, request.settings.max_side))
        return urls

    def _read(self, raw: Any, request: DialogueRequest) -> dict[str, Any]:
        """Return what a response says."""
        try:
            completion = raw.parse()
            choice = completion.choices[0]
            declined, text, finish = choice.message.refusal, choice.message.content, choice.finish_reason
            if request.kind == "answer":
                text = _whole_text(choice) or text
            usage, model, identifier = completion.usage, completion.model, completion.id
            text = declined or text or ""
            if not isinstance(text, str):
                raise TypeError("the text is none")
            if finish in _BROKEN:
                raise ValueError("the reply was broken off")
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError, self._openai.OpenAIError) as fault:
            raise _UnreadableReply from fault
        self._replies += 1
        self._pace.note_reply()
        has_key = self._has_key(text)
        return {
            "text": "" if has_key else text,
            "finish": SPELLS_KEY if has_key else "refusal" if declined else finish if finish in _ENDS else "other",
            **(_counts_of(usage) or {**self._budget.assumed_usage(request), "assumed": True}),
            "model": self._hide(str(model)),
            "completion": self._hide(str(identifier)),
        }

    def _is_refusal(self, fault: Any) -> bool:
        """Whether a status refuses one request. At first, codes that a mistake in the settings may have are fatal."""
        code = fault.status_code
        return code in _REFUSING or (code in _FATAL_AT_FIRST and len(self._journal) > 0 and not _has_no_quota(fault))

    def _refusal(self, fault: Any) -> dict[str, Any]:
        """Return the reply that stands for a request that the endpoint refuses."""
        self.troubles[f"status {fault.status_code}"] += 1
        message = f"the endpoint refuses it with status {fault.status_code}: {self._message(fault)}"
        return {"text": message, "finish": REFUSED}

    def _note_status(self, fault: Any) -> tuple[str, float | None]:
        """Return what a status says has happened, and the delay that the endpoint asks for.

        Raises:
            UserError: No other try can mend it.
            StopAsking: The delay is too long to wait for.
        """
        code = fault.status_code
        if code == 401:
            raise UserError(f"{self.url} does not accept the key (status 401): check the environment")
        if _has_no_quota(fault) or not (code in _PASSING or code >= 500):
            raise UserError(f"{self.url} answers with status {code}: {self._message(fault)}")
        delay = _asked_delay(fault.response.headers)
        if delay is not None and delay > _LONGEST_WAIT:
            raise StopAsking(f"the endpoint asks to wait for {delay:,.0f} s")
        if code == _TOO_MANY:
            self._pace.note_refusal()
        return f"status {code}", delay

    def _message(self, fault: Any) -> str:
        """Return the message of a status, on one line and without the key."""
        said = fault.body.get("message") if isinstance(fault.body, Mapping) else None
        return self._hide(" ".join(str(said or fault.message).split()))[:300]

    def _hide(self, text: str) -> str:
        """Return a text without the key."""
        return text.replace(self._key, "[key]") if self._has_key(text) else text

    def _has_key(self, text: str) -> bool:
        """Whether a text has the key in it, if that is a secret."""
        return len(self._key) >= _LEAST_KEY and self._key in text


class _UnreadableReply(Exception):
    """Error for a response that is no chat completion, such as one that was cut off."""


def _has_no_quota(fault: Any) -> bool:
    return getattr(fault, "code", None) == "insufficient_quota"


def _counts_of(usage: Any) -> dict[str, int] | None:
    """Return the numbers of tokens by the keys of ``USAGE``, or None where an endpoint does not say both."""
    counts: list[Any] = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    if not all(type(count) is int and 0 <= count < _MOST_TOKENS for count in counts):
        return None
    return dict(zip(USAGE, counts, strict=True))


def _whole_text(choice: Any) -> str | None:
    """Return the whole answer where ``serve`` gives it beside the conclusion, which is the content there."""
    about = getattr(choice, "llava_cot", None)
    return about["text"] if isinstance(about, Mapping) else None


def _with_images(message: dict[str, Any], urls: Any) -> dict[str, Any]:
    """Return a message with the URLs of its images."""
    if isinstance(message["content"], str):
        return message
    parts = [
        {"type": "image_url", "image_url": {"url": next(urls)}} if part["type"] == IMAGE_PART else part
        for part in message["content"]
    ]
    return {**message, "content": parts}


def _backoff(failures: int) -> float:
    """Return the seconds to wait after some failures: twice as many each time, less up to a quarter at random."""
    longest = min(_FIRST_DELAY * 2.0 ** min(failures - 1, 16), _LONGEST_DELAY)
    return longest * random.uniform(0.75, 1)


def _asked_delay(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that an endpoint asks to wait (RFC 9110, section 10.2.3), or None."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name, "")
        with contextlib.suppress(ValueError):
            if not math.isnan(seconds := float(value)):
                return max(seconds * unit, 0.0)
        with contextlib.suppress(ValueError, TypeError):
            moment = email.utils.parsedate_to_datetime(value)
            moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
            return max((moment - datetime.now(UTC)).total_seconds(), 0.0)
    return None
