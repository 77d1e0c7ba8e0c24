"""The thread that owns jax: it takes questions at any time, and answers those of one search side by side."""

import logging
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llava_cot_jax.errors import UserError
from llava_cot_jax.memory_errors import describe_exhausted_memory
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.search.answers import Answer
from llava_cot_jax.search.growing_slots import GrowingSlots
from llava_cot_jax.search.request_builder import RequestBuilder, Requests
from llava_cot_jax.search.strategies import Strategy
from llava_cot_jax.serving.orders import (
    Answered,
    Deliver,
    Drop,
    Forget,
    NoAnswer,
    Order,
    OrderSource,
    StageWon,
    Stop,
    Task,
)

STEPS_AT_A_TIME = 32
"""Number of decoding steps after which new questions are begun, and those that nobody waits for are let go."""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineSettings:
    """Sizes of what answers the questions of one search.

    Attributes:
        slots: Number of questions that are answered at a time.
        prompt_tokens: Number of tokens of a prompt that there is room for at least.
        images: Number of images of a question that there is room for at least.
        survives: Whether other questions go on after a failure, which they cannot where other processes share it.
    """

    slots: int
    prompt_tokens: int
    images: int
    survives: bool = True


class QuestionPool:
    """Questions of one search: those that wait, and those in slots.

    Args:
        model: Model in the unrolled layout.
        builder: Builder of the questions' requests.
        settings: Sizes.
        deliver: Function that takes the reports.

    Raises:
        UserError: The search may exceed the model's context in this room.
    """

    def __init__(self, model: Mllama, builder: RequestBuilder, settings: EngineSettings, deliver: Deliver) -> None:
        self._builder, self._deliver = builder, deliver
        self._slots = GrowingSlots(
            model, builder, settings.slots, prompt_tokens=settings.prompt_tokens, images=settings.images
        )
        self._waiting: deque[Task] = deque()
        self._ahead: tuple[Task, Requests] | None = None
        self._begun: dict[int, Task] = {}
        self._told: dict[int, int] = {}  # numbers of stages, by task

    @property
    def tasks(self) -> list[Task]:
        """All questions that have no answer yet."""
        ahead = [] if self._ahead is None else [self._ahead[0]]
        return [*self._begun.values(), *ahead, *self._waiting]

    def add(self, task: Task) -> None:
        """Let a question wait for a slot."""
        self._waiting.append(task)

    def drop(self, number: int) -> None:
        """Let a question go, wherever it is."""
        self._waiting = deque(task for task in self._waiting if task.number != number)
        if self._ahead is not None and self._ahead[0].number == number:
            self._ahead = None
        if self._begun.pop(number, None):
            self._slots.remove(number)

    def warm_up(self, requests: Requests) -> None:
        """Compile all programs of the search, and of its room, by the first stage of a question."""
        self._slots.admit(0, requests)
        while self._slots.num_occupied and not self._slots.stage_texts(0):
            list(self._slots.finish_decoding(self._slots.begin_decoding(STEPS_AT_A_TIME)))
        self._slots.remove(0)

    def step(self) -> None:
        """Put questions into free slots, decode for a while, and report what that has brought."""
        while self._look_ahead():
            assert self._ahead is not None
            task, requests = self._ahead
            if not self._slots.admit(task.number, requests):
                break
            self._ahead, self._begun[task.number] = None, task
        if not self._slots.num_occupied:
            return
        awaited = self._slots.begin_decoding(STEPS_AT_A_TIME)
        self._look_ahead()  # the device samples meanwhile
        for number, found in self._slots.finish_decoding(awaited):
            del self._begun[number]
            self._deliver(number, self._report(found))
        self._tell_stages()

    def _report(self, found: Answer | UserError) -> Answered | NoAnswer:
        if isinstance(found, UserError):
            return NoAnswer(str(found), is_mistake=False)
        return Answered(found, self._slots.is_shrunk)

    def _look_ahead(self) -> bool:
        """Encode the next question, unless one is encoded. Return whether one is."""
        while self._ahead is None and self._waiting:
            task = self._waiting[0]  # which waits until it is encoded, so that it is among ``tasks`` after a failure
            try:
                self._ahead = task, self._builder.build([None], [task.messages], task.seed)
            except UserError as fault:
                self._deliver(task.number, NoAnswer(str(fault), is_mistake=True))
            self._waiting.popleft()
        return self._ahead is not None

    def _tell_stages(self) -> None:
        format = self._builder.spec.format
        told = {number: self._told.get(number, 0) for number, task in self._begun.items() if task.tells_stages}
        self._told = {}
        for number, first in told.items():
            texts = self._slots.stage_texts(number, first)
            self._told[number] = first + len(texts)
            names = self._builder.spec.stages[first:]
            if shown := [text for name, text in zip(names, texts, strict=False) if name != format.conclusion]:
                self._deliver(number, StageWon(shown))


class AnsweringEngine:
    """Answers questions by several searches, which share one model.

    Args:
        model: Model in the unrolled layout.
        new_builder: Function that returns the builder of the requests of a search.
        settings: Sizes of what answers the questions of one search.
        source: Source of the orders.
        deliver: Function that takes the reports.
    """

    def __init__(
        self,
        model: Mllama,
        new_builder: Callable[[Strategy], RequestBuilder],
        settings: EngineSettings,
        source: OrderSource,
        deliver: Deliver,
    ) -> None:
        self._model, self._new_builder, self._settings = model, new_builder, settings
        self._source, self._deliver = source, deliver
        self._pools: dict[Strategy, QuestionPool] = {}

    def warm_up(self, strategies: Sequence[Strategy], image: Any) -> None:
        """Compile the programs of searches.

        Args:
            strategies: The searches.
            image: Image of the question that is asked.

        Raises:
            UserError: A search cannot be used with this checkpoint, or not in this room.
        """
        for strategy in strategies:
            pool = self._pool(strategy)
            images = [image] * self._settings.images
            pool.warm_up(self._new_builder(strategy).build([images], ["?"], 0))

    def run(self) -> None:
        """Follow orders until the one to stop."""
        while True:
            for order in self._source.take(wait=not any(pool.tasks for pool in self._pools.values())):
                if isinstance(order, Stop):
                    return
                self._follow(order)
            for strategy in list(self._pools):
                self._step(strategy)

    def _step(self, strategy: Strategy) -> None:
        """Go on with the questions of a search. After a failure, nothing here keeps what was on the devices."""
        pool = self._pools[strategy]
        if not pool.tasks:
            return
        try:
            pool.step()
        except Exception as fault:
            del self._pools[strategy]  # the next question begins anew
            for task in pool.tasks:
                self._refuse(task, fault)

    def _follow(self, order: Order) -> None:
        match order:
            case Task():
                try:
                    self._pool(order.strategy).add(order)
                except Exception as fault:
                    self._refuse(order, fault)
            case Drop(number):
                for pool in self._pools.values():
                    pool.drop(number)
            case Forget(strategy):
                self._pools.pop(strategy, None)

    def _pool(self, strategy: Strategy) -> QuestionPool:
        if strategy not in self._pools:
            builder = self._new_builder(strategy)
            self._pools[strategy] = QuestionPool(self._model, builder, self._settings, self._deliver)
        return self._pools[strategy]

    def _refuse(self, task: Task, fault: Exception) -> None:
        if isinstance(fault, UserError):
            self._deliver(task.number, NoAnswer(str(fault), is_mistake=True))
            return
        if not self._settings.survives:
            raise fault
        message = describe_exhausted_memory(fault) or f"the search has failed: {type(fault).__name__}"
        _LOG.error("%s\n%s", message, "".join(traceback.format_exception(fault)))
        self._deliver(task.number, NoAnswer(message, is_mistake=False))
