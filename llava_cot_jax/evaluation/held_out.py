"""Answers to held-out questions of a data set, held against the rows' own."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llava_cot_jax.data.chat import without_marker
from llava_cot_jax.data.rows import Rows
from llava_cot_jax.inference.generator import Generator
from llava_cot_jax.processing.messages import user_turn
from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.stages import find_stages

BATCH = 64
"""Questions that are answered at a time."""


@dataclass(frozen=True)
class Answered:
    """A question, the model's answer, and the row's own.

    Attributes:
        question: the first of the row.
        answer: all of what the model wrote.
        expected: the row's answer.
    """

    question: str
    answer: str
    expected: str

    def agrees(self, stage: str) -> bool:
        """Whether the body of a stage is, word for word, the row's."""
        return _body(self.answer, stage) == _body(self.expected, stage)


def answer_rows(
    generator: Generator, processor: Processor, rows: Rows, indices: Sequence[int], max_new_tokens: int
) -> Iterator[Answered]:
    """Greedy or sampled answers, as ``generator`` draws them, to the first question of each row.

    Args:
        generator: of the model.
        processor: likewise.
        rows: the data set.
        indices: of the rows.
        max_new_tokens: the longest answer, in tokens.

    Raises:
        UserError: a damaged row.
    """
    for start in range(0, len(indices), BATCH):
        some = [rows[index] for index in indices[start : start + BATCH]]
        # The last batch is filled up, so that nothing is compiled for it.
        filled = some + [some[-1]] * (min(BATCH, len(indices)) - len(some))
        prompts = [processor.prompt(user_turn(without_marker(row.turns[0].question), images=1)) for row in filled]
        tokens = generator.generate(processor(prompts, [[row.image] for row in filled]), max_new_tokens=max_new_tokens)
        for row, ids in zip(some, tokens, strict=False):
            yield Answered(row.turns[0].question, processor.decode(ids), row.turns[0].answer)


def _body(answer: str, stage: str) -> list[str]:
    """The words of a stage; of an answer without tags, its last paragraph is the conclusion."""
    stages = find_stages(answer)
    if not stages and stage == "CONCLUSION":
        return answer.rsplit("\n\n", 1)[-1].split()
    return stages.get(stage, "").split()


def share(agreeing: Sequence[bool]) -> tuple[float, float]:
    """The share that agrees, and its standard error."""
    p = sum(agreeing) / len(agreeing)
    return p, math.sqrt(p * (1 - p) / len(agreeing))
