"""Accuracy with its standard error, over questions of which several may be about one image."""

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


def estimate_accuracy(right: Sequence[bool], clusters: Sequence[Hashable]) -> AccuracyEstimate:
    """Estimate the accuracy of answers, of which there must be one at least.

    With p the share of right ones of n answers x, each 0 or 1, the standard error is the binomial one,
    sqrt(p (1 - p) / n). The clustered one is sqrt(sum over groups of (sum over the group of (x - p))^2) / n, which
    Liang and Zeger gave (Biometrika 73, 1986), and Miller recommends for evaluations (arXiv:2411.00640, section 2.2).
    Where each question is a group of its own, both are the same.

    Args:
        right: Whether each answer is right.
        clusters: Group of each question, such as its image.
    """
    count, correct = len(right), sum(right)
    share, binomial = accuracy(right)
    sums: dict[Hashable, float] = defaultdict(float)
    for is_right, cluster in zip(right, clusters, strict=True):
        sums[cluster] += is_right - share
    clustered = math.sqrt(math.fsum(total * total for total in sums.values())) / count if len(sums) > 1 else None
    return AccuracyEstimate(count, correct, len(sums), share, binomial, clustered)
