"""Sampling of candidates for many rows side by side, as a stream, with the model of this project."""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llava_cot_jax.annotation.job import AnnotationJob
from llava_cot_jax.annotation.outcomes import RowOutcome
from llava_cot_jax.annotation.rows import RowToAnnotate
from llava_cot_jax.annotation.sampling import SampleRequest
from llava_cot_jax.data.raw.images import RawImages
from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.decoding import bucket
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.processing.conversation import read_conversation
from llava_cot_jax.search.answers import Answer
from llava_cot_jax.search.request_builder import RequestBuilder
from llava_cot_jax.search.stream import AnswerStream, Question
from llava_cot_jax.search.tables import token_ids


class RowSampler:
    """Sampler of candidates for rows.

    Requests that need the same room are answered as one stream, so that a reply depends on its request alone, and not
    on which others were answered before an interruption.

    Args:
        builder: Builder of the questions' requests, whose strategy samples whole answers that the verifier scores.
        images: Images of the rows.
        slots: Number of questions that are answered at a time.
    """

    def __init__(self, builder: RequestBuilder, images: RawImages, slots: int) -> None:
        self._builder, self._images, self._slots = builder, images, slots

    def run(self, model: Mllama, job: AnnotationJob, on_row: Callable[[RowToAnnotate, RowOutcome], None]) -> None:
        """Sample until each row has its outcome.

        Args:
            model: Model in the unrolled layout.
            job: The job.
            on_row: Function that is called with each row that is finished.

        Raises:
            UserError: A reply cannot be kept.
        """
        waiting = [request for _, request in job.outcomes() if not isinstance(request, RowOutcome)]
        while waiting:
            groups: defaultdict[tuple[int, int], list[SampleRequest]] = defaultdict(list)
            for request in waiting:
                groups[self._room(request)].append(request)
            waiting = []
            for room, requests in sorted(groups.items()):
                for request in self._sample(model, job, room, requests):
                    then = job.replay(request.row)
                    if isinstance(then, RowOutcome):
                        on_row(request.row, then)
                    else:
                        waiting.append(then)

    def _room(self, request: SampleRequest) -> tuple[int, int]:
        """Return the numbers of prompt tokens and images that a request needs room for."""
        builder, count = self._builder, len(request.row.images)
        prompt = builder.prompt(read_conversation(list(request.messages), [b""] * count))
        tokens = len(token_ids(builder.processor, prompt))
        with contextlib.suppress(UserError):  # where the context holds no more than the prompt
            header = builder.chat_headers([count]).capacity
            builder.fitting_spec(bucket(tokens), bucket(tokens), header)
            return bucket(tokens), count
        return tokens, count

    def _sample(
        self, model: Mllama, job: AnnotationJob, room: tuple[int, int], requests: Sequence[SampleRequest]
    ) -> Iterator[SampleRequest]:
        """Keep the reply to each request, and yield it."""
        prompt_tokens, images = room
        asked: list[SampleRequest] = []
        failed: list[tuple[SampleRequest, str]] = []
        unread: list[SampleRequest] = []
        try:
            stream = AnswerStream(
                model,
                self._builder,
                self._questions(requests, asked, unread, job),
                slots=self._slots,
                ordered=False,
                prompt_tokens=prompt_tokens,
                images=images,
            )
        except UserError as fault:  # the prompts leave no room for an answer
            failed = [(request, str(fault)) for request in requests]
        else:
            for streamed in stream:
                request = asked[streamed.index]
                if streamed.answer is None:
                    failed.append((request, str(streamed.error)))
                    continue
                job.journal.add(request, {"candidates": candidates_of(streamed.answer)})
                yield request
        for request, error in failed:  # which is no reply for another run, that may have other images
            job.journal.hold(request, {"error": error})
            yield request
        yield from unread

    def _questions(
        self,
        requests: Sequence[SampleRequest],
        asked: list[SampleRequest],
        unread: list[SampleRequest],
        job: AnnotationJob,
    ) -> Iterator[Question]:
        """Yield the questions of requests, which are added to ``asked``, or to ``unread`` if an image is unreadable.

        That may pass, and is no reply for another run.
        """
        for request in requests:
            try:
                images: list[Any] = [self._images.read(image.name) for image in request.row.images]
            except UserError as fault:
                job.journal.hold(request, {"error": str(fault)})
                unread.append(request)
                continue
            asked.append(request)
            yield Question(list(request.messages), images, request.seed)


def candidates_of(answer: Answer) -> list[dict[str, Any]]:
    """Return the candidates of a search for whole answers, as ``sample_for_row`` takes them."""
    (stage,) = answer.trace.stages
    return [{"text": each.text, "score": each.score, "mean_log_prob": each.mean_log_prob} for each in stage.candidates]
