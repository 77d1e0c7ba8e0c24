"""Fixtures of the tests of the search."""

from pathlib import Path

import pytest

from tests.search.models import PROMPTS


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    """File with short prompts of a judge, for small models."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.yaml"
    path.write_text(PROMPTS)
    return path
