"""Standard errors against values by hand, the jackknife, and the exact spread of accuracy over all outcomes."""

import itertools
import math

import numpy as np
import pytest

from llava_cot_jax.evaluation.statistics import estimate_accuracy


def test_by_hand():
    alone = estimate_accuracy([True, True, True, False], "abcd")
    assert (alone.questions, alone.right, alone.clusters, alone.accuracy) == (4, 3, 4, 0.75)
    assert alone.standard_error == pytest.approx(0.21650635)  # sqrt(3/4 * 1/4 / 4)
    assert alone.clustered_standard_error == pytest.approx(alone.standard_error)
    pairs = estimate_accuracy([True, True, False, False], "aabb")
    assert pairs.standard_error == 0.25
    assert pairs.clustered_standard_error == pytest.approx(0.35355339)  # sqrt(1 + 1) / 4
    assert estimate_accuracy([True, False], "aa").clustered_standard_error is None


def test_the_jackknife_over_groups_of_one_size():
    """Its variance, where one group after the other is left out, is the clustered one times C / (C - 1)."""
    draw, groups, size = np.random.default_rng(0), 11, 3
    right = draw.integers(2, size=(groups, size)).astype(bool)
    left_out = [np.delete(right, group, axis=0).mean() for group in range(groups)]
    jackknife = (groups - 1) / groups * np.square(left_out - np.mean(left_out)).sum()
    found = estimate_accuracy(right.ravel().tolist(), np.repeat(range(groups), size).tolist())
    assert found.clustered_standard_error**2 * groups / (groups - 1) == pytest.approx(jackknife)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_the_spread_over_all_outcomes(share):
    """Questions about one image are right or wrong together here. All outcomes, with their probabilities, are counted.

    The variance of the accuracy is then v = p (1 - p) sum(m^2) / n^2, with m the sizes of groups. The mean of the
    estimate is that with each m^2 times 1 - 2 m / n + sum(m^2) / n^2, since p is estimated from the same answers. So
    it lies between v (1 - 2 max(m) / n) and v (1 + sum(m^2) / n^2).
    """
    sizes = [1, 1, 2, 2, 3, 3, 1, 4, 2, 1]
    groups = [group for group, size in enumerate(sizes) for _ in range(size)]
    count, squares = len(groups), sum(size * size for size in sizes)
    mean = second = estimate = independent = 0.0
    for outcome in itertools.product([False, True], repeat=len(sizes)):
        probability = math.prod(share if each else 1 - share for each in outcome)
        found = estimate_accuracy([outcome[group] for group in groups], groups)
        mean += probability * found.accuracy
        second += probability * found.accuracy**2
        estimate += probability * found.clustered_standard_error**2
        independent += probability * found.standard_error**2
    variance = second - mean**2
    assert mean == pytest.approx(share) and variance == pytest.approx(share * (1 - share) * squares / count**2)
    assert variance * (1 - 2 * max(sizes) / count) < estimate < variance * (1 + squares / count**2)
    assert independent < variance * count / squares  # that of independent questions is too small
