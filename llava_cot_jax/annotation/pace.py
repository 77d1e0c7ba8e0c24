"""Pace of the requests to an endpoint, and the end of them."""

import asyncio
import contextlib


class StopAsking(Exception):
    """Signal that no further request may be sent. Its text says why."""


class Pace:
    """Pace of requests: an equal time between any two, and pauses that the endpoint asks for.

    Args:
        per_minute: Largest number of requests in a minute; None for any number.
    """

    def __init__(self, per_minute: float | None) -> None:
        self._interval = 60 / per_minute if per_minute else 0.0
        self._next = self._resume = 0.0
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

    def pause(self, seconds: float) -> None:
        """Let no request be sent for some seconds."""
        self._resume = max(self._resume, asyncio.get_running_loop().time() + seconds)
        self._next = max(self._next, self._resume)

    async def turn(self) -> None:
        """Wait until a request may be sent.

        Raises:
            StopAsking: None may be sent any more.
        """
        clock = asyncio.get_running_loop().time
        while True:
            start = max(self._next, clock())
            self._next = start + self._interval
            await self.wait(start - clock())
            if self._resume <= clock():  # there was no pause meanwhile
                return

    async def wait(self, seconds: float) -> None:
        """Wait for some seconds.

        Raises:
            StopAsking: No request may be sent any more, perhaps since meanwhile.
        """
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), seconds)
        self.check()
