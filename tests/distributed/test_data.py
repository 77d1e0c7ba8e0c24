"""The same global batches, byte for byte, from 1 and 2 processes with 0 workers each, and beyond the suite with 1.

From 4 processes and with 2 workers too: ``tests/evidence/data_hosts.py``.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.data_worker import BATCH, RANGES
from tests.processes import WITHOUT_TORCH, free_port, xla_flags
from tests.tiers import in_tiers

WORKER = Path(__file__).with_name("data_worker.py")
HOSTS = (1, 2)


def run(processes: int, scratch: Path, most_workers: int) -> list[dict[str, Any]]:
    """What each process got."""
    port = free_port()
    environment = os.environ | {"XLA_FLAGS": xla_flags(4 // processes), "PYTHONPATH": WITHOUT_TORCH}
    started = [
        subprocess.Popen(
            [sys.executable, WORKER, str(process), str(processes), str(port), scratch, str(most_workers)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(processes)
    ]
    try:
        errors = [process.communicate(timeout=900)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert not any(process.returncode for process in started), errors
    return [json.loads((scratch / f"{process} of {processes}.json").read_text()) for process in range(processes)]


@pytest.fixture(scope="module", params=in_tiers([0, 1], suite=[0]), ids=lambda workers: f"{workers} workers")
def workers(request: pytest.FixtureRequest) -> int:
    """The most workers that a process has."""
    return int(request.param)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, workers: int) -> dict[int, list[dict[str, Any]]]:
    scratch = tmp_path_factory.mktemp("streams")
    return {processes: run(processes, scratch, workers) for processes in HOSTS}


def whole(processes: list[dict[str, Any]], name: str) -> list[dict[str, str]]:
    """The global batches: every shard's digest, whichever process holds it."""
    each = [process[name] for process in processes]
    merged: list[dict[str, str]] = []
    for parts in zip(*each, strict=True):
        assert sum(map(len, parts)) == len({place for part in parts for place in part})  # no row is held twice
        merged.append({place: digest for part in parts for place, digest in part.items()})
    return merged


@pytest.mark.slow
class TestHosts:
    @pytest.mark.parametrize("hosts", HOSTS)
    def test_the_batches_are_the_same(self, found, hosts, workers):
        reference = whole(found[1], "in order, 0 workers, 0 to 24")
        assert len(reference) == 24 and len({json.dumps(batch) for batch in reference}) == 24
        assert whole(found[hosts], f"in order, {workers} workers, 0 to 24") == reference

    @pytest.mark.parametrize("hosts", HOSTS)
    def test_resumed_they_are_those_of_a_run_that_never_stopped(self, found, hosts, workers):
        """Whatever number of hosts the run had before."""
        reference = whole(found[1], "in order, 0 workers, 0 to 24")
        assert whole(found[hosts], f"in order, {workers} workers, 7 to 15") == reference[7:15]

    @pytest.mark.parametrize("hosts", HOSTS)
    def test_rows_find_their_place_on_an_interleaved_mesh(self, found, hosts):
        reference = whole(found[1], "in order, 0 workers, 0 to 24")
        assert whole(found[hosts], "interleaved, 0 workers, 0 to 24") == reference

    @pytest.mark.parametrize("order", ["in order", "interleaved"])
    @pytest.mark.parametrize("hosts", HOSTS)
    def test_each_host_decodes_its_share_alone(self, found, hosts, order):
        for start, stop in RANGES:
            for process in found[hosts]:
                assert process[f"{order}, 0 workers, {start} to {stop}: read"] == (stop - start) * BATCH // hosts
