"""Answers by search: images and questions in, answers with the whole of their search out."""

import string
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llava_cot_jax.data.images import ImageSource
from llava_cot_jax.data.processor import Processor, user_turn
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.search.decode import bucket
from llava_cot_jax.search.generator import check_seeds, in_bucket
from llava_cot_jax.search.pieces import pack
from llava_cot_jax.search.program import Request, StageFindings, search
from llava_cot_jax.search.prompts import DEFAULT_FILE, KINDS, WHOLE, JudgePrompts
from llava_cot_jax.search.strategies import MajorityVote, StageBeam, Strategy
from llava_cot_jax.search.tables import judge_tables, leads, stage_tables, tokens_of
from llava_cot_jax.search.trace import Costs, StageTrace, Trace, trace_stage
from llava_cot_jax.stages import find_stages

CHUNKS = {"cpu": 64}
"""Tokens of a question that are read at a time: on an accelerator as many as hide the reading of the weights."""

CHUNK = 256

Images = ImageSource | Sequence[ImageSource] | None


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
        self._processor = processor
        self._plan = plan = self.search.plan()
        self._prompts = JudgePrompts.load(judge_prompts)
        self._model = model
        self._stages = stage_tables(processor, plan)
        self._judging = None if plan.judge is None else judge_tables(processor, plan, plan.judge, self._prompts)

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
        if isinstance(questions, str) or not questions or len(images) != len(questions):
            raise UserError("give a list of questions, and as many images, None where there is none")
        began = time.perf_counter()
        given = [_listed(image) for image in images]
        rows = np.broadcast_to(np.asarray(seeds), len(questions)).tolist()
        request = self._request(given, questions, rows)
        prepared = time.perf_counter()
        model = self._model
        chunk = CHUNKS.get((model.mesh.devices.flat[0] if model.mesh else jax.devices()[0]).platform, CHUNK)
        static = {"config": model.config, "plan": self._plan, "chunk": chunk, "mesh": model.mesh}
        found: StageFindings = jax.device_get(search(model.params, request, self._stages, self._judging, **static))
        seconds = {"prepare": prepared - began, "search": time.perf_counter() - prepared}
        return [self._answer(found, i, questions[i], len(given[i]), rows[i], seconds) for i in range(len(questions))]

    def _request(self, images: Sequence[list[ImageSource]], questions: Sequence[str], seeds: Sequence[int]) -> Request:
        processor, plan = self._processor, self._plan
        check_seeds(seeds)
        prompts = [processor.prompt(user_turn(q, len(own))) for q, own in zip(questions, images, strict=True)]
        inputs, lengths = in_bucket(self._model.config, processor(prompts, images))
        asked = [tokens_of(processor, question) for question in questions]
        self._check_context(int(lengths.max()), max(map(len, asked)))
        stages = plan.stages or (WHOLE,)
        lead = [
            leads(processor, self._prompts, kind, stages, len(own) if kind == "pair" else 0)
            for kind in KINDS
            for own in images
        ]
        return Request(
            inputs={name: jnp.asarray(x) for name, x in inputs.items()},
            lengths=jnp.asarray(lengths),
            seeds=jnp.asarray(np.asarray(seeds, np.uint32)),
            question=pack(asked, capacity=bucket(max(map(len, asked)))),
            leads=pack(lead, (len(KINDS), len(images))),
        )

    def _check_context(self, prompt: int, question: int) -> None:
        """Whether the longest sequences that the search can come to fit the model's context."""
        plan, context = self._plan, self._model.config.text.max_position_embeddings
        tags = self._stages.openings.capacity + self._stages.closings.capacity
        longest = {"the answer": prompt + sum(budget + tags for budget in plan.budgets)}
        if self._judging is not None and plan.judge is not None:
            t = self._judging
            texts = (2 + max(np.asarray(t.shows).sum(axis=-1).max(), 0)) * (max(plan.budgets) + tags)
            fixed = sum(p.capacity for p in (t.intro, t.middle, t.label, t.between, t.ending))
            reason = plan.judge.reason_tokens if plan.judge.verdict == "rationale" else 0
            longest["a judge's prompt"] = prompt + question + fixed + int(texts) + reason
        for what, tokens in longest.items():
            if tokens > context:
                raise UserError(
                    f"{what} may take {tokens} tokens, more than the context of {context}: "
                    "shorten the question or lower the budget"
                )

    def _answer(
        self, found: StageFindings, i: int, question: str, images: int, seed: int, seconds: dict[str, float]
    ) -> Answer:
        processor, plan = self._processor, self._plan
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


def _listed(images: Images) -> list[ImageSource]:
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]  # type: ignore[list-item]
