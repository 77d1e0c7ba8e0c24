"""Judge of a benchmark: a chat endpoint that is asked about answers, and asked again where it does not reply."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

from llava_cot_jax.checks import check_text, shown
from llava_cot_jax.errors import TransientError, UserError

if TYPE_CHECKING:
    from requests import PreparedRequest, Response

KEY_VARIABLE = "OPENAI_API_KEY"
"""Environment variable with the key of the endpoint."""

_PATH = "/chat/completions"

_WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Seconds before each further try of a request, unless the endpoint asks for more."""

_LONGEST_WAIT = 600.0
"""Longest wait, in seconds, that an endpoint may ask for."""

_TIMEOUT = (10.0, 300.0)
"""Seconds within which an endpoint must be connected to, and must answer."""

_PASSING = (408, 409, 425, 429)
"""HTTP statuses below 500 that may be others at another try."""

_REFUSED = (401, 403)
"""HTTP statuses of a wrong key."""

_LONGEST_REASON = 200
"""Length, in characters, of what is shown of an endpoint's error."""


class _PassingFault(Exception):
    """Fault of one try of a request, which may be gone at another.

    Args:
        reason: Words that say what happened.
        wait: Seconds that the endpoint asks to wait.
    """

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class Grader:
    """Chat endpoint that judges the answers to a benchmark.

    Attributes:
        address: Address to which requests are posted.
        model: Name of the model that judges.
        key: Key of the endpoint, which no text shows; None where it needs none.
    """

    address: str
    model: str
    key: str | None = field(default=None, repr=False)

    @classmethod
    def from_options(cls, url: str | None, model: str | None) -> Grader | None:
        """Return the judge that the options name, with the key of the environment, or None where they name none.

        Raises:
            UserError: One of both is missing, or the address or the key cannot be used.
        """
        if url is None and model is None:
            return None
        if url is None or model is None:
            missing, given = ("model", "url") if model is None else ("url", "model")
            raise UserError(f"--grader.{given} needs --grader.{missing} beside it")
        check_text("grader.model", model)
        parts = _split(url)
        path = parts.path.rstrip("/")
        parts = parts._replace(path=path if path.endswith(_PATH) else path + _PATH, fragment="")
        key = os.environ.get(KEY_VARIABLE, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"the variable {KEY_VARIABLE} has a character that no key has, such as the end of a line")
        return cls(parts.geturl(), model, key or None)

    @property
    def shown_address(self) -> str:
        """Address without what may be secret in it."""
        return urlsplit(self.address)._replace(query="").geturl()

    def describe(self) -> dict[str, str]:
        """Return what is told of the judge beside a score."""
        return {"model": self.model, "url": self.shown_address}

    def digest(self, request: Mapping[str, Any]) -> str:
        """Return a digest of a request to this endpoint, by which its reply is found again."""
        return hashlib.sha256(json.dumps([self.shown_address, request], sort_keys=True).encode()).hexdigest()

    def check(self) -> None:
        """Check with a small request that the judge answers.

        Raises:
            UserError: It does not.
        """
        self.ask({"model": self.model, "messages": [{"role": "user", "content": "hello"}]}, tries=3)

    def ask(
        self, request: Mapping[str, Any], tries: int = len(_WAITS) + 1, wait: Callable[[float], Any] = time.sleep
    ) -> dict[str, Any]:
        """Return the reply to a request.

        A request that is refused for now, or breaks off, is sent again, each time after a longer wait.

        Args:
            request: Body of the request.
            tries: Number of tries before it has failed.
            wait: Function that waits for some seconds before a further try.

        Raises:
            TransientError: The endpoint did not answer at any try.
            UserError: The endpoint refuses the request.
        """
        for number in range(tries):
            try:
                return self._try(json.dumps(request).encode())
            except _PassingFault as fault:
                if number + 1 == tries or fault.wait > _LONGEST_WAIT:
                    raise TransientError(
                        f"the judge {self.model} at {self.shown_address} does not answer ({fault}): run the same "
                        "command again to go on"
                    ) from None
                wait(max(_WAITS[number], fault.wait))
        raise AssertionError("there is no try")

    def _try(self, body: bytes) -> dict[str, Any]:
        import requests

        def authorize(request: PreparedRequest) -> PreparedRequest:
            # As a function, it also keeps requests from sending a password of ~/.netrc.
            if self.key:
                request.headers["Authorization"] = f"Bearer {self.key}"
            return request

        try:
            response = requests.post(
                self.address,
                data=body,
                headers={"Content-Type": "application/json"},
                auth=authorize,
                timeout=_TIMEOUT,
                allow_redirects=False,
            )
        except requests.Timeout:
            raise _PassingFault("no answer in time") from None
        except requests.RequestException as fault:
            raise _PassingFault(type(fault).__name__) from None
        self._check_status(response)
        try:
            reply: dict[str, Any] = response.json()
            reply["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            raise _PassingFault("its reply is no chat completion") from None
        return reply

    def _check_status(self, response: Response) -> None:
        """Raise an error unless the status of a response is that of an answer."""
        status = response.status_code
        if 200 <= status < 300:
            return
        if status in _PASSING or status >= 500:
            raise _PassingFault(f"HTTP status {status}", _seconds(response.headers.get("Retry-After", "")))
        place = f"the judge {self.model} at {self.shown_address}"
        if status in _REFUSED:
            raise UserError(f"{place} refuses the key (HTTP status {status}): put it in the variable {KEY_VARIABLE}")
        text = response.text.replace(self.key, "***") if self.key else response.text
        reason = " ".join(text.split())[:_LONGEST_REASON]
        raise UserError(f"{place} refuses a request (HTTP status {status}): {reason}")


def _split(url: str) -> SplitResult:
    """Return the parts of the address of an endpoint.

    Raises:
        UserError: It is none, or has a password in it, which is not told.
    """
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of a port, or of brackets
        is_address = False
    if "@" in (parts.netloc if is_address else url):
        raise UserError(f"grader.url has a password in it; put the key in the environment variable {KEY_VARIABLE}")
    if not is_address:
        raise UserError(f"grader.url is {shown(url)}; it must be an address such as https://api.openai.com/v1")
    return parts


def _seconds(header: str) -> float:
    """Return the number of seconds that the header Retry-After asks to wait, which may also name a time."""
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0
