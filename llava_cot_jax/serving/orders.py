"""Orders to the thread that owns jax, and what it reports of the questions."""

import queue
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from llava_cot_jax.processing.messages import Message
from llava_cot_jax.search.answers import Answer
from llava_cot_jax.search.strategies import Strategy


@dataclass(frozen=True)
class Task:
    """Question that is to be answered once.

    Attributes:
        number: Number by which orders and reports name it.
        strategy: Strategy to search with.
        messages: Conversation that ends with the question.
        seed: Seed of its draws.
        tells_stages: Whether each stage is reported as it is won.
    """

    number: int
    strategy: Strategy
    messages: list[Message]
    seed: int
    tells_stages: bool = False


@dataclass(frozen=True)
class Drop:
    """Order to let a question go that nobody waits for.

    Attributes:
        number: Number of the task.
    """

    number: int


@dataclass(frozen=True)
class Forget:
    """Order to free what a search keeps, which answers no question now.

    Attributes:
        strategy: Strategy of the search.
    """

    strategy: Strategy


@dataclass(frozen=True)
class Stop:
    """Order to end. No question is being answered any more."""


Order = Task | Drop | Forget | Stop


@dataclass(frozen=True)
class StageWon:
    """Report of the stages of a question that were won since the last one, but for the conclusion.

    Attributes:
        texts: Texts of the winners, with their tags.
    """

    texts: list[str]


@dataclass(frozen=True)
class Answered:
    """Report of an answer.

    Attributes:
        answer: The answer.
        is_shrunk: Whether the context left less than the default length.
    """

    answer: Answer
    is_shrunk: bool


@dataclass(frozen=True)
class NoAnswer:
    """Report of a question that has no answer.

    Attributes:
        message: One line that says why.
        is_mistake: Whether the request is at fault, rather than the server.
    """

    message: str
    is_mistake: bool


Report = StageWon | Answered | NoAnswer

Deliver = Callable[[int, Report], None]
"""Function that takes the number of a task and a report of it. It may be called in any thread."""


class OrderSource(Protocol):
    """Place that the thread that owns jax takes its orders from."""

    def take(self, wait: bool) -> Sequence[Order]:
        """Return the orders that there are; with ``wait``, not before there is one."""


class OrderQueue:
    """Orders of this process, which any thread may give."""

    def __init__(self) -> None:
        self._orders: queue.SimpleQueue[Order] = queue.SimpleQueue()

    def give(self, order: Order) -> None:
        """Add an order."""
        self._orders.put(order)

    def take(self, wait: bool, seconds: float | None = None) -> list[Order]:
        """Return the orders that there are; with ``wait``, not before there is one, or for at most ``seconds``."""
        orders: list[Order] = []
        try:
            if wait:
                orders.append(self._orders.get(timeout=seconds))
            while True:
                orders.append(self._orders.get_nowait())
        except queue.Empty:
            return orders
