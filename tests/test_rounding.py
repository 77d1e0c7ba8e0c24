"""Rounding up, against exact fractions and lists."""

import math
from fractions import Fraction

import pytest

from llava_cot_jax.rounding import ceil_div, round_up, round_up_to_power_of_two


@pytest.mark.parametrize("divisor", [1, 3, 128])
@pytest.mark.parametrize("number", [0, 1, 2, 3, 127, 128, 129, 10**18 + 1])
def test_to_a_multiple(number: int, divisor: int) -> None:
    assert ceil_div(number, divisor) == math.ceil(Fraction(number, divisor))
    assert round_up(number, divisor) == ceil_div(number, divisor) * divisor


def test_to_a_power_of_two() -> None:
    assert [round_up_to_power_of_two(n) for n in (1, 2, 3, 4, 5, 8, 9)] == [1, 2, 4, 4, 8, 8, 16]
