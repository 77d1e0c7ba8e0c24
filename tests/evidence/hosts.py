"""Runs on several processes that differ, fail, vanish or are waited for, and starts behind proxies and launchers.

    python tests/evidence/hosts.py | tee tests/evidence/hosts.txt

All processes are real, and run the command that trains on the shapes world, with few rows. The script prints the exit
code of each process, the seconds from the first end to the last, and the last line that each has written to stderr. It
takes about six minutes on two cores.
"""

import argparse
import datetime
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.demo import random_weights
from tests.distributed.test_hosts import DAMAGED, FEW_ROWS
from tests.distributed.train_runs import COMMAND, Hosts, ended, errors_of, start_on_hosts
from tests.training.small_run import arguments, environment, small_config, write_small

TWO = Hosts(2, 1, {"mesh.fsdp": 2, "eval_examples": 0, "steps": 4})
THREE = Hosts(3, 1, {"mesh.data": 3, "loader.batch_size": 6, "eval_examples": 0, "steps": 4})

IN_A_STEP = """
import os, signal
from llava_cot_jax.training.stepper import Stepper
real, steps = Stepper.step, []
def step(self, state):
    steps.append(state)
    if len(steps) == 3:
        {act}
    return real(self, state)
Stepper.step = step
"""
RAISES = IN_A_STEP.format(act='raise ValueError("no other process raises this")')
IS_KILLED = IN_A_STEP.format(act="os.kill(os.getpid(), signal.SIGKILL)")
OTHER_VERSION = """
from importlib import metadata
real = metadata.version
metadata.version = lambda name: "0.9.9" if name == "optax" else real(name)
"""
OTHER_DEVICES = """
import os
os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace("count=1", "count=3")
"""
GIVES_UP_SOON = "from llava_cot_jax.hosts import lifeline; lifeline.MEETING_SECONDS = 20.0"

SLURM = {"JOB_ID": "77", "STEP_NODELIST": "localhost", "NTASKS": "2", "PROCID": "0", "LOCALID": "0"}
LEFTOVERS: dict[str, Mapping[str, str]] = {
    "a Slurm step of one task in an allocation of two": {f"SLURM_{k}": v for k, v in SLURM.items()}
    | {"SLURM_STEP_NUM_TASKS": "1"},
    "half of Slurm's variables": {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"},
    "damaged variables of Slurm": {f"SLURM_{k}": "x" for k in SLURM},
    "one of Open MPI's variables": {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"},
    "another of them": {"OMPI_COMM_WORLD_SIZE": "2"},
    "a pod's variables": {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    "an indexed pod's variables": {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"},
    "jax's own address": {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1"},
    "a proxy that refuses": dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9"),
    "a proxy that does not answer": dict.fromkeys(("http_proxy", "https_proxy"), "http://10.255.255.1:3128"),
}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    print(f"{datetime.date.today()}; jax {version('jax')}; CPU processes on one machine", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name in ("small", "other", "chatty", "cut"):
            write_small(place / name)
        weights = random_weights(small_config(), seed=1)
        save_file(weights, place / "other/model.safetensors", metadata={"format": "pt"})
        with (place / "chatty/tokenizer_config.json").open("a") as file:
            file.write("\n")
        os.truncate(place / "cut/model.safetensors", 10_000)

        print("\nProcesses that differ:")
        show(place, "learning rate", 1, ["--optimizer.learning_rate", "0.002"])
        show(place, "loader's seed", 0, ["--loader.seed", "5"])
        show(place, "weights of the same shapes", 1, ["--checkpoint", str(place / "other")])
        show(place, "a file of the tokenizer", 0, ["--checkpoint", str(place / "chatty")])
        show(place, "changes are accepted", 1, ["--accept_changes", "true"])
        show(place, "version of a package", 1, disturb=OTHER_VERSION)
        show(place, "number of devices", 1, disturb=OTHER_DEVICES)
        show(place, "number of rows", 0, disturb='SIZES["train"] = 63')

        print("\nOne process fails before the first step:")
        for who in (0, 1):
            show(place, "no data", who, ["--data", "/nowhere"])
        show(place, "an option that there is not", 1, ["--stepps", "3"])
        show(place, "weights that are cut off", 1, ["--checkpoint", str(place / "cut")])

        print("\nOne process fails after the first step:")
        for who in (0, 1):
            show(place, "a damaged record", who, disturb=DAMAGED)
            show(place, "an exception", who, disturb=RAISES)
            show(place, "SIGKILL", who, disturb=IS_KILLED)
        show(place, "an exception, of three", 2, disturb=RAISES, hosts=THREE)

        print("\nOne of two processes alone:")
        group = ["--hosts.count", "2", "--hosts.coordinator"]
        alone(place, "the first", GIVES_UP_SOON, [*group, "localhost:29871", "--hosts.index", "0"], {})
        alone(place, "the second", GIVES_UP_SOON, [*group, "localhost:29872", "--hosts.index", "1"], {})
        alone(place, "a name that there is not", GIVES_UP_SOON, [*group, "no.invalid:9", "--hosts.index", "1"], {})
        slurm = {f"SLURM_{name}": value for name, value in SLURM.items()}
        alone(place, "a shell with Slurm's variables", GIVES_UP_SOON, [], slurm)
        print("\nOne process, with leftovers of launchers in its environment, or behind a proxy:")
        alone(place, "Slurm's variables and --hosts.count 1", "", ["--hosts.count", "1"], slurm)
        for name, variables in LEFTOVERS.items():
            alone(place, name, "", [], variables)


def show(
    place: Path, name: str, who: int, arguments: Sequence[str] = (), *, disturb: str = "", hosts: Hosts = TWO
) -> None:
    """Run the processes, of which one has other arguments or is disturbed, and print how they end."""
    shutil.rmtree(place / name, ignore_errors=True)
    changes = dict.fromkeys(range(hosts.processes), FEW_ROWS)
    changes[who] += disturb
    started = start_on_hosts(place, name, place / "cache", hosts, each={who: arguments}, disturb=changes, quick=True)
    ends: dict[int, float] = {}
    while len(ends) < len(started):
        ends |= {i: time.monotonic() for i, x in enumerate(started) if i not in ends and x.poll() is not None}
        time.sleep(0.01)
    seconds = max(ends.values()) - min(ends.values())
    print(f"  {name}, in process {who}: exit codes {ended(started)}, {seconds:.1f} s from the first end to the last")
    for index, error in enumerate(errors_of(place, name, hosts)):
        print(f"    {index}: {error.splitlines()[-1] if error else '(nothing)'}".replace(str(place), "..."), flush=True)
        assert "stack trace" not in error


def alone(place: Path, name: str, disturb: str, more: Sequence[str], variables: Mapping[str, str]) -> None:
    """Run one process, and print its exit code, its seconds and what it has written to stderr."""
    began = time.monotonic()
    given = arguments(place / "small", place / "alone" / name.replace(" ", "_"), steps=1, eval_examples=0)
    done = subprocess.run(
        [sys.executable, "-c", COMMAND.format(disturb=FEW_ROWS + disturb), *given, *more],
        env={**environment(place / "cache"), **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    print(f"  {name}: exit code {done.returncode} after {time.monotonic() - began:.0f} s")
    print("".join(f"    {line}\n" for line in done.stderr.splitlines()), end="", flush=True)
    assert "Traceback" not in done.stderr


if __name__ == "__main__":
    main()
