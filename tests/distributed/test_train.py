"""The command that trains, on real processes and on meshes: the losses of one device, over 20 steps."""

import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.training.small_run import arguments, command, environment, losses, metrics, validation_loss, write_small

STEPS = 20
HOSTS = {
    "two": (2, 2, {"mesh.fsdp": 2, "mesh.tensor": 2}),
    "four": (4, 1, {"mesh.data": 2, "mesh.fsdp": 2, "micro_batches": 2}),
}
"""Processes, the devices of each, and settings."""


def start(place: Path, cache: Path, name: str, **settings: Any) -> list[str]:
    return arguments(place / "small", place / name, steps=STEPS, **settings)


def run_on_hosts(place: Path, cache: Path, name: str) -> str:
    """What the first of several processes prints."""
    count, devices, settings = HOSTS[name]
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"localhost:{probe.getsockname()[1]}"
    shared = [*start(place, cache, name, **settings), "--hosts.coordinator", coordinator, "--hosts.count", str(count)]
    logs = [place / f"{name} {index}.log" for index in range(count)]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "llava_cot_jax.train", *shared, "--hosts.index", str(index)],
            env=environment(cache, devices),
            stdout=log.open("w"),
            stderr=log.with_suffix(".err").open("w"),
        )
        for index, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(timeout=600) for process in started]
    finally:
        for process in started:
            process.kill()
    assert not any(codes), [log.with_suffix(".err").read_text()[-2000:] for log in logs]
    assert all(log.read_text().replace("[Gloo]", "").count("step") == 0 for log in logs[1:])  # one of them speaks
    return logs[0].read_text()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hosts")
    write_small(folder / "small")
    return folder


@pytest.fixture(scope="module")
def alone(place: Path, cache: Path) -> list[float]:
    """The losses on one device."""
    done = command("train", *start(place, cache, "one"), cache=cache)
    assert done.returncode == 0, done.stderr
    found = losses(place / "one")
    assert found[-1] < 0.9 * found[0]
    # Unequal counts of trained tokens: that shards and micro-batches are weighted by them shows.
    assert len({line["trained_tokens"] for line in metrics(place / "one") if "loss" in line}) > STEPS / 2
    return found


@pytest.mark.slow
class TestLosses:
    @pytest.mark.parametrize("parts", [2, 4])
    def test_of_a_batch_in_parts(self, place, cache, alone, parts):
        name = f"{parts} parts"
        done = command("train", *start(place, cache, name, micro_batches=parts), cache=cache)
        assert done.returncode == 0, done.stderr
        np.testing.assert_allclose(losses(place / name), alone, rtol=1e-5)

    @pytest.mark.parametrize("hosts", HOSTS)
    def test_of_several_processes(self, place, cache, alone, hosts):
        printed = run_on_hosts(place, cache, hosts)
        np.testing.assert_allclose(losses(place / hosts), alone, rtol=1e-5)
        assert validation_loss(place / hosts) == pytest.approx(validation_loss(place / "one"), rel=1e-5)

        count, devices, settings = HOSTS[hosts]
        assert f"{count * devices} x cpu, processes: {count}" in printed
        size = (place / "small/model.safetensors").stat().st_size / 1e9
        read = [float(x) for x in re.search(r"GB: (.*)", printed)[1].split(", ")]
        assert len(read) == count
        # Norms, biases and positions are whole on each.
        share = 1 / (settings["mesh.fsdp"] * settings.get("mesh.tensor", 1) / devices)
        assert max(read) < 1.15 * share * size and sum(read) >= 0.99 * size

        exported = [place / f"{name} exported" for name in ("one", hosts)]
        for name, folder in zip(("one", hosts), exported, strict=True):
            if not folder.exists():
                done = command("convert", str(place / name), str(folder), cache=cache)
                assert done.returncode == 0, done.stderr
        ours, theirs = (load_file(folder / "model.safetensors") for folder in exported)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            np.testing.assert_allclose(theirs[name], tensor, atol=2e-4, err_msg=name)
