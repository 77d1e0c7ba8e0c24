"""Asking of an endpoint about many rows at a time, until all are answered, or something ends it."""

import asyncio
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llava_cot_jax.annotation.dialogue import DialogueRequest
from llava_cot_jax.annotation.endpoint import EndpointClient, RequestFailed
from llava_cot_jax.annotation.job import AnnotationJob
from llava_cot_jax.annotation.outcomes import REFUSED, UNUSABLE, RowOutcome
from llava_cot_jax.annotation.pace import Pace, StopAsking
from llava_cot_jax.annotation.rows import RowToAnnotate
from llava_cot_jax.errors import TransientError, UserError

_LOG = logging.getLogger("llava_cot_jax.annotate")

_MOST_UNANSWERED = 4
"""Number of different requests without a reply, one after the other, that show that no further one gets any; where more
are in flight, it is that number, as a refusal comes sooner than a reply.
"""

OnRow = Callable[[RowToAnnotate, RowOutcome], None]
"""Function that is called with each row that is finished, and its outcome."""


class RowAsker:
    """Worker pool that asks an endpoint about rows. A row has one request in flight at most.

    Args:
        job: The job.
        client: Client of the endpoint.
        pace: Pace of the requests.
        on_row: Function that is called with each finished row.

    Attributes:
        failures: Number of rows that are left for another run, by how their last request failed.
        stopped: Reason why the endpoint is asked no more; empty where all rows were gone through.
        fault: Error because of which it is asked no more, if there is one.
        interrupted: Whether that was Ctrl-C.
    """

    def __init__(self, job: AnnotationJob, client: EndpointClient, pace: Pace, on_row: OnRow) -> None:
        self._job, self._client, self._pace, self._on_row = job, client, pace, on_row
        self.failures: dict[str, int] = {}
        self.stopped, self.interrupted = "", False
        self.fault: Exception | None = None
        self._unanswered: list[DialogueRequest] = []
        self._most_unanswered = _MOST_UNANSWERED
        self._tasks: list[asyncio.Task[None]] = []

    async def ask_about(self, rows: Iterator[RowToAnnotate], in_flight: int) -> None:
        """Ask about rows, each from its first request whose reply the journal does not have.

        At Ctrl-C, and where a fault ends the asking, no further request is sent, and the replies to those in flight are
        kept. A second Ctrl-C ends at once.

        Args:
            rows: The rows.
            in_flight: Largest number of requests in flight.
        """
        self._most_unanswered = max(_MOST_UNANSWERED, in_flight)
        with self._hearing_interrupts():
            self._tasks = [asyncio.create_task(self._work(rows)) for _ in range(in_flight)]
            try:
                await asyncio.gather(*self._tasks)
            except asyncio.CancelledError:
                if not self.interrupted:
                    raise
            finally:
                for task in self._tasks:
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)
                await self._client.close()
        if self.failures and not len(self._job.journal) and self.fault is None:
            self.fault = self._answers_nothing(next(iter(self.failures)))

    def _answers_nothing(self, why: str) -> TransientError:
        return TransientError(f"{self._client.url} answers nothing ({why}): the same command goes on later")

    async def _work(self, rows: Iterator[RowToAnnotate]) -> None:
        for row in rows:
            try:
                self._on_row(row, await self._finish_row(row))
            except RequestFailed as failure:
                self.failures[str(failure)] = self.failures.get(str(failure), 0) + 1
            except StopAsking as stop:
                self.stopped = str(stop)
                self._pace.stop(str(stop))
                return
            except Exception as fault:
                self.fault = self.fault or fault
                self._pace.stop("an error")
                return

    async def _finish_row(self, row: RowToAnnotate) -> RowOutcome:
        steps = self._job.steps(row)
        try:
            request = next(steps)
            while True:
                reply = self._job.journal.get(request)
                if reply is None:
                    self._pace.check()
                    reply = await self._ask(request)
                request = steps.send(reply)
        except StopIteration as end:
            outcome: RowOutcome = end.value
            return outcome

    async def _ask(self, request: DialogueRequest) -> dict[str, Any]:
        """Return the reply to a request.

        Raises:
            StopAsking: No request may be sent any more.
            RequestFailed: It was sent as often as it may be.
            UserError: The endpoint cannot be used, or a reply cannot be kept.
        """
        in_a_row, was_refused = f"{self._most_unanswered} requests in a row", self._job.journal.was_refused(request)
        try:
            reply = await self._client.ask(request)
        except RequestFailed as failure:
            fault = TransientError(f"{in_a_row} failed; the last one by {failure}")
            self._note_unanswered(request, fault if len(self._job.journal) else self._answers_nothing(str(failure)))
            raise
        if reply["finish"] == REFUSED:
            if not was_refused:  # a row that the endpoint never takes says nothing about the others
                self._note_unanswered(request, UserError(f"{in_a_row} were refused; of the last one, {reply['text']}"))
        elif reply["finish"] != UNUSABLE:
            self._unanswered.clear()
        return reply

    def _note_unanswered(self, request: DialogueRequest, fault: UserError) -> None:
        """Raise the fault where so many requests got no answer that no further one would. All are left for later."""
        self._unanswered.append(request)
        if len(self._unanswered) >= self._most_unanswered:
            for each in self._unanswered:
                self._job.journal.release(each)
            raise fault

    @contextmanager
    def _hearing_interrupts(self) -> Iterator[None]:
        """Let Ctrl-C end the asking in the block."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before, loop = signal.getsignal(signal.SIGINT), asyncio.get_running_loop()
        if before is signal.SIG_IGN:
            yield
            return
        loop.add_signal_handler(signal.SIGINT, self._interrupt)
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGINT)
            signal.signal(signal.SIGINT, before)

    def _interrupt(self) -> None:
        if self.interrupted:
            for task in self._tasks:
                task.cancel()
            return
        self.interrupted = True
        _LOG.warning("no further request is sent; the replies to those in flight are awaited (Ctrl-C ends that)")
        self._pace.stop("Ctrl-C")
