"""Slots that take questions at any time, and whose room grows where a question needs more."""

import logging
from collections.abc import Iterator
from typing import Any

from llava_cot_jax.errors import UserError
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.search.answers import Answer
from llava_cot_jax.search.request_builder import RequestBuilder, Requests
from llava_cot_jax.search.room import Room, put_in_room
from llava_cot_jax.search.slot_search import SlotSearch
from llava_cot_jax.search.strategies import SearchSpec


class GrowingSlots:
    """Slots of one search. Whoever drives them puts questions in, decodes, and takes the answers.

    The answer to a question does not depend on the others, nor on when they come or are removed.

    Args:
        model: Model in the unrolled layout.
        builder: Builder of the questions' requests.
        num_slots: Number of questions that are answered at a time.
        prompt_tokens: Number of tokens of a prompt that there is room for at least.
        images: Number of images of a question that there is room for at least.

    Raises:
        UserError: The search may exceed the model's context in this room.
    """

    def __init__(
        self, model: Mllama, builder: RequestBuilder, num_slots: int, *, prompt_tokens: int, images: int
    ) -> None:
        self._model, self._builder, self._num_slots = model, builder, num_slots
        self._room = Room.at_least(builder, prompt_tokens, images)
        self._search: SlotSearch | None = None
        self._steps_before = 0

    @property
    def num_occupied(self) -> int:
        """Number of slots with a question."""
        return self._search.num_occupied if self._search else 0

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

    def admit(self, index: int, requests: Requests) -> bool:
        """Put a question into a free slot, if there is one with room for it, and begin its first stage.

        Where the room must grow, there is none until no slot is occupied.

        Args:
            index: Number of the question.
            requests: Its requests, as the builder has made them.

        Returns:
            Whether the question is in a slot.
        """
        if not self._make_room(Room.of(requests)):
            return False
        assert self._search is not None
        if not self._search.has_free_slot:
            return False
        self._search.admit(index, "the question", put_in_room(requests, self._room, self._model.config))
        return True

    def remove(self, index: int) -> None:
        """Free the slot of a question that nobody waits for any more."""
        if self._search:
            self._search.remove(index)

    def stage_texts(self, index: int, first: int = 0) -> list[str]:
        """Return the winners of the stages so far of a question in a slot, with their tags, from ``first`` on."""
        assert self._search is not None
        return self._search.stage_texts(index, first)

    def begin_decoding(self, max_steps: int | None = None) -> Any:
        """Begin to sample candidates until those of a slot have ended, or for ``max_steps`` steps.

        At least one slot is occupied. Return what ``finish_decoding`` waits for.
        """
        assert self._search is not None
        return self._search.begin_decoding(max_steps)

    def finish_decoding(self, awaited: Any) -> Iterator[tuple[int, Answer | UserError]]:
        """Choose the winners of the stages that have ended, and begin the next ones.

        Yields:
            The number of each question whose search is over, with its answer or what is wrong.
        """
        assert self._search is not None
        return self._search.finish_decoding(awaited)

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
