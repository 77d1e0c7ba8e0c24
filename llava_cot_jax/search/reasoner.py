"""Answers by search: images and questions in, answers with the whole of their search out."""

import string
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import Mesh

from llava_cot_jax.errors import UserError
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.search.request_builder import Images, RequestBuilder, Requests
from llava_cot_jax.search.program import StageResult, search
from llava_cot_jax.search.prompts import DEFAULT_FILE
from llava_cot_jax.search.strategies import MajorityVote, StageBeam, Strategy
from llava_cot_jax.search.trace import SearchCosts, StageTrace, Trace, trace_stage
from llava_cot_jax.stages import find_stages

ACCELERATOR_CHUNK, CPU_CHUNK = 256, 64
"""Tokens of a question that are read at a time."""


def default_prefill_chunk(mesh: Mesh | None) -> int:
    """Tokens of a question to read at a time: on an accelerator as many as hide the reading of the weights."""
    device = mesh.devices.flat[0] if mesh else jax.devices()[0]
    return CPU_CHUNK if device.platform == "cpu" else ACCELERATOR_CHUNK


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        text: all of it, with its tags.
        stages: the body of each stage, by its tag.
        conclusion: what a user is shown: the body of the last stage; of an answer without stages, all of it.
        trace: how it was found.
    """

    text: str
    stages: dict[str, str]
    conclusion: str
    trace: Trace


class Reasoner:
    """Answers questions about images by a search, all of which is one compiled call.

    Prompts are padded to buckets: a question of similar length compiles nothing, and neither do other seeds.

    Args:
        model: in the unrolled layout.
        processor: of the same checkpoint.
        search: how to search.
        judge_prompts: a file to use in place of ``search/judge_prompts.yaml``.

    Raises:
        UserError: the model's layers are stacked, a setting of the search or a prompt cannot be used.
    """

    def __init__(
        self,
        model: Mllama,
        processor: Processor,
        search: Strategy | None = None,
        judge_prompts: str | Path = DEFAULT_FILE,
    ) -> None:
        if model.layout != "unrolled":
            raise UserError("a stacked model keeps no cache: call model.to_layout('unrolled') before decoding")
        self._model = model
        self._preparation = RequestBuilder(processor, search or StageBeam(), judge_prompts)

    def answer(self, image: Images, question: str, *, seed: int = 0) -> Answer:
        """Answer a question about an image, about several, or, with None, about none; errors as ``answer_batch``."""
        return self.answer_batch([image], [question], seeds=seed)[0]

    def answer_batch(
        self, images: Sequence[Images], questions: Sequence[str], *, seeds: Sequence[int] | int = 0
    ) -> list[Answer]:
        """Answer questions side by side; each number of them compiles a program of its own.

        Arguments and errors as for ``RequestBuilder.prepare``.
        """
        return run_search(self._model, self._preparation, self._preparation.prepare(images, questions, seeds))


def run_search(model: Mllama, preparation: RequestBuilder, questions: Requests) -> list[Answer]:
    """The answers to questions that ``preparation`` has prepared, by its search."""
    began = time.perf_counter()
    spec, stages, judging = preparation.spec, preparation.stages, preparation.judging
    static = {"config": model.config, "plan": spec, "chunk": default_prefill_chunk(model.mesh), "mesh": model.mesh}
    found: StageResult = jax.device_get(search(model.params, questions.request, stages, judging, **static))
    seconds = {"prepare": questions.seconds, "search": time.perf_counter() - began}
    answers = []
    for i, question in enumerate(questions.asked):
        own: StageResult = jax.tree.map(lambda x: x[:, i], found)  # noqa: B023
        traces = [
            trace_stage(preparation.processor, spec, number, jax.tree.map(lambda x: x[number], own))  # noqa: B023
            for number in range(len(spec.max_new_tokens))
        ]
        if isinstance(preparation.strategy, MajorityVote):
            traces = [_voted(traces[0])]
        costs = SearchCosts(model.config, spec, own, questions.images[i])
        trace = Trace(
            question=question,
            seed=questions.seeds[i],
            strategy=repr(preparation.strategy),
            stages=traces,
            vision_encoder_calls=min(questions.images[i], 1),
            tokens=costs.tokens,
            flops=costs.flops,
            seconds=dict(seconds),
        )
        answers.append(_answer(trace) if spec.stages else _whole_answer(trace))
    return answers


def _whole_answer(trace: Trace) -> Answer:
    """Of a search whose candidates are whole answers."""
    stage = trace.stages[0]
    text = stage.candidates[stage.winner].text
    return Answer(text, find_stages(text), conclusion(text), trace)


def _answer(trace: Trace) -> Answer:
    """Of a search by stages."""
    parts, bodies, body = [], {}, ""
    for stage in trace.stages:
        won = stage.candidates[stage.winner]
        body = (won.text + won.added).partition(f"</{stage.stage}>")[0].strip()
        bodies[stage.stage] = body
        parts.append((f"<{stage.stage}>" + won.text + won.added).strip())
    return Answer("\n\n".join(parts), bodies, body, trace)


def conclusion(text: str) -> str:
    """The body of the conclusion of a whole answer; all of it where there is none."""
    return find_stages(text).get("CONCLUSION", text.strip())


def _voted(stage: StageTrace) -> StageTrace:
    """The stage with the winner of a majority vote."""
    votes = [_normalized(conclusion(candidate.text)) for candidate in stage.candidates]
    counts = Counter(votes)

    def rank(i: int) -> tuple[int, float]:
        return counts[votes[i]], stage.candidates[i].mean_log_prob

    winner = max(range(len(votes)), key=lambda i: (rank(i), -i))
    return StageTrace(stage.stage, stage.candidates, stage.checks, stage.matches, winner)


def _normalized(text: str) -> str:
    """A conclusion without case, spacing, and punctuation at its ends."""
    return " ".join(text.casefold().split()).strip(string.punctuation + string.whitespace)
