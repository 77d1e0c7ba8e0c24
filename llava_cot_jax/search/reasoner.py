"""Answers by search: images and questions in, answers with the whole of their search out."""

import string
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from llava_cot_jax.data.processor import Processor
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.search.preparation import Images, Preparation, listed
from llava_cot_jax.search.program import StageFindings, search
from llava_cot_jax.search.prompts import DEFAULT_FILE
from llava_cot_jax.search.strategies import MajorityVote, StageBeam, Strategy
from llava_cot_jax.search.trace import Costs, StageTrace, Trace, trace_stage
from llava_cot_jax.stages import find_stages


def chunk_of(model: Mllama) -> int:
    """Tokens of a question to read at a time: on an accelerator as many as hide the reading of the weights."""
    device = model.mesh.devices.flat[0] if model.mesh else jax.devices()[0]
    return 64 if device.platform == "cpu" else 256


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
        self.search: Strategy = search or StageBeam()
        self._model = model
        self._processor = processor
        self._prepared = Preparation(processor, self.search, judge_prompts)

    def answer(self, image: Images, question: str, *, seed: int = 0) -> Answer:
        """Answer a question about an image, about several, or, with None, about none; errors as ``answer_batch``."""
        return self.answer_batch([image], [question], seeds=[seed])[0]

    def answer_batch(
        self, images: Sequence[Images], questions: Sequence[str], *, seeds: Sequence[int] | int = 0
    ) -> list[Answer]:
        """Answer questions side by side; each number of them compiles a program of its own.

        Args:
            images: of each question: one, several, or None.
            questions: as many.
            seeds: of each question's draws, or of every one's.

        Raises:
            UserError: images and questions that do not match, a special token in a question, an image that
                cannot be read, a seed out of range, or a search that may exceed the model's context.
        """
        began = time.perf_counter()
        rows = np.broadcast_to(np.asarray(seeds), len(questions)).tolist()
        request = self._prepared.request(images, questions, rows)
        prepared = time.perf_counter()
        model, tables = self._model, self._prepared
        static = {"config": model.config, "plan": tables.plan, "chunk": chunk_of(model), "mesh": model.mesh}
        found: StageFindings = jax.device_get(search(model.params, request, tables.stages, tables.judging, **static))
        seconds = {"prepare": prepared - began, "search": time.perf_counter() - prepared}
        return [
            self._answer(found, i, question, len(listed(images[i])), rows[i], seconds)
            for i, question in enumerate(questions)
        ]

    def _answer(
        self, found: StageFindings, i: int, question: str, images: int, seed: int, seconds: dict[str, float]
    ) -> Answer:
        processor, plan = self._processor, self._prepared.plan
        costs, length, stages = Costs(self._model.config, images), 0, []
        for number in range(len(plan.budgets)):
            here: StageFindings = jax.tree.map(lambda x: x[number, i], found)  # noqa: B023
            stages.append(trace_stage(processor, plan, number, here))
            length = costs.stage(plan, number, here, length)
        if isinstance(self.search, MajorityVote):
            stages = [_voted(stages[0])]
        trace = Trace(
            question, seed, repr(self.search), stages, min(images, 1), costs.tokens, costs.flops, dict(seconds)
        )
        if not plan.stages:
            text = stages[0].candidates[stages[0].winner].text
            return Answer(text, find_stages(text), conclusion(text), trace)
        parts, bodies = [], {}
        for stage in stages:
            won = stage.candidates[stage.winner]
            body, _, _ = (won.text + won.added).partition(f"</{stage.stage}>")
            bodies[stage.stage] = body.strip()
            parts.append((f"<{stage.stage}>" + won.text + won.added).strip())
        return Answer("\n\n".join(parts), bodies, bodies[plan.stages[-1]], trace)


def conclusion(text: str) -> str:
    """The body of the conclusion of a whole answer; all of it where there is none."""
    return find_stages(text).get("CONCLUSION", text.strip())


def _voted(stage: StageTrace) -> StageTrace:
    """The stage with the winner of a majority vote."""
    votes = [_normalized(conclusion(candidate.text)) for candidate in stage.candidates]
    counts = Counter(votes)

    def rank(i: int) -> tuple[int, float]:
        return counts[votes[i]], stage.candidates[i].mean_log_probability

    winner = max(range(len(votes)), key=lambda i: (rank(i), -i))
    return StageTrace(stage.stage, stage.candidates, stage.checks, stage.matches, winner)


def _normalized(text: str) -> str:
    """A conclusion without case, spacing, and punctuation at its ends."""
    return " ".join(text.casefold().split()).strip(string.punctuation + string.whitespace)
