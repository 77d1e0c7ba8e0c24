"""Requests that are being answered: how many there may be, which searches answer them, and where their reports go.

All methods are for the thread of the event loop.
"""

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from llava_cot_jax.processing.messages import Message
from llava_cot_jax.search.strategies import Strategy
from llava_cot_jax.serving.api_errors import ApiError
from llava_cot_jax.serving.orders import Answered, Drop, Forget, NoAnswer, Order, Report, Task

LONGEST_RETRY_SECONDS = 60

STARTING_RETRY_SECONDS = 2

_RECENT = 0.2
"""Weight of the last answer in the mean of the seconds that answers take."""


@dataclass
class Asked:
    """Question that is asked one or several times, and what is reported of it.

    Attributes:
        reports: The number of the choice, and the report.
        unfinished: Numbers of the choices without an answer, by their tasks.
    """

    reports: asyncio.Queue[tuple[int, Report]] = field(default_factory=asyncio.Queue)
    unfinished: dict[int, int] = field(default_factory=dict)


class Dispatcher:
    """Takes questions, and refuses those that are too many.

    Args:
        give: Function that gives an order to the thread that owns jax.
        most_answers: Largest number of answers that are waited for.
        most_searches: Largest number of searches that are kept.

    Attributes:
        state: "starting", "ready" or "stopping".
        idle: Event that is set while no answer is waited for.
        has_been_ready: Whether questions were taken once.
    """

    def __init__(self, give: Callable[[Order], None], *, most_answers: int, most_searches: int) -> None:
        self._give, self._most_answers, self._most_searches = give, most_answers, most_searches
        self.state = "starting"
        self.has_been_ready = False
        self.idle = asyncio.Event()
        self.idle.set()
        self._being_read = 0
        self._next = 1
        self._asked: dict[int, tuple[Asked, Strategy, float]] = {}
        self._searches: OrderedDict[Strategy, None] = OrderedDict()  # the one used last comes last
        self._seconds = 1.0

    @property
    def unanswered(self) -> int:
        """Number of answers that are waited for."""
        return len(self._asked)

    def ready(self, strategies: list[Strategy]) -> None:
        """Take questions from now on. The searches are compiled."""
        self._searches.update(dict.fromkeys(strategies))
        self.has_been_ready = True
        if self.state == "starting":
            self.state = "ready"

    def stop(self) -> None:
        """Take no more questions."""
        self.state = "stopping"

    def check(self, choices: int = 1) -> None:
        """Check that a question can be taken that is asked ``choices`` times.

        Raises:
            ApiError: The server starts or stops, or too many answers are waited for.
        """
        if self.state == "starting":
            message = "the server is loading and compiling: ask again when /health says ok"
            raise ApiError(503, "starting", message, retry_after=STARTING_RETRY_SECONDS)
        if self.state == "stopping":
            raise ApiError(503, "stopping", "the server is stopping: ask another", retry_after=LONGEST_RETRY_SECONDS)
        if choices > self._most_answers:
            message = f"n is {choices}; the server gives at most {self._most_answers} answers (--max_requests)"
            raise ApiError(400, "invalid_value", message, param="n")
        waiting = self.unanswered + self._being_read
        if waiting + choices > self._most_answers:
            message = f"{waiting} answers are waited for, and {self._most_answers} may be (--max_requests)"
            raise ApiError(429, "too_many_requests", message, retry_after=self._retry_after())

    @contextmanager
    def being_read(self) -> Iterator[None]:
        """Count the request that the block reads among those that are waited for, as it takes memory too.

        Raises:
            ApiError: A question cannot be taken now.
        """
        self.check()
        self._being_read += 1
        try:
            yield
        finally:
            self._being_read -= 1

    def ask(self, strategy: Strategy, messages: list[Message], seeds: list[int], *, tells_stages: bool) -> Asked:
        """Ask a question once with each of some seeds.

        Raises:
            ApiError: It cannot be taken now.
        """
        self.check(len(seeds))
        self._keep(strategy)
        asked = Asked()
        for choice, seed in enumerate(seeds):
            number, self._next = self._next, self._next + 1
            asked.unfinished[number] = choice
            self._asked[number] = asked, strategy, time.monotonic()
            self._give(Task(number, strategy, messages, seed, tells_stages))
        self.idle.clear()
        return asked

    def drop(self, asked: Asked) -> None:
        """Let a question go that nobody waits for any more."""
        for number in list(asked.unfinished):
            self._finish(number)
            self._give(Drop(number))

    def report(self, number: int, report: Report) -> None:
        """Pass on a report of a task, unless that was dropped."""
        if number not in self._asked:
            return
        asked, _, begun = self._asked[number]
        asked.reports.put_nowait((asked.unfinished[number], report))
        if isinstance(report, Answered | NoAnswer):
            self._seconds += _RECENT * (time.monotonic() - begun - self._seconds)
            self._finish(number)

    def give_up(self) -> None:
        """Report to all who wait that they get no answer."""
        for number in list(self._asked):
            self.report(number, NoAnswer("the server has failed", is_mistake=False))

    def _finish(self, number: int) -> None:
        asked, _, _ = self._asked.pop(number)
        del asked.unfinished[number]
        if not self._asked:
            self.idle.set()

    def _keep(self, strategy: Strategy) -> None:
        """Keep a search, in place of the one that was used longest ago and answers nothing now, if there are too many.

        Raises:
            ApiError: All that are kept answer something.
        """
        if strategy not in self._searches and len(self._searches) >= self._most_searches:
            used = {each for _, each, _ in self._asked.values()}
            oldest = next((each for each in self._searches if each not in used), None)
            if oldest is None:
                message = f"{len(used)} other searches are being used, the most that are kept (--kept_searches)"
                raise ApiError(429, "too_many_searches", message, retry_after=self._retry_after())
            del self._searches[oldest]
            self._give(Forget(oldest))
        self._searches[strategy] = None
        self._searches.move_to_end(strategy)

    def _retry_after(self) -> int:
        """Return the seconds after which a quarter of the answers that are waited for may be there."""
        return min(LONGEST_RETRY_SECONDS, max(1, math.ceil(self._seconds / 4)))
