"""Accuracies and other means with their standard errors, over questions of which several may be about one image."""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class AccuracyEstimate:
    """Share of right answers, and how far it may be from that of all questions of the kind.

    Attributes:
        questions: Number of questions.
        right: Number of right answers.
        clusters: Number of groups of questions that share an image.
        accuracy: Share of right answers.
        standard_error: Standard error for questions that are independent of each other.
        clustered_standard_error: Standard error for questions that are independent of those of other groups alone. None
            where there are fewer than two groups.
    """

    questions: int
    right: int
    clusters: int
    accuracy: float
    standard_error: float
    clustered_standard_error: float | None


def accuracy(right: Sequence[bool]) -> tuple[float, float]:
    """Return the share of right answers, of which there must be one at least, and its binomial standard error."""
    share = sum(right) / len(right)
    return share, math.sqrt(share * (1 - share) / len(right))


@dataclass(frozen=True)
class MeanEstimate:
    """Mean of values, and how far it may be from that of all questions of the kind.

    Attributes:
        count: Number of values.
        clusters: Number of groups of values that share an image.
        mean: Mean of the values.
        standard_error: Standard error for values that are independent of those of other groups alone. None where there
            are fewer than two groups.
    """

    count: int
    clusters: int
    mean: float
    standard_error: float | None


def estimate_mean(values: Sequence[float], clusters: Sequence[Hashable]) -> MeanEstimate:
    """Estimate a mean of n values x, of which there must be one at least.

    With m the mean, the standard error is sqrt(sum over groups of (sum over the group of (x - m))^2) / n, which Liang
    and Zeger gave (Biometrika 73, 1986), and Miller recommends for evaluations (arXiv:2411.00640, section 2.2).

    Args:
        values: The values.
        clusters: Group of each value, such as the image of its question.
    """
    count = len(values)
    mean = math.fsum(values) / count
    sums: dict[Hashable, float] = defaultdict(float)
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] += value - mean
    error = math.sqrt(math.fsum(total * total for total in sums.values())) / count if len(sums) > 1 else None
    return MeanEstimate(count, len(sums), mean, error)


def estimate_accuracy(right: Sequence[bool], clusters: Sequence[Hashable]) -> AccuracyEstimate:
    """Estimate the accuracy of answers, of which there must be one at least.

    With p the share of right ones of n answers, the standard error is the binomial one, sqrt(p (1 - p) / n). The
    clustered one is that of ``estimate_mean``. Where each question is a group of its own, both are the same.

    Args:
        right: Whether each answer is right.
        clusters: Group of each question, such as its image.
    """
    share, binomial = accuracy(right)
    found = estimate_mean(right, clusters)
    return AccuracyEstimate(found.count, sum(right), found.clusters, share, binomial, found.standard_error)
