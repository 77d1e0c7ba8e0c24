"""Starts the command that trains: on one device, and on real processes that together are one run.

They compile as a user's would, unless they are ``quick``.
"""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.processes import free_port
from tests.training.small_run import arguments, command, environment

STEPS = 20

COMMAND = """
from llava_cot_jax import cli, train
from tests.processes import free_port
{disturb}
cli.run(train.main)
"""


@dataclass(frozen=True)
class Hosts:
    """A run on several processes.

    Attributes:
        processes: how many.
        devices: of each.
        settings: that differ from those of the run on one device.
    """

    processes: int
    devices: int
    settings: dict[str, Any]


TWO = Hosts(2, 2, {"mesh.fsdp": 2, "mesh.tensor": 2})
FOUR = Hosts(4, 1, {"mesh.data": 2, "mesh.fsdp": 2, "grad_accum_steps": 2})


def run_alone(place: Path, name: str, cache: Path, *, quick: bool = False, **settings: Any) -> None:
    """On one device, from the checkpoint ``place / "small"`` into ``place / name``."""
    given = arguments(place / "small", place / name, steps=STEPS, **settings)
    done = command("train", *given, cache=cache, quick=quick)
    assert done.returncode == 0, done.stderr


def start_on_hosts(
    place: Path,
    name: str,
    cache: Path,
    hosts: Hosts,
    *,
    each: Mapping[int, Sequence[str]] | None = None,
    disturb: Mapping[int, str] | None = None,
    quick: bool = False,
    **settings: Any,
) -> list[subprocess.Popen[bytes]]:
    """The processes of a run, which write what they print to ``log_of`` each.

    Args:
        place: Holds the checkpoint ``small``, the run and the logs.
        name: Of the run.
        cache: Of compiled programs.
        hosts: The processes.
        each: Further arguments of single processes, by index.
        disturb: Python that single processes run before the command, by index.
        quick: Whether programs compile quickly.
        settings: Of all processes.
    """
    coordinator = f"localhost:{free_port()}"
    group = ["--hosts.coordinator", coordinator, "--hosts.count", str(hosts.processes)]
    shared = arguments(place / "small", place / name, **{"steps": STEPS, **hosts.settings, **settings})
    commands = []
    for index in range(hosts.processes):
        script, own = COMMAND.format(disturb=(disturb or {}).get(index, "")), (each or {}).get(index, ())
        commands.append([sys.executable, "-c", script, *shared, *group, "--hosts.index", str(index), *own])
    logs = [log_of(place, name, index) for index in range(hosts.processes)]
    return [
        subprocess.Popen(
            command,
            env=environment(cache, hosts.devices, quick=quick),
            stdout=log.open("w"),  # not pipes: all must end together
            stderr=log.with_suffix(".err").open("w"),
        )
        for command, log in zip(commands, logs, strict=True)
    ]


def log_of(place: Path, name: str, index: int) -> Path:
    """What process ``index`` of a run prints; beside it, with ``.err``, its errors."""
    return place / f"{name} {index}.log"


def ended(started: list[subprocess.Popen[bytes]], seconds: float = 900) -> list[int]:
    """The exit codes of processes; none is left after it."""
    try:
        return [process.wait(timeout=seconds) for process in started]
    finally:
        for process in started:
            process.kill()


def errors_of(place: Path, name: str, hosts: Hosts) -> list[str]:
    """What each process of a run has written to stderr."""
    return [log_of(place, name, index).with_suffix(".err").read_text() for index in range(hosts.processes)]


def run_on_hosts(place: Path, name: str, cache: Path, hosts: Hosts, **settings: Any) -> list[str]:
    """What each process prints."""
    codes = ended(start_on_hosts(place, name, cache, hosts, **settings))
    logs = [log_of(place, name, index) for index in range(hosts.processes)]
    assert not any(codes), [error[-2000:] for error in errors_of(place, name, hosts)]
    return [log.read_text() for log in logs]
