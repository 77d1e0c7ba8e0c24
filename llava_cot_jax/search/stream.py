"""Streams of questions: a fixed number of slots over compiled pieces, which the host moves on at the ends of stages."""

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from PIL import Image

from llava_cot_jax.checks import check_bool, check_instance, check_int
from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.decoding import Samples
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.model.sharding import to_host, without_surroundings
from llava_cot_jax.processing.conversation import QuestionOrMessages
from llava_cot_jax.processing.images import open_image
from llava_cot_jax.search import slots as pieces
from llava_cot_jax.search.answers import Answer, AnswerMaker, check_finite, join_stages, tagged_text
from llava_cot_jax.search.program import SearchProgress, StageResult, default_prefill_chunk
from llava_cot_jax.search.request_builder import Images, RequestBuilder, Requests
from llava_cot_jax.search.room import Room, put_in_room
from llava_cot_jax.search.scorers import OwnScorer, OwnScores, call_scorer
from llava_cot_jax.search.snapshots import OnSearchProgress, SnapshotReporter
from llava_cot_jax.search.strategies import SearchSpec
from llava_cot_jax.search.trace import stage_name, trace_candidates

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


@dataclass
class _Occupant:
    """Question in a slot.

    Attributes:
        index: Number of the question.
        place: Words that say in an error which question it is.
        requests: The question, in the room of the slots.
        progress: How far its search is.
        start: Time at which it was put into the slot.
        stages: Result of each stage so far, in host arrays.
        own_scores: Scores by functions of the user's own, by the index of the stage.
        winners: Text of the winner of each stage so far, with its tags; empty where no scorer asks for them.
        images: Its images, opened; None until a scorer needs them.
    """

    index: int
    place: str
    requests: Requests
    progress: SearchProgress
    start: float
    stages: list[StageResult] = field(default_factory=list)
    own_scores: dict[int, OwnScores] = field(default_factory=dict)
    winners: list[str] = field(default_factory=list)
    images: list[Image.Image] | None = None


class SlotSearch:
    """Slots in which questions are answered, driven from the host.

    Args:
        model: Model in the unrolled layout.
        builder: Builder of the questions' requests.
        room: Room of a slot.
        num_slots: Number of slots.
        on_progress: Function that is called with snapshots of the search, for a single slot; None for any number.

    Attributes:
        room: Room of a slot.
        decoding_steps: Number of decoding steps so far, each of which reads the weights once.
    """

    def __init__(
        self,
        model: Mllama,
        builder: RequestBuilder,
        room: Room,
        num_slots: int,
        on_progress: OnSearchProgress | None = None,
    ) -> None:
        self.room, self.decoding_steps = room, 0
        self._model, self._builder = model, builder
        mesh = model.mesh
        self._settings = pieces.SlotSettings(model.config, room.spec, default_prefill_chunk(mesh), mesh)
        self._tables = pieces.SlotTables(builder.stage_tables, builder.scorer_tables)
        self._maker = AnswerMaker(model.config, builder.processor, builder.strategy, room.spec)
        self._occupants: list[_Occupant | None] = [None] * num_slots
        self._slots: pieces.Slots | None = None
        self._reporter = on_progress and SnapshotReporter(on_progress, self._maker)

    @property
    def num_occupied(self) -> int:
        """Number of slots with a question."""
        return sum(occupant is not None for occupant in self._occupants)

    @property
    def has_free_slot(self) -> bool:
        """Whether a question can be admitted."""
        return None in self._occupants

    def admit(self, index: int, place: str, requests: Requests) -> None:
        """Put a question into a free slot, and begin its first stage.

        Args:
            index: Number of the question.
            place: Words that say in an error which question it is.
            requests: Its requests, which have the shapes of the room.
        """
        start, slot = time.perf_counter(), self._occupants.index(None)
        params, inputs = self._model.params, requests.inputs
        with without_surroundings():
            if self._slots is None:
                self._slots = pieces.init_slots(
                    params, inputs, self._tables, settings=self._settings, num_slots=len(self._occupants)
                )
            self._slots, progress = pieces.admit(
                params, self._slots, np.int32(slot), inputs, self._tables, settings=self._settings
            )
        self._occupants[slot] = occupant = _Occupant(index, place, requests, progress, start)
        self._start_stage(slot, occupant)

    def begin_decoding(self) -> Any:
        """Begin to sample candidates until those of a slot have ended, or until a snapshot is due.

        Return what ``finish_decoding`` waits for.
        """
        occupied = np.array([occupant is not None for occupant in self._occupants])
        max_steps = self._reporter.max_steps if self._reporter else max(self.room.spec.max_new_tokens)
        with without_surroundings():
            self._slots, *awaited = pieces.decode(
                self._model.params, self._slots, occupied, np.int32(max_steps), self._tables, settings=self._settings
            )
        return awaited

    def finish_decoding(self, awaited: Any) -> Iterator[tuple[int, Answer | UserError]]:
        """Choose the winners of the stages that have ended, and begin the next ones.

        Yields:
            The number of each question whose search is over, with its answer or what is wrong.
        """
        finished, steps = to_host(awaited, self._model.mesh)
        self.decoding_steps += int(steps)
        if self._reporter and (watched := self._occupants[0]):
            self._reporter.tell_candidates(*self._read_candidates(0, watched))
        for slot in np.flatnonzero(finished).tolist():
            occupant = self._occupants[slot]
            assert occupant is not None
            try:
                self._choose(slot, occupant)
            except UserError as fault:
                self._occupants[slot] = None
                yield occupant.index, fault
                continue
            if self._reporter:
                self._reporter.tell_winner(occupant.stages, occupant.own_scores)
            if len(occupant.stages) < self.room.spec.num_stages:
                self._start_stage(slot, occupant)
            else:
                self._occupants[slot] = None
                yield occupant.index, self._answer(occupant)

    def _start_stage(self, slot: int, occupant: _Occupant) -> None:
        with without_surroundings():
            self._slots = pieces.start_stage(
                self._model.params,
                self._slots,
                np.int32(slot),
                occupant.requests.inputs,
                occupant.progress,
                self._tables,
                settings=self._settings,
            )

    def _choose(self, slot: int, occupant: _Occupant) -> None:
        """Choose the winner of a slot's stage.

        Raises:
            UserError: Logits are not finite, or a scorer of the user's own fails.
        """
        number, place = len(occupant.stages), occupant.place
        scorer, spec, dtype = self.room.spec.own_scorer_of(number), self.room.spec, self._model.dtype
        given = (self._model.params, self._slots, np.int32(slot), occupant.requests.inputs, occupant.progress)
        with without_surroundings():
            if scorer is None:
                chosen = pieces.choose(*given, self._tables, settings=self._settings)
            else:
                scores = self._score(slot, occupant, scorer, place)
                winner = np.array([scores.winner], np.int32)
                chosen = pieces.keep(*given, self._tables, winner, settings=self._settings)
                occupant.own_scores[number] = scores
        chosen, occupant.progress = chosen
        result: StageResult = _of_one_question(to_host(chosen, self._model.mesh))
        occupant.stages.append(result)
        check_finite(occupant.stages, spec, place, dtype)
        if spec.calls_host:
            texts = self._tagged_texts(number, result.candidates, result.kept)
            occupant.winners.append(texts[int(result.winner)])

    def _score(self, slot: int, occupant: _Occupant, scorer: OwnScorer, place: str) -> OwnScores:
        """Let a scorer of the user's own score a slot's candidates."""
        number, spec, requests = len(occupant.stages), self.room.spec, occupant.requests
        candidates, kept = self._read_candidates(slot, occupant)
        if occupant.images is None:
            occupant.images = [open_image(image) for image in requests.images[0]]
        texts = [join_stages([*occupant.winners, text]) for text in self._tagged_texts(number, candidates, kept)]
        name = stage_name(spec, number)
        return call_scorer(scorer, list(occupant.images), requests.questions[0], name, texts, place)

    def _read_candidates(self, slot: int, occupant: _Occupant) -> tuple[Samples, Any]:
        """Return a slot's candidates, in host arrays [candidates, ...], and the number of tokens kept of each."""
        given = (self._model.params, self._slots, np.int32(slot), occupant.requests.inputs, occupant.progress)
        with without_surroundings():
            read = pieces.read_candidates(*given, self._tables, settings=self._settings)
        candidates, kept = _of_one_question(to_host(read, self._model.mesh))
        return candidates, kept

    def _tagged_texts(self, number: int, candidates: Samples, kept: jax.Array) -> list[str]:
        """Return the candidates of a stage with their tags."""
        spec = self.room.spec
        traces = trace_candidates(self._builder.processor, spec, number, candidates, kept)
        return [tagged_text(spec.format, stage_name(spec, number), trace) for trace in traces]

    def _answer(self, occupant: _Occupant) -> Answer:
        requests = occupant.requests
        seconds = {"prepare": requests.seconds, "search": time.perf_counter() - occupant.start}
        return self._maker.make(
            requests.questions[0],
            requests.seeds[0],
            len(requests.images[0]),
            occupant.stages,
            seconds,
            occupant.own_scores,
        )


def _of_one_question(tree: Any) -> Any:
    """Return the arrays of a batch of one question without the axis of questions."""
    return jax.tree.map(lambda x: x[0], tree)


def run_in_slots(
    model: Mllama, builder: RequestBuilder, requests: Requests, on_progress: OnSearchProgress | None = None
) -> list[Answer]:
    """Answer a batch of questions in as many slots, for a search in which the host chooses, or looks on.

    Args:
        model: Model in the unrolled layout.
        builder: Builder of the requests.
        requests: The questions.
        on_progress: Function that is called with snapshots of the search, for a single question.

    Raises:
        UserError: Logits are not finite, or a scorer of the user's own fails.
    """
    count = len(requests.questions)
    search = SlotSearch(model, builder, Room.of(requests), count, on_progress)
    for i in range(count):
        search.admit(i, f"question {i + 1}", requests.question(i))
    answers: dict[int, Answer] = {}
    while search.num_occupied:
        for i, found in search.finish_decoding(search.begin_decoding()):
            if isinstance(found, UserError):
                raise found
            answers[i] = found
    return [answers[i] for i in range(count)]


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
        self._model, self._builder, self._num_slots, self._ordered = model, builder, slots, ordered
        self._room = Room.at_least(builder, prompt_tokens, images)
        self._questions = enumerate(questions)
        self._search: SlotSearch | None = None
        self._steps_before = 0
        self._ahead: _Prepared | None = None
        self._fault: BaseException | None = None
        self._is_over = False
        self._asked: dict[int, Question] = {}  # questions whose answers were not given yet
        self._taken, self._given = 0, 0
        self._answers = self._run()

    @property
    def decoding_steps(self) -> int:
        """Number of decoding steps so far, each of which reads the weights once for all slots."""
        return self._steps_before + (self._search.decoding_steps if self._search else 0)

    @property
    def spec(self) -> SearchSpec:
        """Static part of the search in the slots, whose default length may be shrunk to what the context leaves."""
        return self._room.spec

    @property
    def is_shrunk(self) -> bool:
        """Whether the default length is shrunk to what the context leaves after the longest prompt in the slots."""
        return self._room.spec != self._builder.spec

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
            if self._search is None or not self._search.num_occupied:
                return
            awaited = self._search.begin_decoding()
            self._look_ahead()  # the device samples meanwhile
            for index, found in self._search.finish_decoding(awaited):
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
            if not self._make_room(Room.of(prepared.requests)):
                return
            assert self._search is not None
            if not self._search.has_free_slot:
                return
            self._ahead = None
            self._asked[prepared.index] = prepared.question
            requests = put_in_room(prepared.requests, self._room, self._model.config)
            self._search.admit(prepared.index, "the question", requests)

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

    def _make_room(self, needed: Room) -> bool:
        """Return whether the slots have the room that a question needs; it is made where no slot is occupied."""
        if self._search is not None and self._room.holds(needed):
            return True
        if self._search is not None and self._search.num_occupied:
            return False
        self._room = self._room.grown(needed, self._builder)
        if self._search is not None:
            self._steps_before += self._search.decoding_steps
            logging.getLogger(__name__).warning(
                "the slots grow to prompts of %d tokens with %d images, which compiles the search anew: give these as "
                "prompt_tokens and images to compile once",
                self._room.prompt,
                self._room.images,
            )
        self._search = SlotSearch(self._model, self._builder, self._room, self._num_slots)
        return True
