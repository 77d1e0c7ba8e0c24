"""Queue of the questions of a job, from which each process takes the next one when it has room for it."""

import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

AnswerRow = Mapping[str, Any]
"""Row with the answer to a question, as JSON has it."""


class QuestionSource(Protocol):
    """Questions for one process, by their numbers, and the place for its answers."""

    def take(self) -> int | None:
        """Return the next question, or None where there is none to begin now."""

    def wait(self) -> int | None:
        """Wait for a question, which another process may give back. Return None once all are answered."""

    def finish(self, question: int, row: AnswerRow) -> None:
        """Hand in the row with the answer to a question."""


class QuestionQueue:
    """Questions that are still to be answered, each of which one process has at a time. All methods are thread-safe.

    Args:
        questions: Numbers of the questions, in the order in which they are begun.
        keep: Function that stores the row with the answer to a question. It is called once for each, in any thread,
            and never twice at a time.
        is_row: Function that says whether a row has the answer to a question.
    """

    def __init__(
        self,
        questions: Iterable[int],
        keep: Callable[[int, AnswerRow], None],
        is_row: Callable[[int, AnswerRow], bool] = lambda question, row: True,
    ) -> None:
        self._changed = threading.Condition()
        self._waiting = deque(questions)
        self._unanswered = set(self._waiting)
        self._holders: dict[int, Hashable] = {}
        self._keep, self._is_row = keep, is_row
        self._fault: BaseException | None = None

    @property
    def is_over(self) -> bool:
        """Whether all questions are answered."""
        return not self._unanswered

    @property
    def has_failed(self) -> bool:
        """Whether a row could not be stored."""
        return self._fault is not None

    def take(self, holder: Hashable) -> int | None:
        """Return the next question for a process, or None where all that are left are with other processes.

        Raises:
            UserError: A row could not be stored.
        """
        with self._changed:
            return self._next(holder)

    def wait(self, holder: Hashable) -> int | None:
        """Wait for a question for a process. Return None once all are answered.

        Raises:
            UserError: A row could not be stored.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self.is_over or self._fault)
            return self._next(holder)

    def hold(self, holder: Hashable, questions: Iterable[int]) -> None:
        """Note that a process has questions already, which it took before this queue was made or its connection broke.

        A question that another process has been given meanwhile is answered by both, and the first answer counts.
        """
        with self._changed:
            for question in set(questions) & set(self._waiting):
                self._waiting.remove(question)
                self._holders[question] = holder

    def give_back(self, holder: Hashable) -> int:
        """Let others take the questions of a process that was lost. Return their number."""
        with self._changed:
            lost = sorted(question for question, of in self._holders.items() if of == holder)
            for question in lost:
                del self._holders[question]
            self._waiting.extendleft(reversed(lost))
            self._changed.notify_all()
        return len(lost)

    def finish(self, question: int, row: AnswerRow) -> None:
        """Store the row with the answer to a question, unless it has one.

        Raises:
            ValueError: The row has no answer to this question.
            UserError: The row, or one before, could not be stored.
        """
        with self._changed:
            self._check()
            if question not in self._unanswered:
                return
            if not self._is_row(question, row):
                raise ValueError(f"the row has no answer to question {question}: {row}")
            try:
                self._keep(question, row)
            except BaseException as fault:
                self._fault = fault
                raise
            finally:
                self._changed.notify_all()
            self._unanswered.discard(question)
            self._holders.pop(question, None)
            if question in self._waiting:  # another process had it and was lost
                self._waiting.remove(question)

    def _next(self, holder: Hashable) -> int | None:
        self._check()
        if not self._waiting:
            return None
        question = self._waiting.popleft()
        self._holders[question] = holder
        return question

    def _check(self) -> None:
        if self._fault:
            raise self._fault


@dataclass(frozen=True)
class QueuedQuestions:
    """Source of questions in the process that has the queue.

    Attributes:
        queue: The queue.
        holder: Name of whoever takes questions.
    """

    queue: QuestionQueue
    holder: Hashable = 0

    def take(self) -> int | None:
        """Return the next question, or None where there is none to begin now."""
        return self.queue.take(self.holder)

    def wait(self) -> int | None:
        """Wait for a question. Return None once all are answered."""
        return self.queue.wait(self.holder)

    def finish(self, question: int, row: AnswerRow) -> None:
        """Hand in the row with the answer to a question."""
        self.queue.finish(question, row)
