"""Real processes of a run that differ, fail, vanish or are waited for. More of them: ``evidence/hosts.py``."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from tests.demo import random_weights
from tests.distributed.train_runs import COMMAND, Hosts, ended, errors_of, start_on_hosts
from tests.processes import WITHOUT_TORCH, free_port
from tests.training.small_run import arguments, environment, small_config, write_small

TWO = Hosts(2, 1, {"mesh.fsdp": 2, "eval_examples": 0, "steps": 4})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the small checkpoint, another one with other weights, and the runs."""
    folder = tmp_path_factory.mktemp("hosts")
    write_small(folder / "small")
    write_small(folder / "other")
    save_file(random_weights(small_config(), seed=1), folder / "other/model.safetensors", metadata={"format": "pt"})
    return folder


def last_lines(place: Path, name: str) -> list[str]:
    """The last line that each process has written to stderr."""
    return [error.splitlines()[-1] for error in errors_of(place, name, TWO)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        (
            "optimizer.learning_rate",
            "0.002",
            "optimizer.learning_rate is 0.003 in process 0 ({0}) and 0.002 in process",
        ),
        ("checkpoint", "{place}/other", "the processes of the run differ: the digest of the weights is"),
    ],
)
def test_hosts_that_differ_end_before_the_first_step(place, cache, name, value, told):
    each = {1: [f"--{name}", value.format(place=place)]}
    started = start_on_hosts(place, f"differs in {name}", cache, TWO, each=each, quick=True)
    assert ended(started, 100) == [2, 2]
    first, second = last_lines(place, f"differs in {name}")
    assert first == second and first.startswith("error: ") and told.format(socket.gethostname()) in first


@pytest.mark.slow
@pytest.mark.parametrize(
    ("who", "name", "value", "told"),
    [
        (1, "data", "/nowhere", "/nowhere is no prepared data set (there is no prepared.json)"),
        (0, "seed", "x", "--seed is 'x'"),  # it does not get as far as the options of hosts
    ],
)
def test_the_mistake_of_one_ends_the_other(place, cache, who, name, value, told):
    each = {who: [f"--{name}", value]}
    started = start_on_hosts(place, f"mistaken {name}", cache, TWO, each=each, quick=True)
    assert ended(started, 60) == [2, 2]
    lines = last_lines(place, f"mistaken {name}")
    assert lines[who].startswith("error: ") and told in lines[who]
    assert lines[1 - who].startswith(f"error: process {who} ({socket.gethostname()}) ended with an error: ")
    assert lines[1 - who].endswith(lines[who].removeprefix("error: "))


@pytest.mark.slow
def test_a_mistake_beside_hosts_in_a_file_ends_the_other(place, cache):
    """The options of hosts stand in a configuration file, whose other options cannot be used."""
    coordinator = f"localhost:{free_port()}"
    started = []
    for index in range(2):
        file = place / f"host_{index}.yaml"
        hosts = f"hosts: {{coordinator: '{coordinator}', count: 2, index: {index}}}\n"
        file.write_text(hosts + ("seed: x\n" if index else ""))
        command = [sys.executable, "-m", "llava_cot_jax.train", *arguments(place / "small", place / "in a file")]
        started.append(
            subprocess.Popen(
                [*command, "--config", str(file)], env=environment(cache), stderr=subprocess.PIPE, text=True
            )
        )
    errors = [process.communicate(timeout=60)[1].splitlines()[-1] for process in started]
    assert [process.returncode for process in started] == [2, 2]
    assert "seed is 'x'" in errors[1]
    assert errors[0] == f"error: process 1 ({socket.gethostname()}) ended with an {errors[1]}"


FEW_ROWS = """
from llava_cot_jax.data.shapes.rows import SIZES
SIZES["train"] = 64  # tokens are counted quickly
"""

DAMAGED = """
from llava_cot_jax.data.loader import _Batches
from llava_cot_jax.errors import UserError
encode, seen = _Batches._encode, []
def damaged(self, index, row):
    seen.append(index)
    if len(seen) > 8:  # a loader thread is ahead of the steps
        raise UserError("row 12 is damaged")
    return encode(self, index, row)
_Batches._encode = damaged
"""


@pytest.mark.slow
def test_a_record_that_one_host_cannot_read_ends_all(place, cache):
    """After the first step, while the other computes, and waits for it for ever."""
    started = start_on_hosts(place, "damaged", cache, TWO, disturb={0: FEW_ROWS, 1: FEW_ROWS + DAMAGED}, quick=True)
    assert started[1].wait(timeout=300) == 2
    began = time.monotonic()
    assert ended(started, 60) == [2, 2] and time.monotonic() - began < 10
    host = socket.gethostname()
    assert last_lines(place, "damaged") == [
        f"error: process 1 ({host}) ended with an error: row 12 is damaged",
        "error: row 12 is damaged",
    ]
    assert (place / "damaged/metrics.jsonl").read_text().count('"loss"') >= 1


KILLED = """
import os, signal, sys, time
import jax
from llava_cot_jax import cli
from llava_cot_jax.hosts.joining import join_hosts
from llava_cot_jax.hosts.lifeline import Lifeline
from llava_cot_jax.hosts.process_group import ProcessGroup
def leave(code):
    os.write(2, b"F1201 jax's service has come to write as well\\n\\n")
    os._exit(code)
group = ProcessGroup(sys.argv[1], 2, int(sys.argv[2]))
lifeline = Lifeline(group, leave)
with lifeline.shared_failures(cli.report):
    lifeline.meet()
    join_hosts(group)
    lifeline.catch_aborts()
    lifeline.agree(dict)
    if group.index == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(100)
"""


@pytest.mark.slow
def test_the_first_process_is_killed():
    """With it ends jax's service, which aborts the other process: by code 134, if nothing prevents it."""
    address = f"localhost:{free_port()}"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", KILLED, address, str(index)],
            env=os.environ | {"PYTHONPATH": WITHOUT_TORCH},
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    errors = [process.communicate(timeout=60)[1] for process in started]
    assert [process.returncode for process in started] == [-signal.SIGKILL, 1]
    assert errors[1].splitlines()[-1].startswith("error: process 0 (localhost) was lost: its connection closed")
    assert "stack trace" not in errors[1]


SOON = "from llava_cot_jax.hosts import lifeline; lifeline.FIRST_NOTICE_SECONDS, lifeline.MEETING_SECONDS = 1.0, 2.0"


@pytest.mark.slow
def test_a_shell_in_an_allocation_says_what_it_waits_for(place, cache):
    variables = {"JOB_ID": "4", "STEP_NODELIST": "localhost", "NTASKS": "2", "PROCID": "0", "LOCALID": "0"}
    script = COMMAND.format(disturb=SOON)
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments(place / "small", place / "alone")],
        env=environment(cache) | {f"SLURM_{name}": value for name, value in variables.items()},
        capture_output=True,
        text=True,
        timeout=60,
    )
    what = f"process 1 to come to localhost:{65536 - 4096 + 4} (1 of 2 there, by Slurm's variables)"
    remedy = "to run with this process alone, give --hosts.count 1"
    assert done.stderr.splitlines() == [
        f"warning: waiting for {what}; {remedy}",
        f"error: gave up after 2 s of waiting for {what}; {remedy}",
    ]
    assert done.returncode == 1  # launch/spot.sh starts it again
