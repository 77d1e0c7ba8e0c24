"""Answers to held-out questions of a data set, and how many of them are right."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from llava_cot_jax.data.chat import question_messages
from llava_cot_jax.data.rows import Rows, Turn
from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.generator import Generator
from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.stage_format import LLAVA_COT
from llava_cot_jax.stages import find_stages

QUESTIONS_PER_BATCH = 64
"""Number of questions that are answered at a time."""


@dataclass(frozen=True)
class HeldOutAnswer:
    """A model's answer to a question of a data set.

    Attributes:
        question: First question of the example.
        answer: Whole text that the model generated.
        expected: Answer of the data set.
    """

    question: str
    answer: str
    expected: str

    def agrees(self, stage: str) -> bool:
        """Whether the body of a stage in LLaVA-CoT's tags is, word for word, that of the expected answer."""
        return _body(self.answer, stage) == _body(self.expected, stage)


def find_answerable(processor: Processor, rows: Rows, count: int) -> list[int]:
    """Return the indices of the first ``count`` examples whose first question can be put to the model.

    A question that spells a special token, or one that leaves no room in the context for an answer, cannot. Examples
    of the verifier have no answer to compare with, and are left out too.
    """
    context = processor.config.text.max_position_embeddings
    found: list[int] = []
    for index in range(len(rows)):
        if len(found) == count:
            break
        turns = rows.turns(index)
        if turns[0].target:
            continue
        with suppress(UserError):
            (ids,) = processor.tokenize([_first_prompt(processor, turns)])
            if len(ids) < context:
                found.append(index)
    return found


def _first_prompt(processor: Processor, turns: Sequence[Turn]) -> str:
    return processor.prompt(question_messages(turns[0], about_images=any(turn.images for turn in turns)))


def answer_held_out(
    generator: Generator, processor: Processor, rows: Rows, indices: Sequence[int], max_new_tokens: int
) -> Iterator[HeldOutAnswer]:
    """Answer the first question of each example, in batches.

    Args:
        generator: Generator of the model, which decides whether answers are greedy or sampled.
        processor: Processor of the model's checkpoint.
        rows: Data set.
        indices: Indices of the examples in the data set.
        max_new_tokens: Longest answer, in tokens, as far as the context leaves room for it.

    Raises:
        UserError: An example is damaged, or its first question cannot be put to the model.
    """
    for start in range(0, len(indices), QUESTIONS_PER_BATCH):
        examples = [rows[index] for index in indices[start : start + QUESTIONS_PER_BATCH]]
        # The last batch is padded to the size of the others, so that it needs no program of its own.
        padded = examples + [examples[-1]] * (min(QUESTIONS_PER_BATCH, len(indices)) - len(examples))
        prompts = [_first_prompt(processor, row.turns) for row in padded]
        inputs = processor(prompts, [row.images[: row.turns[0].images] for row in padded])
        left = generator.config.text.max_position_embeddings - inputs["input_ids"].shape[1]
        tokens = generator.generate(inputs, max_new_tokens=min(max_new_tokens, left))
        for row, ids in zip(examples, tokens, strict=False):
            yield HeldOutAnswer(row.turns[0].question, processor.decode(ids), row.turns[0].answer)


def _body(answer: str, stage: str) -> list[str]:
    """Return the words of a stage. The conclusion of an answer without stages is its last paragraph."""
    stages = find_stages(answer)
    if not stages and stage == LLAVA_COT.conclusion:
        return answer.rsplit("\n\n", 1)[-1].split()
    return stages.get(stage, "").split()
