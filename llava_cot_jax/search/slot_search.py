"""Slots in which questions are answered side by side, driven by the host from stage to stage over compiled pieces."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from PIL import Image

from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.decoding import Samples
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.model.sharding import to_host, without_surroundings
from llava_cot_jax.processing.images import open_image
from llava_cot_jax.search import slots as pieces
from llava_cot_jax.search.answers import Answer, AnswerMaker, check_finite, join_stages, tagged_text
from llava_cot_jax.search.program import SearchProgress, StageResult, default_prefill_chunk
from llava_cot_jax.search.request_builder import RequestBuilder, Requests
from llava_cot_jax.search.room import Room
from llava_cot_jax.search.scorers import OwnScorer, OwnScores, call_scorer
from llava_cot_jax.search.snapshots import OnSearchProgress, SnapshotReporter
from llava_cot_jax.search.trace import stage_name, trace_candidates


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

    def remove(self, index: int) -> None:
        """Free the slot of a question that nobody waits for any more."""
        for slot, occupant in enumerate(self._occupants):
            if occupant is not None and occupant.index == index:
                self._occupants[slot] = None

    def stage_texts(self, index: int, first: int = 0) -> list[str]:
        """Return the winners of a question's stages so far, with their tags, from the stage ``first`` on."""
        (occupant,) = (each for each in self._occupants if each is not None and each.index == index)
        results = enumerate(occupant.stages[first:], first)
        return [self._tagged_texts(i, each.candidates, each.kept)[int(each.winner)] for i, each in results]

    def begin_decoding(self, max_steps: int | None = None) -> Any:
        """Begin to sample candidates until those of a slot have ended, or until a snapshot is due.

        Args:
            max_steps: Largest number of decoding steps; None sets none.

        Return what ``finish_decoding`` waits for.
        """
        occupied = np.array([occupant is not None for occupant in self._occupants])
        if max_steps is None:
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
