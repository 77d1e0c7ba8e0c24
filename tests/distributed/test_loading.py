"""Two processes of four devices each: every process reads its own shards' bytes, and one writes what all hold."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.processes import free_port, reports_of, xla_flags

FIXTURE = Path(__file__).parents[1] / "fixtures/mllama_tiny"
WORKER = Path(__file__).with_name("loading_worker.py")
BYTES = 2_024_492  # of the fixture's tensors


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def found(scratch: Path) -> list[dict[str, Any]]:
    """What each process printed."""
    port = free_port()
    environment = os.environ | {"XLA_FLAGS": xla_flags(devices=4)}
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(process), "2", str(port), str(FIXTURE), str(scratch)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    return reports_of(workers)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["unrolled", "stacked"])
class TestTwoProcesses:
    @pytest.mark.parametrize(
        ("mesh", "at_most"),
        [((1, 8, 1), 0.55), ((1, 4, 2), 0.55), ((2, 2, 2), 1.0), ((8, 1, 1), 1.0)],  # a replica is the whole model
    )
    def test_each_reads_its_share(
        self, found: list[dict[str, Any]], mesh: tuple[int, int, int], at_most: float, layout: str
    ) -> None:
        for process in found:
            counts = process[f"{mesh} {layout}"]
            assert counts["read"] == counts["planned"] == counts["share"]
            assert BYTES / 2 <= counts["read"] <= at_most * BYTES

    @pytest.mark.parametrize("mesh", [(1, 8, 1), (1, 4, 2), (2, 2, 2), (8, 1, 1)])
    def test_saved_as_loaded(
        self, found: list[dict[str, Any]], scratch: Path, mesh: tuple[int, int, int], layout: str
    ) -> None:
        folder = scratch / f"{mesh} {layout}"
        saved = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        stored = load_file(FIXTURE / "model.safetensors")
        assert saved.keys() == stored.keys()
        assert all(np.array_equal(saved[name], stored[name]) for name in stored)


@pytest.mark.slow
def test_a_refusal_reaches_every_process(found: list[dict[str, Any]]) -> None:
    first, second = (process["refusal"] for process in found)
    assert "exists and is not empty" in first
    assert "the first process could not write" in second
