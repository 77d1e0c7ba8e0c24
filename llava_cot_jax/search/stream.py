"""Streams of questions, which are answered some at a time, in a fixed number of slots."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from llava_cot_jax.checks import check_bool, check_instance, check_int
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.processing.conversation import QuestionOrMessages
from llava_cot_jax.search.answers import Answer
from llava_cot_jax.search.growing_slots import GrowingSlots
from llava_cot_jax.search.request_builder import Images, RequestBuilder, Requests
from llava_cot_jax.search.strategies import SearchSpec

DEFAULT_SLOTS = 8
"""Number of questions that are answered at a time."""

WAITING_PER_SLOT = 8
"""Number of answers for each slot that may wait for an earlier one before no further question is begun."""


@dataclass(frozen=True)
class Question:
    """Question of a stream.

    Attributes:
        question: Text of the question, or messages of a conversation that ends with it.
        images: Images that it is about: one, several, or None.
        seed: Seed of its draws.
    """

    question: QuestionOrMessages
    images: Images = None
    seed: int = 0


@dataclass(frozen=True)
class StreamedAnswer:
    """Answer to a question of a stream, or the reason why there is none.

    Attributes:
        index: Place of the question in the stream, from 0.
        question: The question.
        answer: The answer; None where there is none.
        error: What is wrong with the question, an image, what a scorer returned, or the model's logits; None where
            there is an answer.
    """

    index: int
    question: Question
    answer: Answer | None
    error: UserError | None = None


@dataclass(frozen=True)
class _Prepared:
    """Question that was taken from the stream.

    Attributes:
        index: Its place in the stream.
        question: The question.
        requests: Its requests; None where it cannot be encoded.
        error: Why it cannot be encoded.
    """

    index: int
    question: Question
    requests: Requests | None
    error: UserError | None = None


class AnswerStream:
    """Iterator of the answers to a stream of questions.

    One question is taken and encoded ahead, while candidates are sampled. So at most ``slots`` questions are being
    answered, one waits, and, where answers are given in order, at most ``WAITING_PER_SLOT`` answers for each slot wait
    for an earlier one. A question that cannot be encoded, or whose search fails, has a ``StreamedAnswer`` with an
    error, and the others go on. An exception of the iterator of questions is raised after the answers to all the
    questions before it.

    Args:
        model: Model in the unrolled layout.
        builder: Builder of the questions' requests.
        questions: The questions.
        slots: Number of slots.
        ordered: Whether answers are given in the order of the questions.
        prompt_tokens: Number of tokens of a prompt that there is room for at least.
        images: Number of images of a question that there is room for at least.

    Raises:
        UserError: An argument is not of its type or out of range.
    """

    def __init__(
        self,
        model: Mllama,
        builder: RequestBuilder,
        questions: Iterable[Question],
        *,
        slots: int = DEFAULT_SLOTS,
        ordered: bool = True,
        prompt_tokens: int = 1,
        images: int = 0,
    ) -> None:
        check_int("slots", slots)
        check_bool("ordered", ordered)
        check_int("prompt_tokens", prompt_tokens)
        check_int("images", images, least=0)
        check_instance("questions", questions, Iterable, "give an iterable of Question(...)")
        if not builder.spec.can_stream:
            raise UserError(
                f"{type(builder.strategy).__name__} answers no stream of questions: ask with Reasoner.answer_batch, or "
                "search with StageBeam()"
            )
        self._builder, self._num_slots, self._ordered = builder, slots, ordered
        self._slots = GrowingSlots(model, builder, slots, prompt_tokens=prompt_tokens, images=images)
        self._questions = enumerate(questions)
        self._ahead: _Prepared | None = None
        self._fault: BaseException | None = None
        self._is_over = False
        self._asked: dict[int, Question] = {}  # questions whose answers were not given yet
        self._taken, self._given = 0, 0
        self._answers = self._run()

    @property
    def decoding_steps(self) -> int:
        """Number of decoding steps so far, each of which reads the weights once for all slots."""
        return self._slots.decoding_steps

    @property
    def spec(self) -> SearchSpec:
        """Static part of the search in the slots, whose default length may be shrunk to what the context leaves."""
        return self._slots.spec

    @property
    def is_shrunk(self) -> bool:
        """Whether the default length is shrunk to what the context leaves after the longest prompt in the slots."""
        return self._slots.is_shrunk

    def __iter__(self) -> Iterator[StreamedAnswer]:
        return self

    def __next__(self) -> StreamedAnswer:
        return next(self._answers)

    def _run(self) -> Iterator[StreamedAnswer]:
        answers = self._as_they_come()
        for answer in self._in_order(answers) if self._ordered else answers:
            self._given += 1
            yield answer
        if self._fault:
            raise self._fault

    def _in_order(self, answers: Iterable[StreamedAnswer]) -> Iterator[StreamedAnswer]:
        waiting: dict[int, StreamedAnswer] = {}
        for answer in answers:
            waiting[answer.index] = answer
            while self._given in waiting:
                yield waiting.pop(self._given)

    def _as_they_come(self) -> Iterator[StreamedAnswer]:
        while True:
            yield from self._fill()
            if not self._slots.num_occupied:
                return
            awaited = self._slots.begin_decoding()
            self._look_ahead()  # the device samples meanwhile
            for index, found in self._slots.finish_decoding(awaited):
                question = self._asked.pop(index)
                if isinstance(found, UserError):
                    yield StreamedAnswer(index, question, None, found)
                else:
                    yield StreamedAnswer(index, question, found)

    def _fill(self) -> Iterator[StreamedAnswer]:
        """Put questions into free slots. Yield those that cannot be encoded."""
        while self._look_ahead():
            prepared = self._ahead
            assert prepared is not None
            if prepared.requests is None:
                self._ahead = None
                yield StreamedAnswer(prepared.index, prepared.question, None, prepared.error)
                continue
            if not self._slots.admit(prepared.index, prepared.requests):
                return
            self._ahead = None
            self._asked[prepared.index] = prepared.question

    def _look_ahead(self) -> bool:
        """Take and encode the next question, unless one waits. Return whether one does."""
        if self._ahead is None and not self._is_over and not self._must_wait():
            try:
                index, question = next(self._questions)
            except StopIteration:
                self._is_over = True
            except BaseException as fault:  # the answers to the questions before it come first
                self._is_over, self._fault = True, fault
            else:
                self._ahead = self._prepare(index, question)
        return self._ahead is not None

    def _must_wait(self) -> bool:
        """Whether so many answers wait for an earlier one that no further question is begun."""
        if not self._ordered or not self._asked:
            return False
        return self._taken - self._given >= (WAITING_PER_SLOT + 1) * self._num_slots

    def _prepare(self, index: int, question: Question) -> _Prepared:
        self._taken = index + 1
        try:
            check_instance("a question of the stream", question, Question, "give Question(text, images)")
            return _Prepared(
                index, question, self._builder.build([question.images], [question.question], question.seed)
            )
        except UserError as fault:
            return _Prepared(index, question, None, fault)
