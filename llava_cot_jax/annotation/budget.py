"""Bounds on the requests to an endpoint and on their cost, and an estimate of both beforehand."""

import asyncio
import json
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Self

from llava_cot_jax.annotation.dialogue import DialogueRequest
from llava_cot_jax.annotation.journal import USAGE, Journal
from llava_cot_jax.annotation.pace import StopAsking
from llava_cot_jax.annotation.rows import RowToAnnotate

BYTES_PER_TOKEN = 4
"""Bytes of text that an estimate counts as a token."""

TOKENS_PER_IMAGE = 1000
"""Tokens that an estimate counts for an image."""

TOKENS_PER_ANSWER = 400
"""Tokens that an estimate counts for an answer of four sections, which is about as many as LLaVA-CoT-100k has."""

_MILLION = 1_000_000


@dataclass(frozen=True)
class Prices:
    """Prices of a million tokens, in any currency.

    Attributes:
        input: Price of a million tokens that are read.
        output: Price of a million tokens that are written.
    """

    input: float
    output: float

    def cost(self, input_tokens: float, output_tokens: float) -> float:
        """Return the cost of numbers of tokens."""
        return (input_tokens * self.input + output_tokens * self.output) / _MILLION


def estimated_input(request: DialogueRequest) -> int:
    """Return about how many tokens a request has. An endpoint's own count may differ."""
    text = len(json.dumps(request.messages, ensure_ascii=False).encode())
    images = len(request.row.images) if request.has_images else 0
    return math.ceil(text / BYTES_PER_TOKEN) + images * TOKENS_PER_IMAGE


@dataclass(frozen=True)
class Estimate:
    """Estimate of what is still to be asked.

    Attributes:
        turns: Number of turns that are asked about.
        least: Number of requests where every first answer is good, and has the very text of the standard answer.
        most: Number of requests where every try is needed, and checked twice.
        input_tokens: Tokens of the first requests.
        output_tokens: Tokens of their answers.
    """

    turns: int
    least: int
    most: int
    input_tokens: int
    output_tokens: int

    @classmethod
    def of(cls, rows: Sequence[RowToAnnotate], input_tokens: int, tries: int) -> Self:
        """Return the estimate for rows whose first requests have about this many tokens."""
        turns = sum(len(row.turns) for row in rows)
        return cls(turns, turns, turns * tries * 3, input_tokens, turns * TOKENS_PER_ANSWER)

    def described(self, prices: Prices | None, model: str) -> str:
        """Return the estimate as a sentence."""
        text = (
            f"{self.turns:,} turns to ask {model} about, in {self.least:,} requests at least and {self.most:,} at "
            f"most; about {self.input_tokens:,} tokens in and {self.output_tokens:,} out at least"
        )
        if prices is None:
            return f"{text}; --price.input and --price.output would tell the cost"
        return f"{text}, which cost about {prices.cost(self.input_tokens, self.output_tokens):,.4g}"


class Budget:
    """Bounds on the number of requests and on their cost, over all runs that share a journal.

    Before a request is sent, room is taken for what it may cost at most: its estimated input, or more where the
    endpoint has counted more than estimated in this run, and an output of the largest length. It is given back when the
    reply says what it did cost. Until the first reply has told how the endpoint counts, one request is sent at a time
    of those with images, and one of those without.

    Args:
        journal: Journal, whose requests count.
        max_requests: Largest number of requests that are sent, whether they fail or not; None for any number.
        max_cost: Largest cost; None for any.
        prices: Prices of tokens; None where they are not known, which needs ``max_cost`` to be None.
    """

    def __init__(
        self, journal: Journal, max_requests: int | None, max_cost: float | None, prices: Prices | None
    ) -> None:
        self._journal, self._prices = journal, prices
        self._max_requests, self._max_cost = max_requests, max_cost
        self._requests = journal.requests
        self._reserved: list[tuple[bool, float]] = []
        self._factors: dict[bool, float] = {}  # of requests with images and without, from the first reply on
        self._settled = asyncio.Condition()

    @property
    def cost(self) -> float | None:
        """Cost of all requests in the journal; None where no prices are known."""
        return None if self._prices is None else self._prices.cost(*(self._journal.tokens[name] for name in USAGE))

    def count_request(self) -> None:
        """Count a request that is about to be sent.

        Raises:
            StopAsking: There have been as many as there may be.
        """
        if self._max_requests is not None and self._requests >= self._max_requests:
            raise StopAsking(f"--max_requests {self._max_requests} is reached")
        self._requests += 1

    def uncount_request(self) -> None:
        """Take back that a request was counted, as it could not be sent."""
        self._requests -= 1

    def note_usage(self, request: DialogueRequest, input_tokens: int) -> None:
        """Take note of how many tokens an endpoint counts for a request, which may be many more than are estimated."""
        factor = input_tokens / estimated_input(request)
        self._factors[request.has_images] = max(self._factors.get(request.has_images, 1.0), factor)

    def assumed_usage(self, request: DialogueRequest) -> dict[str, int]:
        """Return what a request takes at most, as far as the replies so far tell, by the keys of ``USAGE``."""
        factor = self._factors.get(request.has_images, 1.0)
        counts = math.ceil(factor * estimated_input(request)), request.settings.max_new_tokens
        return dict(zip(USAGE, counts, strict=True))

    @asynccontextmanager
    async def room_for(self, request: DialogueRequest) -> AsyncIterator[None]:
        """Take room for what a request may cost, until the block ends, in which the journal takes what became of it.

        Where requests in flight have taken the room, it is waited for.

        Raises:
            StopAsking: There is not enough left.
        """
        if self._prices is None or self._max_cost is None:
            yield
            return
        kind = request.has_images
        async with self._settled:
            while kind not in self._factors and any(other == kind for other, _ in self._reserved):
                await self._settled.wait()
            while True:
                cost = self._prices.cost(*self.assumed_usage(request).values())
                if (self.cost or 0.0) + sum(each for _, each in self._reserved) + cost <= self._max_cost:
                    break
                if not self._reserved:
                    raise StopAsking(f"--max_cost {self._max_cost:g} leaves no room for another request")
                await self._settled.wait()
            self._reserved.append((kind, cost))
        try:
            yield
        finally:
            async with self._settled:
                self._reserved.remove((kind, cost))
                self._settled.notify_all()
