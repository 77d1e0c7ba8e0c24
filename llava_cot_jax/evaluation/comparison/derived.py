"""Answers of a method that are derived from a run with as many whole answers, or more, of which it takes the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from llava_cot_jax.evaluation.comparison.methods import Method
from llava_cot_jax.evaluation.matching import RightAnswer, scored_text
from llava_cot_jax.hosts.question_queue import AnswerRow
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.processing.probe import WHOLE_ANSWER
from llava_cot_jax.question_result import result_of
from llava_cot_jax.search.answers import hold_vote, tagged_text, whole_answer
from llava_cot_jax.search.scorers import LogProbability, Verifier
from llava_cot_jax.search.search_costs import CostCounter
from llava_cot_jax.search.strategies import BestOfN, MajorityVote, WeightedVote
from llava_cot_jax.search.trace import CandidateTrace, StageTrace, Trace
from llava_cot_jax.stage_format import StageFormat


def derived_row(row: AnswerRow, method: Method, config: MllamaConfig, right: RightAnswer) -> AnswerRow:
    """Return the row that a run of a method would have, as far as it uses the candidates of another run.

    Its tokens and FLOPs are those of the candidates that it uses, of the prompt and the images, and of the verifier
    where it needs one.

    Args:
        row: Row of a run of whole answers by the same draws, with the scores of the verifier where the method needs
            them.
        method: Method that takes the first of these answers.
        config: Configuration of the model.
        right: The right answer, which an oracle goes by.
    """
    if "error" in row:
        return row
    strategy, given = method.strategy, row["trace"]
    spec = strategy.to_spec()
    every = [CandidateTrace(**candidate) for candidate in given["stages"][0]["candidates"]]
    used = every[: spec.num_candidates[0]]
    costs = CostCounter(config, len(row["images"]))
    prompt = given["tokens"]["prompt"]
    costs.add_prefill("prompt", prompt, 0)
    costs.add_decoding("candidates", [_num_sampled(each) for each in used], prompt, [0] * len(used))
    if spec.has_verifier:
        question = _probe_question(given["tokens"]["verifier_probes"], every)
        for candidate in used:
            costs.add_probe(question + min(candidate.tokens, 1), prompt, candidate.tokens)
    else:
        used = [replace(candidate, score=None, other_probability=None) for candidate in used]
    stage = StageTrace(WHOLE_ANSWER, used, checks=[], matches=[], winner=0)
    if method.is_oracle:
        stage = replace(stage, winner=_first_right(used, right, spec.format))
    else:
        stage = _with_winner(strategy, stage)
    trace = Trace(
        question=given["question"],
        seed=given["seed"],
        strategy=repr(strategy),
        stages=[stage],
        vision_encoder_calls=given["vision_encoder_calls"],
        tokens=costs.tokens,
        flops=costs.flops,
        seconds={},
        format=spec.format,
    )
    result = result_of(whole_answer(trace), is_shrunk=row["bounded_by"] == "context")
    said = {name: value for name, value in asdict(result).items() if name != "seconds"}
    return {**row, **said, "notes": result.notes(spec.format), "flops": trace.flops, "trace": trace.without_seconds()}


def _num_sampled(candidate: CandidateTrace) -> int:
    """Return the number of tokens that were sampled, the one that ended the turn among them."""
    return candidate.tokens + (candidate.ended == "eos")


def _probe_question(probes: int, candidates: Sequence[CandidateTrace]) -> int:
    """Return the number of tokens of the verifier's question, before which it reads the last token of a candidate.

    Args:
        probes: Number of tokens that were read after all candidates.
        candidates: All candidates.
    """
    return (probes - sum(min(each.tokens, 1) for each in candidates)) // len(candidates)


def _with_winner(strategy: Any, stage: StageTrace) -> StageTrace:
    """Return the stage with the winner that the search itself would choose."""
    if isinstance(strategy, MajorityVote | WeightedVote):
        return hold_vote(strategy, stage)
    if isinstance(strategy, BestOfN):
        return replace(stage, winner=_best(strategy, stage.candidates))
    return stage


def _first_right(candidates: Sequence[CandidateTrace], right: RightAnswer, format: StageFormat) -> int:
    """Return the first candidate that is right, or the first of all."""
    texts = (tagged_text(format, WHOLE_ANSWER, candidate) for candidate in candidates)
    return next((i for i, text in enumerate(texts) if right.accepts(scored_text(text, format))), 0)


def _best(strategy: BestOfN, candidates: Sequence[CandidateTrace]) -> int:
    """Return the candidate with the highest score, or log-probability, in the numbers that the search compares."""
    means = [np.float32(one.log_prob) / np.float32(max(_num_sampled(one), 1)) for one in candidates]
    if isinstance(strategy.scorer, LogProbability):
        return max(range(len(candidates)), key=lambda i: (means[i], -i))
    assert isinstance(strategy.scorer, Verifier)
    scores = [0.0 if one.score is None else one.score for one in candidates]
    return max(range(len(candidates)), key=lambda i: (scores[i], means[i], -i))
