"""Paired statistics of two methods that answered the same questions, of which several may be about one image."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from llava_cot_jax.evaluation.statistics import estimate_mean

CONFIDENCE = 0.95
"""Share of confidence intervals that hold the true value; one minus it is the level of a test."""

POWER = 0.8
"""Probability with which ``questions_needed`` asks a test to show a difference."""


@dataclass(frozen=True)
class PairedDifference:
    """Difference between the accuracies of two methods on the same questions.

    Attributes:
        questions: Number of questions.
        clusters: Number of groups of questions that share an image.
        difference: Accuracy of the first method less that of the second.
        standard_error: Standard error of the difference, clustered by image. None where there are fewer than two
            groups.
        interval: Bounds of the confidence interval of ``CONFIDENCE``; None without a standard error.
    """

    questions: int
    clusters: int
    difference: float
    standard_error: float | None
    interval: tuple[float, float] | None


def paired_difference(
    first: Sequence[float], second: Sequence[float], clusters: Sequence[Hashable]
) -> PairedDifference:
    """Estimate the difference between two methods, of whose n questions there must be one at least.

    With d the difference between the scores of a question, its mean and the standard error are those of
    ``estimate_mean``. The error is smaller than that of independent questions where both methods are right on the same
    ones (Miller, arXiv:2411.00640, section 4). The interval is that of a normal distribution.

    Args:
        first: Score of each question by the first method: 1 where it is right, or a mean of such.
        second: Score of each question by the second method.
        clusters: Group of each question, such as its image.
    """
    found = estimate_mean([a - b for a, b in zip(first, second, strict=True)], clusters)
    if found.standard_error is None:
        return PairedDifference(found.count, found.clusters, found.mean, None, None)
    half = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * found.standard_error
    interval = (found.mean - half, found.mean + half)
    return PairedDifference(found.count, found.clusters, found.mean, found.standard_error, interval)


def exact_test(only_first: int, only_second: int) -> float:
    """Return the two-sided p-value of McNemar's exact test.

    Questions on which both methods are right, or both wrong, tell nothing. Were the methods equal, either would be the
    right one with probability 1/2 on each of the others, so that its number of these is binomial (McNemar,
    Psychometrika 12, 1947, who approximates this). The questions are taken as independent.

    Args:
        only_first: Number of questions that the first method alone answers right.
        only_second: Number of questions that the second method alone answers right.
    """
    discordant, fewer = only_first + only_second, min(only_first, only_second)
    tail, ways = 0, 1
    for k in range(fewer + 1):
        tail += ways
        ways = ways * (discordant - k) // (k + 1)  # of choosing k + 1 of them
    return min(1.0, 2 * tail / 2**discordant)


def questions_needed(only_first: int, only_second: int, questions: int) -> int | None:
    """Return how many questions McNemar's test needs to show a difference like the one that was seen.

    With p the share of questions that one method alone answers right, and D the difference between the accuracies, it
    is ((a sqrt(p) + b sqrt(p - D^2)) / D)^2, where a and b are the normal quantiles of the two-sided level of one minus
    ``CONFIDENCE`` and of ``POWER`` (Connor, Biometrics 43, 1987). The questions are taken as independent.

    Args:
        only_first: Number of questions that the first method alone answers right.
        only_second: Number of questions that the second method alone answers right.
        questions: Number of all questions.

    Returns:
        The number of questions; None where there is no difference.
    """
    if only_first == only_second:
        return None
    share, difference = (only_first + only_second) / questions, (only_first - only_second) / questions
    level, power = NormalDist().inv_cdf((1 + CONFIDENCE) / 2), NormalDist().inv_cdf(POWER)
    needed = (level * math.sqrt(share) + power * math.sqrt(share - difference * difference)) / difference
    return math.ceil(needed * needed)


def holm_adjusted(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number by Holm's method (Scandinavian Journal of Statistics 6, 1979).

    Below a level of these, the chance of a single difference that is none is at most that level.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
