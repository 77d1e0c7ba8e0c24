"""From images and questions to what the compiled search takes. Works on the host alone, without the weights."""

from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from llava_cot_jax.data.images import ImageSource
from llava_cot_jax.data.processor import Processor, user_turn
from llava_cot_jax.errors import UserError
from llava_cot_jax.search.decode import bucket
from llava_cot_jax.search.generator import check_seeds, in_bucket
from llava_cot_jax.search.pieces import pack
from llava_cot_jax.search.program import Request
from llava_cot_jax.search.prompts import DEFAULT_FILE, KINDS, WHOLE, JudgePrompts
from llava_cot_jax.search.strategies import Strategy
from llava_cot_jax.search.tables import judge_tables, leads, stage_tables, tokens_of

Images = ImageSource | Sequence[ImageSource] | None
"""Of a question: one, several, or none."""


class Preparation:
    """Prepares questions for a search.

    Args:
        processor: of the model's checkpoint.
        strategy: how to search.
        judge_prompts: a file to use in place of ``search/judge_prompts.yaml``.

    Attributes:
        plan: what the strategy comes to.
        stages: tables of its stages.
        judging: tables of its judge; None where it has none.

    Raises:
        UserError: a setting of the search, or a prompt, that cannot be used.
    """

    def __init__(self, processor: Processor, strategy: Strategy, judge_prompts: str | Path = DEFAULT_FILE) -> None:
        self._processor = processor
        self._prompts = JudgePrompts.load(judge_prompts)
        self.plan = plan = strategy.plan()
        self.stages = stage_tables(processor, plan)
        self.judging = None if plan.judge is None else judge_tables(processor, plan, plan.judge, self._prompts)

    def request(self, images: Sequence[Images], questions: Sequence[str], seeds: Sequence[int]) -> Request:
        """The request for a batch of questions.

        Args:
            images: of each question.
            questions: as many.
            seeds: of each question's draws.

        Raises:
            UserError: images and questions that do not match, a special token in a question, an image that
                cannot be read, a seed out of range, or a search that may exceed the model's context.
        """
        if isinstance(questions, str) or not questions or len(images) != len(questions):
            raise UserError("give a list of questions, and as many images, None where there is none")
        check_seeds(seeds)
        processor, given = self._processor, [listed(own) for own in images]
        prompts = [processor.prompt(user_turn(q, len(own))) for q, own in zip(questions, given, strict=True)]
        inputs, lengths = in_bucket(processor.config, processor(prompts, given))
        asked = [tokens_of(processor, question) for question in questions]
        self._check_context(int(lengths.max()), max(map(len, asked)))
        stages = self.plan.stages or (WHOLE,)
        lead = [
            leads(processor, self._prompts, kind, stages, len(own) if kind == "pair" else 0)
            for kind in KINDS
            for own in given
        ]
        return Request(
            inputs={name: jnp.asarray(x) for name, x in inputs.items()},
            lengths=jnp.asarray(lengths),
            seeds=jnp.asarray(np.asarray(seeds, np.uint32)),
            question=pack(asked, capacity=bucket(max(map(len, asked)))),
            leads=pack(lead, (len(KINDS), len(given))),
        )

    def _check_context(self, prompt: int, question: int) -> None:
        """Whether the longest sequences that the search can come to fit the model's context."""
        plan, context = self.plan, self._processor.config.text.max_position_embeddings
        tags = self.stages.openings.capacity + self.stages.closings.capacity
        longest = {"the answer": prompt + sum(budget + tags for budget in plan.budgets)}
        if self.judging is not None and plan.judge is not None:
            t = self.judging
            texts = (2 + int(t.shows.sum(axis=-1).max())) * (max(plan.budgets) + tags)
            fixed = sum(piece.capacity for piece in (t.intro, t.middle, t.label, t.between, t.ending))
            reason = plan.judge.reason_tokens if plan.judge.verdict == "rationale" else 0
            longest["a judge's prompt"] = prompt + question + fixed + texts + reason
        for what, tokens in longest.items():
            if tokens > context:
                raise UserError(
                    f"{what} may take {tokens} tokens, more than the context of {context}: "
                    "shorten the question or lower the budget"
                )


def listed(images: Images) -> list[ImageSource]:
    """The images of a question as a list."""
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]  # type: ignore[list-item]
