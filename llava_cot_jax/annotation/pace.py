"""Pace of the requests to an endpoint, which is learned where the endpoint has a limit, and the end of them."""

import asyncio
import contextlib
from collections import deque

_REMEMBERED = 64
"""Number of last replies that tell the rate at which an endpoint answers."""

_FASTER, _SLOWER = 0.99, 1.1
"""Factors of the time between two requests: with each reply, and at most with each refusal."""


class StopAsking(Exception):
    """Signal that no further request may be sent. Its text says why."""


class Pace:
    """Pace of requests: a time between any two.

    Where the endpoint answers that there were too many requests, the time between two grows towards that between the
    last replies. It shrinks again with each reply, so that the limit is met again and again, with few refusals.

    Args:
        per_minute: Largest number of requests in a minute; None for any number.
    """

    def __init__(self, per_minute: float | None) -> None:
        self._least = self._interval = 60 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._replies: deque[float] = deque(maxlen=_REMEMBERED)
        self._stop = asyncio.Event()
        self._reason = ""

    def stop(self, reason: str) -> None:
        """Let no further request be sent, and end all waits."""
        self._reason = self._reason or reason
        self._stop.set()

    def check(self) -> None:
        """Raise ``StopAsking`` if no further request may be sent."""
        if self._stop.is_set():
            raise StopAsking(self._reason)

    def note_reply(self) -> None:
        """Take note of a reply."""
        self._replies.append(asyncio.get_running_loop().time())
        self._interval = max(self._interval * _FASTER, self._least)

    def note_refusal(self) -> None:
        """Take note that the endpoint refused a request because there were too many."""
        now = asyncio.get_running_loop().time()
        if self._replies and now > self._replies[0]:
            between_replies = (now - self._replies[0]) / len(self._replies)
            longest = self._interval * _SLOWER or between_replies
            self._interval = max(min(between_replies, longest), self._least)

    async def turn(self) -> None:
        """Wait until a request may be sent.

        Raises:
            StopAsking: None may be sent any more.
        """
        now = asyncio.get_running_loop().time()
        start = max(self._next, now)
        self._next = start + self._interval
        await self.wait(start - now)

    async def wait(self, seconds: float) -> None:
        """Wait for some seconds.

        Raises:
            StopAsking: No request may be sent any more, perhaps since meanwhile.
        """
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), seconds)
        self.check()
