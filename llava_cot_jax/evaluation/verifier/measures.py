"""Measures of a verifier on candidates whose values are known.

A value is a share of k continuations, so that even a scorer that knew the chance p of a right conclusion of each
candidate would disagree with the order of some values: of two candidates with the chances p and q, X and Y of k
continuations are right, binomially, and the order of values is that of chances p > q in P(X > Y | X != Y) of the cases.
For p = 0.6 and q = 0.4, this is 83% at k = 8, and 94% where the values differ by ``CLEAR_DIFFERENCE`` at least. How far
the chances of candidates lie apart is not known, so that no ceiling of the accuracy is estimated here. The mean value
of the candidates that a score chooses is not biased by this: their values are their chances on average, as the score
has not seen the values. The best value is: it is the largest of several, and as such above the chance on average.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import combinations
from math import fsum
from statistics import correlation, quantiles
from typing import Any

from llava_cot_jax.evaluation.paired import paired_difference
from llava_cot_jax.evaluation.statistics import estimate_mean
from llava_cot_jax.evaluation.verifier.values import CandidateGroup, ScoredValues, ValuedText

CLEAR_DIFFERENCE = 0.35
"""Least difference between two values that is not likely luck: twice its standard error with 16 continuations.

The standard error of a value is at most 0.5 / sqrt(16) = 0.125, and that of a difference sqrt(2) times as large.
"""

BINS = 10
"""Number of equal bins of the score by which calibration is told."""

_ROUNDING = 1e-9
"""Difference between values that comes from rounding alone."""

_Observe = Callable[[CandidateGroup], list[float]]
"""Function that returns what a set of candidates adds to a mean: any number of values."""


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's rank correlation, in which equal numbers share their mean rank.

    It is 0 where the numbers of either are all equal, which order nothing. Where some numbers of one alone are equal,
    it stays below 1 however well the others agree.
    """
    if len(set(first)) == 1 or len(set(second)) == 1:
        return 0.0
    return correlation(_ranks(first), _ranks(second))


def _ranks(numbers: Sequence[float]) -> list[float]:
    ordered = sorted(numbers)
    return [(bisect_left(ordered, x) + bisect_right(ordered, x) + 1) / 2 for x in numbers]


def _correlation(group: CandidateGroup) -> list[float]:
    """Return the rank correlation of score with value, if the values differ."""
    values = [text.value for text in group.texts]
    is_told = max(values) - min(values) > _ROUNDING
    return [rank_correlation([text.score for text in group.texts], values)] if is_told else []


def _agreements(by: Callable[[ValuedText], float], least: float, group: CandidateGroup) -> list[float]:
    """Return for each pair whether a score has the order of the values: 1, 0, or 1/2 where the scores are equal.

    Args:
        by: Score of a candidate.
        least: Least difference between the values of a pair.
        group: The candidates.
    """
    found = []
    for one, other in combinations(group.texts, 2):
        if abs(one.value - other.value) >= least - _ROUNDING:
            better, worse = (by(one), by(other)) if one.value > other.value else (by(other), by(one))
            found.append(0.5 if better == worse else float(better > worse))
    return found


def _score(text: ValuedText) -> float:
    return text.score


def _log_prob(text: ValuedText) -> float:
    assert text.mean_log_prob is not None
    return text.mean_log_prob


def _chosen(group: CandidateGroup) -> list[float]:
    """Return the value of the candidate of the highest score, or the mean of those that share it."""
    highest = max(text.score for text in group.texts)
    values = [text.value for text in group.texts if text.score == highest]
    return [fsum(values) / len(values)]


def _random(group: CandidateGroup) -> list[float]:
    """Return the mean value of the candidates as they were drawn."""
    return [fsum(text.draws * text.value for text in group.texts) / sum(text.draws for text in group.texts)]


def _best(group: CandidateGroup) -> list[float]:
    return [max(text.value for text in group.texts)]


def _gain(group: CandidateGroup) -> list[float]:
    return [_chosen(group)[0] - _random(group)[0]]


_BY_SCORE: dict[str, _Observe] = {
    "rank_correlation": _correlation,
    "clear_pairs": partial(_agreements, _score, CLEAR_DIFFERENCE),
    "all_pairs": partial(_agreements, _score, 2 * _ROUNDING),
    "chosen_value": _chosen,
}
"""Measures in which two verifiers of the same candidates may differ."""

_BESIDE: dict[str, _Observe] = {"random_value": _random, "best_value": _best, "chosen_less_random": _gain}

_BY_LOG_PROB: dict[str, _Observe] = {
    "clear_pairs_by_log_prob": partial(_agreements, _log_prob, CLEAR_DIFFERENCE),
    "all_pairs_by_log_prob": partial(_agreements, _log_prob, 2 * _ROUNDING),
}
"""Measures of the mean log-probability in the score's place, of texts that were sampled at once."""


def measure_verifier(values: ScoredValues) -> dict[str, dict[str, Any]]:
    """Return the measures of a verifier by stage, and of whole answers.

    Means are taken over questions, those of pairs over the pairs of all questions; standard errors are clustered by
    image. A measure is None where no question tells anything about it.

    Args:
        values: Values and scores.
    """
    return {part: _measure_part(groups) for part, groups in values.parts.items()}


def _measure_part(groups: Sequence[CandidateGroup]) -> dict[str, Any]:
    texts = [text for group in groups for text in group.texts]
    has_log_prob = all(text.mean_log_prob is not None for text in texts)
    observed = _BY_SCORE | _BESIDE | (_BY_LOG_PROB if has_log_prob else {})
    return {
        "questions": len(groups),
        "candidates": sum(text.draws for text in texts),
        **{name: _mean(groups, observe) for name, observe in observed.items()},
        "calibration": calibration(texts),
        "other_probability": _spread([text.other_probability for text in texts for _ in range(text.draws)]),
    }


def _mean(groups: Sequence[CandidateGroup], observe: _Observe) -> dict[str, Any] | None:
    observed = [(group, observe(group)) for group in groups]
    found = [value for _, values in observed for value in values]
    if not found:
        return None
    estimate = estimate_mean(found, [group.cluster for group, values in observed for _ in values])
    return {**asdict(estimate), "questions": sum(bool(values) for _, values in observed)}


def _spread(numbers: Sequence[float]) -> dict[str, float]:
    """Return the mean of numbers and their 95th percentile, which is interpolated linearly between two of them."""
    last = quantiles(numbers, n=20, method="inclusive")[-1] if len(numbers) > 1 else numbers[0]
    return {"mean": fsum(numbers) / len(numbers), "percentile_95": last}


def calibration(texts: Sequence[ValuedText]) -> dict[str, Any]:
    """Return how well scores are calibrated as probabilities of a right conclusion, each draw counted once.

    The expected calibration error is the mean over draws of the difference, in the draw's bin, between mean score and
    mean value. The Brier score is the mean square of the score less the outcome, 1 or 0, of a continuation; with s the
    score and v the value it is that of (s - v)^2 + v (1 - v), which does not depend on the number of continuations.

    Args:
        texts: Candidates, of which there must be one at least.
    """
    edges = [i / BINS for i in range(BINS + 1)]
    held: list[list[ValuedText]] = [[] for _ in range(BINS)]
    for text in texts:
        held[bisect_right(edges, text.score, 1, BINS) - 1].append(text)
    bins, errors = [], []
    for i, members in enumerate(held):
        count = sum(text.draws for text in members)
        score = fsum(text.draws * text.score for text in members)
        value = fsum(text.draws * text.value for text in members)
        errors.append(abs(score - value))
        told = {"mean_score": score / count if count else None, "mean_value": value / count if count else None}
        bins.append({"from": edges[i], "to": edges[i + 1], "candidates": count, **told})
    draws = sum(text.draws for text in texts)
    squares = (text.draws * (text.score**2 - 2 * text.score * text.value + text.value) for text in texts)
    return {
        "bins": bins,
        "expected_calibration_error": fsum(errors) / draws,
        "brier_score": fsum(squares) / draws,
    }


def differences(values: ScoredValues, base: ScoredValues) -> dict[str, dict[str, Any]]:
    """Return by how much the measures of a verifier differ from those of another one on the same candidates.

    Candidates are the same where question, preceding text, texts and values are. Stages that have none are left out.

    Args:
        values: Values and scores of the verifier.
        base: Values and scores of the other one.
    """
    found = {}
    for part, groups in values.parts.items():
        others = {(group.key, *_same(group)): group for group in base.parts.get(part, ())}
        both = ((group, others.get((group.key, *_same(group)))) for group in groups)
        pairs = [(group, other) for group, other in both if other is not None]
        if pairs:
            told = {name: _difference(pairs, observe) for name, observe in _BY_SCORE.items()}
            found[part] = {"questions": len(pairs), "left_out": len(groups) - len(pairs), **told}
    return found


def _same(group: CandidateGroup) -> tuple[Hashable, ...]:
    """Return what two verifiers must have rated alike to be compared."""
    return group.after, *((text.text, text.draws, text.value) for text in group.texts)


def _difference(pairs: Sequence[tuple[CandidateGroup, CandidateGroup]], observe: _Observe) -> dict[str, Any] | None:
    observed = [(group.cluster, observe(group), observe(other)) for group, other in pairs]
    clusters = [cluster for cluster, values, _ in observed for _ in values]
    if not clusters:
        return None
    first = [value for _, values, _ in observed for value in values]
    second = [value for _, _, values in observed for value in values]
    told = asdict(paired_difference(first, second, clusters))
    return {"count": told.pop("questions"), **told, "questions": sum(bool(values) for _, values, _ in observed)}
