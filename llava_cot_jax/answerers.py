"""The two ways in which ``generate`` answers a question: by a search, or token by token."""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING

import jsonargparse
from rich.console import Console

from llava_cot_jax import cli
from llava_cot_jax.files import write_text
from llava_cot_jax.inference.settings import DEFAULT_MAX_NEW_TOKENS, Sampling
from llava_cot_jax.paths import as_path, writing_errors
from llava_cot_jax.question_result import QuestionResult, has_all_sentences, result_of
from llava_cot_jax.questions import UserQuestion
from llava_cot_jax.search.retracing import Threshold, reasoning_scores
from llava_cot_jax.search.strategies import Strategy
from llava_cot_jax.stage_format import StageFormat
from llava_cot_jax.stages import find_conclusion, find_stages

if TYPE_CHECKING:
    import numpy as np

    from llava_cot_jax.model.mllama import Mllama
    from llava_cot_jax.processing.processor import Processor
    from llava_cot_jax.search.request_builder import Requests
    from llava_cot_jax.search.snapshots import OnSearchProgress
    from llava_cot_jax.search.trace import Trace


class SearchAnswerer:
    """Answers questions by a search."""

    def __init__(
        self, processor: Processor, strategy: Strategy, options: jsonargparse.Namespace, stated_length: int | None
    ) -> None:
        from llava_cot_jax.search.request_builder import RequestBuilder

        self._builder = RequestBuilder(processor, strategy, options.judge_prompts, stated_length)
        self._options = options
        self._searches: list[tuple[UserQuestion, Trace]] = []

    def prepare(self, question: UserQuestion) -> Callable[[Mllama], QuestionResult]:
        """Return a function that answers the question with a model.

        Raises:
            UserError: The question or its image cannot be used.
        """
        requests = self._builder.build([question.sources], [question.asked], self._options.seed)
        return functools.partial(self._answer, question, requests)

    def _answer(self, question: UserQuestion, requests: Requests, model: Mllama) -> QuestionResult:
        from llava_cot_jax.search.reasoner import run_search

        options = self._options
        with self._display() as on_progress:
            (answer,) = cli.run_interruptible(lambda: run_search(model, self._builder, requests, on_progress))
        trace = answer.trace
        self._searches.append((question, trace))
        if options.show_search and not options.json:
            from llava_cot_jax.search.show import describe_search

            Console(highlight=False).print(describe_search(trace, question.right_answer))
        elif not options.json:
            print(answer.text if options.show_reasoning else answer.conclusion, flush=True)
        self._write_files(model)
        result = result_of(answer, requests.spec != self._builder.spec)
        return replace(result, bounded_by="max_sentences") if has_all_sentences(trace, requests.spec) else result

    def _display(self) -> AbstractContextManager[OnSearchProgress | None]:
        """Return what shows on stderr that a search runs, and the function that it has the search call."""
        if self._options.live:
            from llava_cot_jax.search.live import live_view

            return live_view(self._builder.strategy)
        return contextlib.nullcontext() if self._options.json else cli.status("searching")

    def write_threshold(self) -> None:
        """Write the threshold that the scores of all searches give, and print it.

        Raises:
            UserError: The file cannot be written.
        """
        scores = [score for _, trace in self._searches for score in reasoning_scores(trace)]
        found, path = Threshold.of(scores), self._options.threshold_to
        found.write(path)
        print(
            f"wrote the threshold {found.threshold:.4f} to {path}: the mean of {found.count} reasonings' scores is "
            f"{found.mean:.4f}, their standard deviation {found.std:.4f}",
            file=sys.stderr,
        )

    def _write_files(self, model: Mllama) -> None:
        """Write all searches so far to the files that the user asked for."""
        options = self._options
        if options.trace:
            traces = [trace.to_dict() for _, trace in self._searches]
            path = as_path(options.trace)
            with writing_errors(path):
                write_text(path, json.dumps(traces, indent=1, ensure_ascii=False, allow_nan=False))
        if options.page:
            import jax

            from llava_cot_jax.search.page import PageEntry, write_page

            facts = {
                "checkpoint": options.checkpoint,
                **{name: path for name in ("adapter", "verifier_adapter") if (path := getattr(options, name))},
                "convention": model.config.convention,
                "weights": f"{model.dtype}{', text in int8' if model.is_quantized else ''}",
                "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
                "date": datetime.date.today(),
                **{name: version(name) for name in ("llava_cot_jax", "jax")},
            }
            entries = [PageEntry(trace, q.sources, q.right_answer) for q, trace in self._searches]
            write_page(as_path(options.page), entries, facts)


class StreamingAnswerer:
    """Answers questions without a search, and shows tokens as they come."""

    def __init__(
        self,
        processor: Processor,
        sampling: Sampling,
        options: jsonargparse.Namespace,
        format: StageFormat,
        stated_length: int | None,
    ) -> None:
        self._processor, self._sampling, self._options, self._format = processor, sampling, options, format
        self._default_length = stated_length or DEFAULT_MAX_NEW_TOKENS

    def prepare(self, question: UserQuestion) -> Callable[[Mllama], QuestionResult]:
        """Return a function that answers the question with a model.

        Raises:
            UserError: The question or its image cannot be used.
        """
        from llava_cot_jax.inference.generator import check_request
        from llava_cot_jax.processing.conversation import read_conversation

        processor, asked = self._processor, read_conversation(question.asked, question.sources)
        inputs = processor([processor.prompt(asked.asked(*self._format.around_question))], [asked.images])
        options, prompt = self._options, inputs["input_ids"].shape[1]
        length = check_request(processor.config, prompt, options.max_new_tokens, options.seed, self._default_length)
        return functools.partial(self._answer, inputs, length)

    def _answer(self, inputs: dict[str, np.ndarray], length: int, model: Mllama) -> QuestionResult:
        from llava_cot_jax.inference.generator import Generator
        from llava_cot_jax.inference.screen import Screen

        options = self._options
        start, first_token_seconds = time.perf_counter(), 0.0
        generator = Generator(model, self._sampling, self._processor)
        stream = generator.stream_completions(inputs, max_new_tokens=length, seeds=options.seed)
        with contextlib.nullcontext() if options.json else Screen(options.show_reasoning, self._format) as screen:
            for (completion,) in stream:
                first_token_seconds = first_token_seconds or time.perf_counter() - start
                if screen:
                    screen.show(completion.text)
            if screen:
                screen.finish(completion.text)
        text = completion.text
        counts = {"prompt": int(inputs["attention_mask"].sum()), "new": len(completion.tokens)}
        seconds = {"first_token": first_token_seconds, "total": time.perf_counter() - start}
        is_shrunk = options.max_new_tokens is None and length < self._default_length
        return QuestionResult(
            text,
            find_conclusion(text, self._format),
            find_stages(text, self._format),
            completion.ended,
            counts,
            seconds,
            bounded_by="context" if is_shrunk else "max_new_tokens",
        )
