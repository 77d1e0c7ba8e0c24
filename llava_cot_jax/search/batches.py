"""Batches of questions of one shape, for searches that no host can drive from stage to stage."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import jax
import numpy as np

from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.ragged_tokens import RaggedTokens
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.search.answers import Answer
from llava_cot_jax.search.program import SearchInputs
from llava_cot_jax.search.reasoner import search_together
from llava_cot_jax.search.request_builder import RequestBuilder, Requests
from llava_cot_jax.search.room import Room, put_in_room
from llava_cot_jax.search.strategies import SearchSpec
from llava_cot_jax.search.stream import DEFAULT_SLOTS, Question, StreamedAnswer

SearchTogether = Callable[[Mllama, RequestBuilder, Requests, Sequence[str]], Sequence[Answer | UserError]]
"""Function that answers a batch of questions, as ``search_together`` does."""


class AnswerBatches:
    """Iterable of the answers to questions, which are answered in batches of one size.

    All batches have one shape: their questions are padded to the same room, and the last batch is filled up with copies
    of a question. So an answer does not depend on the questions beside it. A question that cannot be encoded, or whose
    search fails, has a ``StreamedAnswer`` with an error, and the others go on.

    Args:
        model: Model in the unrolled layout.
        builder: Builder of the questions' requests.
        questions: The questions.
        size: Number of questions of a batch.
        prompt_tokens: Number of tokens of a prompt that there is room for at least.
        images: Number of images of a question that there is room for at least. Where a question needs more room, it
            grows, which compiles the search anew.
        search: Function that answers a batch, with the arguments of ``search_together``.
    """

    def __init__(
        self,
        model: Mllama,
        builder: RequestBuilder,
        questions: Iterable[Question],
        *,
        size: int = DEFAULT_SLOTS,
        prompt_tokens: int = 1,
        images: int = 0,
        search: SearchTogether = search_together,
    ) -> None:
        self._search = search
        self._model, self._builder, self._questions, self._size = model, builder, questions, size
        room = Room.at_least(builder, prompt_tokens, images)
        self._room = room.grown(room, builder)

    @property
    def spec(self) -> SearchSpec:
        """Static part of the search, whose default length may be shrunk to what the context leaves."""
        return self._room.spec

    @property
    def is_shrunk(self) -> bool:
        """Whether the default length is shrunk to what the context leaves after the longest prompt."""
        return self._room.spec != self._builder.spec

    def __iter__(self) -> Iterator[StreamedAnswer]:
        batch: list[tuple[int, Question, Requests]] = []
        for index, question in enumerate(self._questions):
            try:
                requests = self._builder.build([question.images], [question.question], question.seed)
            except UserError as fault:
                yield StreamedAnswer(index, question, None, fault)
                continue
            batch.append((index, question, requests))
            if len(batch) == self._size:
                yield from self._answer(batch)
                batch = []
        if batch:
            yield from self._answer(batch)

    def _answer(self, batch: Sequence[tuple[int, Question, Requests]]) -> Iterator[StreamedAnswer]:
        """Answer at most as many questions together as a batch has."""
        given = [requests for _, _, requests in batch]
        for requests in given:
            if not self._room.holds(needed := Room.of(requests)):
                self._room = self._room.grown(needed, self._builder)
        padded = [put_in_room(requests, self._room, self._model.config) for requests in given]
        padded += padded[-1:] * (self._size - len(padded))
        found = self._search(self._model, self._builder, join_requests(padded), ["the question"] * self._size)
        for (index, question, _), answer in zip(batch, found, strict=False):
            if isinstance(answer, UserError):
                yield StreamedAnswer(index, question, None, answer)
            else:
                yield StreamedAnswer(index, question, answer)


def join_requests(requests: Sequence[Requests]) -> Requests:
    """Return the batch of requests whose arrays have the same shapes, each of one question."""
    inputs = [each.inputs for each in requests]
    joined = SearchInputs(
        model_inputs={name: _join([each.model_inputs[name] for each in inputs]) for name in inputs[0].model_inputs},
        lengths=_join([each.lengths for each in inputs]),
        seeds=_join([each.seeds for each in inputs]),
        question=_join_tokens([each.question for each in inputs]),
        chat_headers=_join_tokens([each.chat_headers for each in inputs], axis=1),
    )
    return replace(
        requests[0],
        inputs=joined,
        questions=[question for each in requests for question in each.questions],
        images=[images for each in requests for images in each.images],
        seeds=[seed for each in requests for seed in each.seeds],
        seconds=sum(each.seconds for each in requests),
    )


def _join(arrays: Sequence[jax.Array], axis: int = 0) -> jax.Array:
    """Return arrays joined along an axis, which is done on the host, where nothing is compiled."""
    return jax.device_put(np.concatenate([np.asarray(x) for x in arrays], axis=axis))


def _join_tokens(tokens: Sequence[RaggedTokens], axis: int = 0) -> RaggedTokens:
    return RaggedTokens(_join([each.tokens for each in tokens], axis), _join([each.lengths for each in tokens], axis))
