"""Tiers of tests: the quick one, the suite, and what takes too long for it.

``pytest -m "not slow"`` is the quick tier, ``pytest`` the suite, and ``evidence/exhaustive.py`` runs what is beyond.
"""

from collections.abc import Collection, Iterable
from typing import Any

import pytest

EXHAUSTIVE = (pytest.mark.slow, pytest.mark.exhaustive)
"""Markers of a variant beyond the suite."""


def in_tiers(variants: Iterable[Any], *, quick: Collection[Any] = (), suite: Collection[Any] = ()) -> list[Any]:
    """Return parameters of a test, by the tier of each: those that are named in neither tier are beyond the suite.

    Raises:
        ValueError: A tier names what is no variant.
    """
    given = list(variants)
    if unknown := [name for name in (*quick, *suite) if name not in given]:
        raise ValueError(f"no variants: {unknown}")
    return [
        each if each in quick else pytest.param(each, marks=pytest.mark.slow if each in suite else EXHAUSTIVE)
        for each in given
    ]
