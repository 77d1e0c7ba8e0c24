"""Answers to questions about images by a search, each with the trace of its search."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_cot_jax.checks import check_instance
from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.generator import cut_by_context
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.model.sharding import to_host, without_surroundings
from llava_cot_jax.processing.conversation import QuestionOrMessages
from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.search.answers import Answer, AnswerMaker, check_finite
from llava_cot_jax.search.program import StageResult, default_prefill_chunk, search
from llava_cot_jax.search.prompts import DEFAULT_JUDGE_PROMPTS
from llava_cot_jax.search.request_builder import Images, RequestBuilder, Requests
from llava_cot_jax.search.retracing_search import search_retracing
from llava_cot_jax.search.sentence_search import search_sentences
from llava_cot_jax.search.slot_search import run_in_slots
from llava_cot_jax.search.snapshots import OnSearchProgress, check_progress_function
from llava_cot_jax.search.strategies import SearchSpec, StageBeam, Strategy
from llava_cot_jax.search.stream import DEFAULT_SLOTS, AnswerStream, Question
from llava_cot_jax.search.trace import Trace, split_stages


class Reasoner:
    """Answers questions about images by a search, which is one compiled call unless a scorer is a function.

    Prompts are padded to buckets: a question of similar length compiles nothing, and neither do other seeds.

    Where the model is on the devices of several processes, all of them ask the same questions in the same order, with
    the same arguments, and each gets every answer.

    Args:
        model: Model in the unrolled layout.
        processor: Processor of the same checkpoint.
        search: Strategy to search with; by default ``StageBeam()``.
        judge_prompts: YAML file with the prompts of the judge.

    Raises:
        UserError: The model's layers are stacked, an argument is not of its type, or a setting of the search or a
            prompt cannot be used. Or a scorer is a function, and the model is on the devices of several processes.
    """

    def __init__(
        self,
        model: Mllama,
        processor: Processor,
        search: Strategy | None = None,
        judge_prompts: str | Path = DEFAULT_JUDGE_PROMPTS,
    ) -> None:
        check_instance("model", model, Mllama, "give an Mllama")
        if model.layout != "unrolled":
            raise UserError("a stacked model keeps no cache: call model.to_layout('unrolled') before decoding")
        self._model = model
        self._builder = RequestBuilder(processor, StageBeam() if search is None else search, judge_prompts)
        if self._builder.spec.calls_host and model.mesh is not None and model.mesh.is_multi_process:
            raise UserError(
                "a scorer is a function, which each process would call for itself, and the model is on the devices of "
                "several: give Judge(), Verifier() or LogProbability(), or answer in one process"
            )

    def answer(
        self,
        image: Images,
        question: QuestionOrMessages,
        *,
        seed: int = 0,
        on_progress: OnSearchProgress | None = None,
    ) -> Answer:
        """Answer a question about an image, about a list of images, or, with None, without an image.

        Instead of its text, a question may be a conversation: messages as transformers takes them, of which the last is
        the user's. Images stand in the messages, or ``image`` has those that have no source there, in order. A judge is
        told the texts of all messages, and shown all images.

        With ``on_progress``, a function that is called with each ``SearchSnapshot``, the search runs as a few compiled
        programs, between which the candidates are read. The answer is the same, but for rounding.

        Raises:
            UserError: ``RequestBuilder.build`` refuses the question, the model's logits are not finite, or the search
                tells no progress.
        """
        if on_progress is not None:
            check_progress_function(on_progress, self._builder.spec, self._builder.strategy, self._model.mesh)
        return self._answer_all([image], [question], seed, on_progress)[0]

    def answer_batch(
        self, images: Sequence[Images], questions: Sequence[QuestionOrMessages], *, seeds: Sequence[int] | int = 0
    ) -> list[Answer]:
        """Answer a batch of questions together. Each size of a batch compiles a program of its own.

        Args:
            images: Images of each question: one, several, or None.
            questions: Questions, each as ``answer`` takes it.
            seeds: Seed of each question's draws, or one seed for all.

        Raises:
            UserError: ``RequestBuilder.build`` refuses the questions, or the model's logits are not finite.
        """
        return self._answer_all(images, questions, seeds)

    def _answer_all(
        self,
        images: Sequence[Images],
        questions: Sequence[QuestionOrMessages],
        seeds: Sequence[int] | int,
        on_progress: OnSearchProgress | None = None,
    ) -> list[Answer]:
        requests = self._builder.build(images, questions, seeds)
        answers = run_search(self._model, self._builder, requests, on_progress)
        if requests.spec != self._builder.spec:
            for answer in answers:
                _tell_what_was_cut(self._model.config, answer.trace, requests.spec)
        return answers

    def answer_stream(
        self,
        questions: Iterable[Question],
        *,
        slots: int = DEFAULT_SLOTS,
        ordered: bool = True,
        prompt_tokens: int = 1,
        images: int = 0,
    ) -> AnswerStream:
        """Answer any number of questions with bounded memory, some of them at a time.

        The questions being answered share the steps of one decoding loop, in whatever stages they are. When one is
        answered, the next takes its slot. An answer does not depend on the others.

        Args:
            questions: The questions. The next is taken when a slot is about to be free.
            slots: Number of questions that are answered at a time.
            ordered: Whether to give the answers in the order of the questions, rather than as they come.
            prompt_tokens: Number of tokens of a prompt that the slots have room for at least.
            images: Number of images of a question that the slots have room for at least. Where a question needs more
                room, the slots grow once those before it are answered. This compiles the search anew, and a warning
                says so.

        Raises:
            UserError: An argument is not of its type or out of range.
        """
        return AnswerStream(
            self._model,
            self._builder,
            questions,
            slots=slots,
            ordered=ordered,
            prompt_tokens=prompt_tokens,
            images=images,
        )


def program_of(spec: SearchSpec) -> Any:
    """Return the compiled program of a search, a function of ``jax.jit`` with the arguments of ``search``."""
    if spec.rounds:
        return search_retracing
    return search_sentences if spec.max_sentences else search


def run_search(
    model: Mllama, builder: RequestBuilder, requests: Requests, on_progress: OnSearchProgress | None = None
) -> list[Answer]:
    """Search for the answers to requests that ``builder`` has built.

    Args:
        model: Model in the unrolled layout.
        builder: Builder of the requests.
        requests: The questions.
        on_progress: Function that is called with snapshots of the search of a single question.

    Raises:
        UserError: The model's logits are not finite, or a scorer of the user's own fails.
    """
    if requests.spec.calls_host or on_progress:
        return run_in_slots(model, builder, requests, on_progress)
    places = [f"question {i + 1}" for i in range(len(requests.questions))]
    answers = list[Answer]()
    for found in search_together(model, builder, requests, places):
        if isinstance(found, UserError):
            raise found
        answers.append(found)
    return answers


def search_together(
    model: Mllama, builder: RequestBuilder, requests: Requests, places: Sequence[str]
) -> list[Answer | UserError]:
    """Search for the answers to a batch of questions in one compiled call.

    Args:
        model: Model in the unrolled layout.
        builder: Builder of the requests.
        requests: The questions.
        places: Words that say in an error which question it is.

    Returns:
        The answer to each question, or what is wrong with its numbers.
    """
    results, seconds = run_program(program_of(requests.spec), model, builder, requests)
    return make_answers(model, builder, requests, places, results, seconds)


def run_program(
    program: Callable[..., StageResult], model: Mllama, builder: RequestBuilder, requests: Requests
) -> tuple[Any, dict[str, float]]:
    """Run the compiled program of a search on a batch of questions.

    Args:
        program: Function of ``jax.jit`` with the arguments of ``program.search``.
        model: Model in the unrolled layout.
        builder: Builder of the requests.
        requests: The questions.

    Returns:
        The result of the program in host arrays, and the seconds by what they were spent on.
    """
    start = time.perf_counter()
    static = {
        "config": model.config,
        "spec": requests.spec,
        "prefill_chunk": default_prefill_chunk(model.mesh),
        "mesh": model.mesh,
    }
    inputs = (requests.inputs, builder.stage_tables, builder.scorer_tables)
    with without_surroundings():
        results = to_host(program(model.params, *inputs, **static), model.mesh)
    return results, {"prepare": requests.seconds, "search": time.perf_counter() - start}


def make_answers(
    model: Mllama,
    builder: RequestBuilder,
    requests: Requests,
    places: Sequence[str],
    results: StageResult,
    seconds: Mapping[str, float],
) -> list[Answer | UserError]:
    """Return the answer to each question of a batch, or what is wrong with its numbers.

    Args:
        model: Model in the unrolled layout.
        builder: Builder of the requests.
        requests: The questions.
        places: Words that say in an error which question it is.
        results: Results of the program, in host arrays.
        seconds: Seconds by what they were spent on.
    """
    maker = AnswerMaker(model.config, builder.processor, builder.strategy, requests.spec)
    answers = list[Answer | UserError]()
    for i, (question, seed, images) in enumerate(zip(requests.questions, requests.seeds, requests.images, strict=True)):
        stages = split_stages(results, i)
        try:
            check_finite(stages, requests.spec, places[i], model.dtype)
        except UserError as fault:
            answers.append(fault)
        else:
            answers.append(maker.make(question, seed, len(images), stages, seconds))
    return answers


def _tell_what_was_cut(config: MllamaConfig, trace: Trace, spec: SearchSpec) -> None:
    """Say which winners were cut off because the context left less than the default length."""
    winners = list(trace.path.items())
    if spec.max_sentences:  # a sentence that is cut goes on in the next one, where the length allows one
        written = sum(won.tokens for _, won in winners)
        winners = winners[-1:] if written >= spec.max_new_tokens[0] else []
    cut = [name for name, won in winners if won.ended == "max_new_tokens"]
    if cut:
        names = ", ".join(cut) if spec.stages else "the answer"
        logging.getLogger(__name__).warning("%s: %s", names, cut_by_context(config, spec.max_new_tokens[0]))
