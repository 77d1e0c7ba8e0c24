"""From images and questions to what the compiled search takes. Works on the host alone, without the weights."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.decoding import bucket
from llava_cot_jax.inference.generator import check_seeds, pad_to_bucket
from llava_cot_jax.inference.ragged_tokens import pad
from llava_cot_jax.processing.images import ImageSource
from llava_cot_jax.processing.messages import user_turn
from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.search.program import SearchInputs
from llava_cot_jax.search.prompts import DEFAULT_FILE, PROMPT_KINDS, WHOLE_ANSWER, JudgePrompts
from llava_cot_jax.search.strategies import Strategy
from llava_cot_jax.search.tables import build_judge_tables, chat_headers, build_stage_tables, token_ids

Images = ImageSource | Sequence[ImageSource] | None
"""Of a question: one, several, or none."""


@dataclass(frozen=True)
class Requests:
    """A batch of questions, prepared.

    Attributes:
        request: what the compiled search takes.
        asked: the questions.
        images: how many each has.
        seeds: of each one's draws.
        seconds: that preparing them took.
    """

    request: SearchInputs
    asked: list[str]
    images: list[int]
    seeds: list[int]
    seconds: float


class RequestBuilder:
    """Prepares questions for a search.

    Args:
        processor: of the model's checkpoint.
        strategy: how to search.
        judge_prompts: a file to use in place of ``search/judge_prompts.yaml``.

    Attributes:
        processor: of the checkpoint.
        strategy: how to search.
        plan: what it comes to.
        stages: tables of its stages.
        judging: tables of its judge; None where it has none.

    Raises:
        UserError: a setting of the search, or a prompt, that cannot be used.
    """

    def __init__(self, processor: Processor, strategy: Strategy, judge_prompts: str | Path = DEFAULT_FILE) -> None:
        self.processor = processor
        self._prompts = JudgePrompts.load(judge_prompts)
        self.strategy = strategy
        self.spec = spec = strategy.to_spec()
        self.stages = build_stage_tables(processor, spec)
        self.judging = None if spec.judge is None else build_judge_tables(processor, spec, spec.judge, self._prompts)

    def prepare(self, images: Sequence[Images], questions: Sequence[str], seeds: Sequence[int] | int = 0) -> Requests:
        """Prepare a batch of questions.

        Args:
            images: of each question: one, several, or None.
            questions: as many.
            seeds: of each question's draws, or of every one's.

        Raises:
            UserError: images and questions that do not match, a special token in a question, an image that
                cannot be read, a seed out of range, or a search that may exceed the model's context.
        """
        began = time.perf_counter()
        if isinstance(questions, str) or not questions or len(images) != len(questions):
            raise UserError("give a list of questions, and as many images, None where there is none")
        check_seeds(seeds)
        processor, given = self.processor, [_listed(own) for own in images]
        prompts = [processor.prompt(user_turn(q, len(own))) for q, own in zip(questions, given, strict=True)]
        inputs, lengths = pad_to_bucket(processor.config, processor(prompts, given))
        asked = [token_ids(processor, question) for question in questions]
        self._check_context(int(lengths.max()), max(map(len, asked)))
        stages = self.spec.stages or (WHOLE_ANSWER,)
        lead = [
            chat_headers(processor, self._prompts, kind, stages, len(own) if kind == "pair" else 0)
            for kind in PROMPT_KINDS
            for own in given
        ]
        own_seeds = np.broadcast_to(np.asarray(seeds, np.uint32), len(questions))
        request = SearchInputs(
            inputs={name: jax.device_put(x) for name, x in inputs.items()},
            lengths=jax.device_put(lengths),
            seeds=jax.device_put(own_seeds),
            question=pad(asked, capacity=bucket(max(map(len, asked)))),
            chat_headers=pad(lead, (len(PROMPT_KINDS), len(given))),
        )
        counts = [len(own) for own in given]
        return Requests(request, list(questions), counts, own_seeds.tolist(), time.perf_counter() - began)

    def _check_context(self, prompt: int, question: int) -> None:
        """Whether the longest sequences that the search can come to fit the model's context."""
        spec, context = self.spec, self.processor.config.text.max_position_embeddings
        tags = self.stages.openings.capacity + self.stages.closings.capacity
        longest = {"the answer": prompt + sum(budget + tags for budget in spec.max_new_tokens)}
        if self.judging is not None and spec.judge is not None:
            t = self.judging
            texts = (2 + int(np.asarray(t.shows).sum(axis=-1).max())) * (max(spec.max_new_tokens) + tags)
            fixed = sum(piece.capacity for piece in (t.intro, t.middle, t.label, t.between, t.ending))
            reason = spec.judge.reason_tokens if spec.judge.verdict == "rationale" else 0
            longest["a judge's prompt"] = prompt + question + fixed + texts + reason
        for what, tokens in longest.items():
            if tokens > context:
                raise UserError(
                    f"{what} may take {tokens} tokens, more than the context of {context}: "
                    "shorten the question or lower the budget"
                )


def _listed(images: Images) -> list[ImageSource]:
    """The images of a question as a list."""
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]  # type: ignore[list-item]
