"""Conversion of images and questions to the inputs of the compiled search, on the host and without the weights."""

import bisect
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from llava_cot_jax.checks import check_instance
from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.decoding import bucket
from llava_cot_jax.inference.generator import check_seeds, pad_to_bucket
from llava_cot_jax.inference.ragged_tokens import RaggedTokens, pad
from llava_cot_jax.processing.conversation import QuestionOrMessages, UserConversation, read_conversation
from llava_cot_jax.processing.images import ImageSource
from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.search.lengths import JudgeLengths, SearchLengths
from llava_cot_jax.search.program import SearchInputs
from llava_cot_jax.search.prompts import DEFAULT_JUDGE_PROMPTS, PROMPT_KINDS, JudgePrompts
from llava_cot_jax.search.strategies import SearchSpec, Strategy, check_strategy
from llava_cot_jax.search.tables import (
    build_scorer_tables,
    build_stage_tables,
    chat_header_ids,
    scored_stages,
    token_ids,
    vocabulary_of,
)

LENGTH_STEP = 32
"""Step in tokens in which a default length shrinks."""

_JUDGE_PROMPT = "a judge's prompt"

_WITHOUT_JUDGE = "the scorer LogProbability(), which is --judge log_probability, needs no such prompt"

Images = ImageSource | Sequence[ImageSource] | None
"""Images of a question: one, several, or none."""


@dataclass(frozen=True)
class Requests:
    """Batch of questions that is ready for a search.

    Attributes:
        inputs: Inputs of the compiled search.
        questions: Texts of the questions: of a conversation, that of the user's last message.
        images: Images of each question.
        seeds: Seed of each question's draws.
        seconds: Seconds that the conversion took.
        spec: Static part of the search for this batch. It is not the builder's where a default length is shrunk to what
            the context leaves.
    """

    inputs: SearchInputs
    questions: list[str]
    images: list[list[ImageSource]]
    seeds: list[int]
    seconds: float
    spec: SearchSpec

    def question(self, i: int) -> "Requests":
        """Return the batch of question ``i`` alone, with the arrays' padding as it is."""
        here, inputs = slice(i, i + 1), self.inputs
        one = SearchInputs(
            {name: x[here] for name, x in inputs.model_inputs.items()},
            inputs.lengths[here],
            inputs.seeds[here],
            inputs.question[here],
            inputs.chat_headers[:, here],
        )
        return replace(
            self, inputs=one, questions=self.questions[here], images=self.images[here], seeds=self.seeds[here]
        )


class RequestBuilder:
    """Makes the requests of a search.

    Args:
        processor: Processor of the model's checkpoint.
        strategy: Strategy to search with.
        judge_prompts: YAML file with the prompts of the judge.
        default_max_new_tokens: Largest number of tokens of an answer, or of a stage, where the strategy sets none; None
            is the strategy's own default.

    Attributes:
        processor: Processor of the model's checkpoint.
        strategy: Strategy to search with.
        spec: Static part of the search.
        stage_tables: Tables of the stages.
        scorer_tables: Tables of the judge and the verifier.

    Raises:
        UserError: A setting of the search, or a prompt, cannot be used.
    """

    def __init__(
        self,
        processor: Processor,
        strategy: Strategy,
        judge_prompts: str | Path = DEFAULT_JUDGE_PROMPTS,
        default_max_new_tokens: int | None = None,
    ) -> None:
        check_instance("processor", processor, Processor, "give the Processor of the model's checkpoint")
        check_strategy(strategy)
        self.processor = processor
        self.strategy = strategy
        spec = strategy.to_spec()
        if spec.shrinks and default_max_new_tokens is not None:
            spec = _with_length(spec, default_max_new_tokens)
        self.spec = spec
        self._prompts = prompts = JudgePrompts.load(judge_prompts)
        entries = vocabulary_of(processor)
        self.stage_tables = build_stage_tables(processor, spec, entries)
        self.scorer_tables = build_scorer_tables(processor, spec, prompts, entries)

    def build(
        self, images: Sequence[Images], questions: Sequence[QuestionOrMessages], seeds: Sequence[int] | int = 0
    ) -> Requests:
        """Return the requests for a batch of questions.

        Args:
            images: Images of each question: one, several, or None.
            questions: Questions, each a text or the messages of a conversation.
            seeds: Seed of each question's draws, or one seed for all.

        Raises:
            UserError: There are not as many images as questions, a question is malformed or has a special token, an
                image cannot be read, a seed is out of range, or the search may exceed the model's context.
        """
        start = time.perf_counter()
        for given in (images, questions):
            if not isinstance(given, list | tuple) or not given or len(given) != len(questions):
                raise UserError("give a list of questions, and as many images, None where there is none")
        check_seeds(seeds, len(questions))
        processor = self.processor
        asked = [read_conversation(*each) for each in zip(questions, map(_as_list, images), strict=True)]
        image_lists = [each.images for each in asked]
        num_images = [len(each) for each in image_lists]
        prompts = [self.prompt(each) for each in asked]
        model_inputs, lengths = pad_to_bucket(processor.config, processor(prompts, image_lists))
        question_ids = [token_ids(processor, each.told) for each in asked]
        longest_question = max(map(len, question_ids))
        chat_headers = self.chat_headers(num_images)
        spec = self.fitting_spec(int(lengths.max()), longest_question, chat_headers.capacity)
        seed_array = np.broadcast_to(np.asarray(seeds, np.uint32), len(questions))
        inputs = SearchInputs(
            model_inputs={name: jax.device_put(x) for name, x in model_inputs.items()},
            lengths=jax.device_put(lengths),
            seeds=jax.device_put(seed_array),
            question=pad(question_ids, capacity=bucket(longest_question)),
            chat_headers=chat_headers,
        )
        # A question that is a text is shown as it was given, with the markers of its images.
        pairs = zip(questions, asked, strict=True)
        shown_questions = [given if isinstance(given, str) else each.question for given, each in pairs]
        seconds = time.perf_counter() - start
        return Requests(inputs, shown_questions, image_lists, seed_array.tolist(), seconds, spec)

    def prompt(self, conversation: UserConversation) -> str:
        """Return the prompt of a conversation that ends with a question."""
        return self.processor.prompt(conversation.asked(*self.spec.format.around_question))

    def chat_headers(self, num_images: Sequence[int]) -> RaggedTokens:
        """Return the beginning of the judge's prompts, [kinds, questions]. A check has no images."""
        stages = scored_stages(self.spec)
        headers = [
            chat_header_ids(self.processor, self._prompts, kind, stages, images if kind == "pair" else 0)
            for kind in PROMPT_KINDS
            for images in num_images
        ]
        return pad(headers, (len(PROMPT_KINDS), len(num_images)))

    def fitting_spec(self, prompt: int, question: int, header: int) -> SearchSpec:
        """Return the search with lengths that fit the model's context.

        A default length is shrunk as far as needed, in steps of ``LENGTH_STEP`` tokens, so that prompts of similar
        lengths share a program.

        Args:
            prompt: Largest number of tokens of a prompt.
            question: Largest number of tokens of a question.
            header: Largest number of tokens of the judge's chat header.

        Raises:
            UserError: The lengths that were given may exceed the context, or nothing is left for an answer.
        """
        context = self.processor.config.text.max_position_embeddings
        remedy = "shorten the question" if self.spec.shrinks else "shorten the question or lower max_new_tokens"

        def too_long(spec: SearchSpec) -> Iterator[str]:
            for what, tokens in self._longest(spec, prompt, question, header).items():
                if tokens > context:
                    other = f"; {_WITHOUT_JUDGE}" if what == _JUDGE_PROMPT else ""
                    yield f"{what} may take {tokens} tokens, more than the context of {context}: {remedy}{other}"

        faults = list(too_long(self.spec))
        if faults and self.spec.shrinks:
            lengths = range(1, self.spec.max_new_tokens[0])
            count = bisect.bisect_left(lengths, True, key=lambda new: any(too_long(_with_length(self.spec, new))))
            if count:
                return _with_length(self.spec, count - count % LENGTH_STEP or count)
            faults = list(too_long(_with_length(self.spec, 1)))
        for fault in faults:
            raise UserError(fault)
        return self.spec

    def _longest(self, spec: SearchSpec, prompt: int, question: int, header: int) -> dict[str, int]:
        """Return the tokens of the longest sequences of a search, by what they are."""
        lengths = SearchLengths.of(spec, self.stage_tables, prompt)
        longest = {"the answer": lengths.answer}
        if self.scorer_tables.verifier is not None:
            longest["an answer with the verifier's question"] = (
                lengths.answer + self.scorer_tables.verifier.probes.capacity
            )
        if self.scorer_tables.judge is not None and spec.judge is not None:
            shown = int(np.asarray(self.scorer_tables.judge.shows).sum(axis=-1).max())
            longest[_JUDGE_PROMPT] = JudgeLengths.of(
                spec.judge,
                self.scorer_tables.judge,
                header=header,
                question=question,
                text=lengths.text,
                earlier=lengths.earlier if spec.max_sentences else shown * lengths.text,
            ).total
        return longest


def _with_length(spec: SearchSpec, max_new_tokens: int) -> SearchSpec:
    """Return a search whose stages have one largest number of tokens."""
    return replace(spec, max_new_tokens=(max_new_tokens,) * spec.num_stages)


def _as_list(images: Images) -> list[ImageSource]:
    """Return the images of a question as a list."""
    if images is None:
        return []
    if isinstance(images, Sequence) and not isinstance(images, str | bytes):
        return list(images)
    return [images]
