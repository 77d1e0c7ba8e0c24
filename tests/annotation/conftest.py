"""Fixtures: short delays, a key, and a stand-in endpoint that runs."""

from collections.abc import Iterator

import pytest

from llava_cot_jax.annotation import endpoint
from tests.annotation.runs import KEY
from tests.annotation.stand_in_endpoint import StandIn, running


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Back-offs are short, and there is a key."""
    monkeypatch.setattr(endpoint, "_FIRST_DELAY", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    with running() as endpoint_:
        yield endpoint_
