"""Answers to questions about images by a search, each with the trace of its search."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh

from llava_cot_jax.checks import check_instance
from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.decoding import nonfinite_logits_error
from llava_cot_jax.inference.generator import cut_by_context
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.model.sharding import without_surroundings
from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.search.program import StageResult, search
from llava_cot_jax.search.prompts import DEFAULT_JUDGE_PROMPTS
from llava_cot_jax.search.request_builder import Images, RequestBuilder, Requests
from llava_cot_jax.search.retracing_search import search_retracing
from llava_cot_jax.search.search_costs import SearchCosts
from llava_cot_jax.search.sentence_search import search_sentences
from llava_cot_jax.search.strategies import MajorityVote, SearchSpec, StageBeam, Strategy, WeightedVote
from llava_cot_jax.search.trace import CandidateTrace, StageTrace, Trace, stage_name, trace_stages
from llava_cot_jax.stage_format import StageFormat
from llava_cot_jax.stages import body_of, find_conclusion, find_stages, normalize_answer

ACCELERATOR_CHUNK, CPU_CHUNK = 256, 64
"""Number of tokens of each question that are prefilled at a time, on an accelerator and on a CPU."""


def default_prefill_chunk(mesh: Mesh | None) -> int:
    """Return the number of tokens to prefill at a time: enough to hide the reading of the weights on an accelerator."""
    device = mesh.devices.flat[0] if mesh else jax.devices()[0]
    return CPU_CHUNK if device.platform == "cpu" else ACCELERATOR_CHUNK


@dataclass(frozen=True)
class Answer:
    """Answer to a question.

    Attributes:
        text: Whole text with its tags.
        stages: Body of each stage, by its name.
        conclusion: Text for the user: the body of the format's conclusion, or the whole text of an answer without it.
        trace: Trace of the search.
    """

    text: str
    stages: dict[str, str]
    conclusion: str
    trace: Trace


class Reasoner:
    """Answers questions about images by a search, which is one compiled call.

    Prompts are padded to buckets: a question of similar length compiles nothing, and neither do other seeds.

    Args:
        model: Model in the unrolled layout.
        processor: Processor of the same checkpoint.
        search: Strategy to search with; by default ``StageBeam()``.
        judge_prompts: YAML file with the prompts of the judge.

    Raises:
        UserError: The model's layers are stacked, an argument is not of its type, or a setting of the search or a
            prompt cannot be used.
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

    def answer(self, image: Images, question: str, *, seed: int = 0) -> Answer:
        """Answer a question about an image, about a list of images, or, with None, without an image.

        Raises:
            UserError: ``RequestBuilder.build`` refuses the question, or the model's logits are not finite.
        """
        return self.answer_batch([image], [question], seeds=seed)[0]

    def answer_batch(
        self, images: Sequence[Images], questions: Sequence[str], *, seeds: Sequence[int] | int = 0
    ) -> list[Answer]:
        """Answer a batch of questions together. Each size of a batch compiles a program of its own.

        Args:
            images: Images of each question: one, several, or None.
            questions: Texts of the questions.
            seeds: Seed of each question's draws, or one seed for all.

        Raises:
            UserError: ``RequestBuilder.build`` refuses the questions, or the model's logits are not finite.
        """
        requests = self._builder.build(images, questions, seeds)
        answers = run_search(self._model, self._builder, requests)
        if requests.is_shrunk:
            for answer in answers:
                _tell_what_was_cut(self._model.config, answer.trace, requests.spec)
        return answers


def program_of(spec: SearchSpec) -> Any:
    """Return the compiled program of a search, a function of ``jax.jit`` with the arguments of ``search``."""
    if spec.rounds:
        return search_retracing
    return search_sentences if spec.max_sentences else search


def run_search(model: Mllama, builder: RequestBuilder, requests: Requests) -> list[Answer]:
    """Search for the answers to requests that ``builder`` has built.

    Raises:
        UserError: The model's logits are not finite.
    """
    start = time.perf_counter()
    config, spec, mesh = model.config, requests.spec, model.mesh
    static = {"config": config, "spec": spec, "prefill_chunk": default_prefill_chunk(mesh), "mesh": mesh}
    inputs = (requests.inputs, builder.stage_tables, builder.scorer_tables)
    with without_surroundings():
        results: StageResult = jax.device_get(program_of(spec)(model.params, *inputs, **static))
    _check_finite(results, model, spec)
    seconds = {"prepare": requests.seconds, "search": time.perf_counter() - start}
    answers = []
    for i, question in enumerate(requests.questions):
        result: StageResult = jax.tree.map(lambda x: x[:, i], results)  # noqa: B023
        stages = trace_stages(builder.processor, spec, result)
        if isinstance(builder.strategy, MajorityVote):
            stages = [_vote(stages[0], spec.format, lambda _: 1.0)]
        if isinstance(builder.strategy, WeightedVote):
            stages = [_vote(stages[0], spec.format, _score_of)]
        costs = SearchCosts(config, spec, result, requests.num_images[i])
        trace = Trace(
            question=question,
            seed=requests.seeds[i],
            strategy=repr(_with_lengths(builder.strategy, spec)),
            stages=stages,
            vision_encoder_calls=min(requests.num_images[i], 1),
            tokens=costs.tokens,
            flops=costs.flops,
            seconds=dict(seconds),
            format=spec.format,
        )
        answers.append(_staged_answer(trace) if spec.stages else _whole_answer(trace))
    return answers


def _with_lengths(strategy: Strategy, spec: SearchSpec) -> Strategy:
    """Return the strategy with the lengths that were searched with in place of those left to the default."""
    if not spec.shrinks or not is_dataclass(strategy):
        return strategy
    return cast(Strategy, replace(strategy, max_new_tokens=spec.max_new_tokens[0]))


def _tell_what_was_cut(config: MllamaConfig, trace: Trace, spec: SearchSpec) -> None:
    """Say which winners were cut off because the context left less than the default length."""
    cut = [name for name, won in trace.path.items() if won.ended == "max_new_tokens"]
    if spec.max_sentences:  # a sentence that is cut goes on in the next one, where the length allows one
        written = sum(won.tokens for won in trace.path.values())
        cut = cut if written >= spec.max_new_tokens[0] else []
    if cut:
        names = ", ".join(cut) if spec.stages else "the answer"
        logging.getLogger(__name__).warning("%s: %s", names, cut_by_context(config, spec.max_new_tokens[0]))


def _check_finite(results: StageResult, model: Mllama, spec: SearchSpec) -> None:
    """Check the log-probabilities and the votes of a search. Logits that are NaN or infinity make them so too."""
    floats = [x for x in jax.tree.leaves(results) if np.issubdtype(x.dtype, np.floating)]  # [stages, questions, ...]
    finite = np.all([np.isfinite(x).reshape(*x.shape[:2], -1).all(axis=-1) for x in floats], axis=0)
    if not finite.all():
        stage, question = np.argwhere(~finite)[0].tolist()
        raise nonfinite_logits_error(f"in the stage {stage_name(spec, stage)} of question {question + 1}", model.dtype)


def _whole_answer(trace: Trace) -> Answer:
    """Return the answer that a search with whole answers, or their sentences, as candidates found."""
    text = trace.whole_text
    assert text is not None
    return Answer(text, find_stages(text, trace.format), find_conclusion(text, trace.format), trace)


def _staged_answer(trace: Trace) -> Answer:
    """Return the answer that a search by stages found."""
    texts, bodies = [], {}
    for marks in trace.format.stages:
        won = trace.path[marks.name]
        bodies[marks.name] = body_of(won.text + won.added, marks)
        texts.append(((marks.opening or "") + won.text + won.added).strip())
    return Answer("\n\n".join(texts), bodies, bodies[trace.format.conclusion], trace)


def _vote(stage: StageTrace, format: StageFormat, weigh: Callable[[CandidateTrace], float]) -> StageTrace:
    """Return the stage with the winner of a vote in which each candidate's conclusion has the weight of ``weigh``."""
    votes = [normalize_answer(find_conclusion(candidate.text, format)) for candidate in stage.candidates]
    weights = [weigh(candidate) for candidate in stage.candidates]
    # fsum rounds once, so that the order of the candidates does not decide between equal sums.
    totals = {vote: math.fsum(w for v, w in zip(votes, weights, strict=True) if v == vote) for vote in votes}

    def rank(i: int) -> tuple[float, float, float, int]:
        return totals[votes[i]], weights[i], stage.candidates[i].mean_log_prob, -i

    return replace(stage, winner=max(range(len(votes)), key=rank))


def _score_of(candidate: CandidateTrace) -> float:
    """Return the score of a candidate that has one."""
    assert candidate.score is not None
    return candidate.score
