"""Paired statistics against scipy, statsmodels, and the exact power of the test over all outcomes."""

import math

import numpy as np
import pytest
import statsmodels.api
from scipy.stats import binom, binomtest, norm
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from llava_cot_jax.evaluation.paired import exact_test, holm_adjusted, paired_difference, questions_needed
from llava_cot_jax.evaluation.statistics import estimate_accuracy

DRAW = np.random.default_rng(3)


def clustered_mean(values: np.ndarray, groups: np.ndarray):
    """The mean of values as a regression on nothing, with a covariance that is robust to groups."""
    fit = statsmodels.api.OLS(values, np.ones(len(values)))
    return fit.fit(cov_type="cluster", cov_kwds={"groups": groups, "use_correction": False}, use_t=False)


@pytest.mark.parametrize("per_group", [1, 3, 10])
def test_a_difference_is_a_regression_with_clustered_errors(per_group):
    """Of answers that are right or wrong, and of scores between both, as interpolated ones are."""
    groups = DRAW.integers(0, 60 // per_group, size=60)
    first, second = DRAW.integers(2, size=60).astype(float), DRAW.integers(3, size=60) / 2
    found, fit = (
        paired_difference(first.tolist(), second.tolist(), groups.tolist()),
        clustered_mean(first - second, groups),
    )
    assert (found.questions, found.clusters) == (60, len(set(groups.tolist())))
    assert found.difference == pytest.approx(fit.params[0])
    assert found.standard_error == pytest.approx(fit.bse[0])
    assert found.interval == pytest.approx(tuple(fit.conf_int()[0]))


def test_one_group_has_no_standard_error():
    found = paired_difference([True, True, False], [True, False, False], "aaa")
    assert (found.difference, found.standard_error, found.interval) == (pytest.approx(1 / 3), None, None)


def test_the_errors_of_one_method_are_those_of_statsmodels():
    right, groups = DRAW.integers(2, size=50).astype(bool), DRAW.integers(0, 12, size=50)
    found = estimate_accuracy(right.tolist(), groups.tolist())
    assert found.clustered_standard_error == pytest.approx(clustered_mean(right.astype(float), groups).bse[0])
    low, high = proportion_confint(right.sum(), 50, method="normal")
    assert (high - low) / 2 == pytest.approx(norm.ppf(0.975) * found.standard_error)


@pytest.mark.parametrize("pair", [(0, 0), (1, 0), (0, 6), (5, 5), (3, 12), (40, 61), (700, 803)])
def test_the_exact_test(pair):
    first, second = pair
    table = [[17, first], [second, 4]]
    assert exact_test(*pair) == pytest.approx(mcnemar(table, exact=True).pvalue, rel=1e-9)
    if first + second:
        assert exact_test(*pair) == pytest.approx(binomtest(first, first + second).pvalue, rel=1e-9)


def test_holm():
    for count in (1, 2, 21):
        p_values = DRAW.uniform(0, 0.2, size=count).round(2).tolist()  # some of them equal
        assert holm_adjusted(p_values) == pytest.approx(multipletests(p_values, method="holm")[1].tolist())
    assert holm_adjusted([]) == []


@pytest.mark.parametrize("counts", [(60, 40, 200), (9, 7, 40), (120, 90, 1000)])
def test_as_many_questions_as_needed_show_the_difference(counts):
    """The power of McNemar's test, added up over all outcomes with their probabilities, is 80% for the number found.

    The formula takes the numbers as normally distributed; they are whole, which moves the power by less than 2% here.
    """
    only_first, only_second, questions = counts
    share = (only_first + only_second) / questions
    needed, power = questions_needed(*counts), 0.0
    for discordant in range(1, needed + 1):
        ones = np.arange(discordant + 1)
        is_shown = np.abs(2 * ones - discordant) >= norm.ppf(0.975) * math.sqrt(discordant)
        chance = binom.pmf(ones, discordant, only_first / (only_first + only_second))
        power += binom.pmf(discordant, needed, share) * chance[is_shown].sum()
    assert power == pytest.approx(0.8, abs=0.02)
    assert questions_needed(only_second, only_first, questions) == needed


def test_no_difference_takes_no_number_of_questions():
    assert questions_needed(4, 4, 20) is None and questions_needed(0, 0, 20) is None
