"""Two processes of two devices each that answer with one model, against one process with one device."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.processes import free_port, reports_of, xla_flags

WORKER = Path(__file__).with_name("answer_worker.py")


SUITE, FURTHER = ("retracing", "generator", "stream"), ("stages", "vote", "sentences")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the first process, the second one, and one alone have printed."""
    return run(tmp_path_factory.mktemp("answers"), SUITE)


@pytest.fixture(scope="module")
def found_of_further(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The same of the searches beyond the suite."""
    return run(tmp_path_factory.mktemp("further answers"), FURTHER)


def run(scratch: Path, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return what each process has printed."""
    port = free_port()
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(process), str(processes), str(port), str(scratch), *names],
            env=os.environ | {"XLA_FLAGS": xla_flags(devices=processes)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process, processes in ((0, 2), (1, 2), (0, 1))
    ]
    return reports_of(workers)


@pytest.mark.slow
@pytest.mark.parametrize("name", SUITE)
def test_each_process_has_the_answers_of_one_alone(found: list[dict[str, Any]], name: str) -> None:
    first, second, alone = (process[name] for process in found)
    assert first == second == alone


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", FURTHER)
def test_further_searches_too(found_of_further: list[dict[str, Any]], name: str) -> None:
    first, second, alone = (process[name] for process in found_of_further)
    assert first == second == alone


@pytest.mark.slow
def test_nothing_compiles_after_the_first_answer(found: list[dict[str, Any]]) -> None:
    assert [process[name]["compiled"] for process in found for name in ("generator", "stream")] == [0] * 6


@pytest.mark.slow
def test_a_scorer_of_the_users_own_is_refused(found: list[dict[str, Any]]) -> None:
    first, second, alone = (process.get("refusal") for process in found)
    assert alone is None and first == second
    assert "which each process would call for itself" in first
