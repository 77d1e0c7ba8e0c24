"""Answers with the traces of their searches, made from what the compiled search returns."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, cast

import jax
import numpy as np

from llava_cot_jax.inference.decoding import nonfinite_logits_error
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.processing.probe import WHOLE_ANSWER
from llava_cot_jax.search.program import StageResult
from llava_cot_jax.search.scorers import OwnScorer, OwnScores
from llava_cot_jax.search.search_costs import SearchCosts
from llava_cot_jax.search.strategies import MajorityVote, SearchSpec, Strategy, WeightedVote
from llava_cot_jax.search.trace import CandidateTrace, StageTrace, Trace, stages_of, trace_stages
from llava_cot_jax.stage_format import StageFormat
from llava_cot_jax.stages import body_of, find_conclusion, find_stages, join_stages, normalize_answer


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


def check_finite(stages: Sequence[StageResult], spec: SearchSpec, place: str, dtype: Any) -> None:
    """Check all numbers of a question's search: log-probabilities, votes, and scores.

    Where logits are NaN or infinite, so are these.

    Args:
        stages: Result of each stage so far, in host arrays.
        spec: Static part of the search.
        place: Words that say which question it is.
        dtype: Dtype of the model.

    Raises:
        UserError: One of them is NaN or infinity.
    """
    for name, _, _, stage in stages_of(spec, stages):
        floats = [x for x in jax.tree.leaves(stage) if np.issubdtype(x.dtype, np.floating)]
        if not all(np.isfinite(x).all() for x in floats):
            raise nonfinite_logits_error(f"in the stage {name} of {place}", dtype)


@dataclass(frozen=True)
class AnswerMaker:
    """Makes answers of what a search returns.

    Attributes:
        config: Configuration of the model.
        processor: Processor that decodes tokens.
        strategy: Strategy of the search.
        spec: Static part of the search.
    """

    config: MllamaConfig
    processor: Any
    strategy: Strategy
    spec: SearchSpec

    def make(
        self,
        question: str,
        seed: int,
        num_images: int,
        stages: Sequence[StageResult],
        seconds: Mapping[str, float],
        own_scores: Mapping[int, OwnScores] | None = None,
    ) -> Answer:
        """Return the answer to a question.

        Args:
            question: Text of the question.
            seed: Seed of the question's draws.
            num_images: Number of images of the question.
            stages: Result of each stage, in host arrays.
            seconds: Seconds by what they were spent on. Those of "search" include the scorers.
            own_scores: Scores by functions of the user's own, by the index of the stage.
        """
        own_scores = own_scores or {}
        if own_scores:
            scoring = sum(scores.seconds for scores in own_scores.values())
            seconds = {**seconds, "search": seconds["search"] - scoring, "scorer": scoring}
        costs = SearchCosts(self.config, self.spec, stages, num_images)
        trace = Trace(
            question=question,
            seed=seed,
            strategy=repr(_described(self.strategy, self.spec)),
            stages=self.trace_stages(stages, own_scores),
            vision_encoder_calls=min(num_images, 1),
            tokens=costs.tokens,
            flops=costs.flops,
            seconds=dict(seconds),
            format=self.spec.format,
        )
        return _staged_answer(trace) if self.spec.stages else whole_answer(trace)

    def trace_stages(self, stages: Sequence[StageResult], own_scores: Mapping[int, OwnScores]) -> list[StageTrace]:
        """Return the stages so far with their winners; the arguments are those of ``make``."""
        traces = trace_stages(self.processor, self.spec, stages)
        traces = [stage.with_own_scores(own_scores.get(number)) for number, stage in enumerate(traces)]
        if isinstance(self.strategy, MajorityVote | WeightedVote):
            return [hold_vote(self.strategy, traces[0])]
        return traces


def tagged_text(format: StageFormat, stage: str, candidate: CandidateTrace) -> str:
    """Return the text of a candidate with its tags; that of a whole answer has those that the model wrote."""
    opening = None if stage == WHOLE_ANSWER else format[stage].opening
    return ((opening or "") + candidate.text + candidate.added).strip()


def _described(strategy: Strategy, spec: SearchSpec) -> Strategy:
    """Return the strategy as a trace shows it.

    It has the lengths that were searched with in place of those left to the default, and functions by their names.
    """
    if not is_dataclass(strategy):
        return strategy
    changes: dict[str, Any] = {"max_new_tokens": spec.max_new_tokens[0]} if spec.shrinks else {}
    if any(isinstance(scorer, OwnScorer) for scorer in spec.scorers):
        changes["scorer"] = spec.scorers if len(set(map(repr, spec.scorers))) > 1 else spec.scorers[0]
    return cast(Strategy, replace(strategy, **changes))


def whole_answer(trace: Trace) -> Answer:
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
        texts.append(tagged_text(trace.format, marks.name, won))
    return Answer(join_stages(texts), bodies, bodies[trace.format.conclusion], trace)


def hold_vote(strategy: MajorityVote | WeightedVote, stage: StageTrace) -> StageTrace:
    """Return the stage with the winner of the vote that a strategy holds among its candidates."""
    return _vote(stage, strategy.format, _score_of if isinstance(strategy, WeightedVote) else lambda _: 1.0)


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
