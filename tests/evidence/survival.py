"""Interrupt training runs at random moments, and check that they continue as the undisturbed run does.

    python tests/evidence/survival.py | tee tests/evidence/survival.txt

Signals go to real processes. The losses of a continued run are compared bit for bit with those of an undisturbed run on
as many processes. A run that continues on two processes instead of four is compared by its relative losses and by the
examples of every batch. The script takes about ten minutes on two cores.
"""

import argparse
import datetime
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from llava_cot_jax.training.checkpoints import steps_in
from tests.distributed.train_runs import FOUR, TWO, Hosts, ended, log_of, run_on_hosts, start_on_hosts
from tests.test_survival import DURING_A_SAVE, DURING_COMPILATION, EVERY, TWICE, end_by_sigterm, losses_of
from tests.training.small_run import arguments, environment, losses, metrics, write_small

STEPS = 40
ONE = Hosts(1, 1, {})


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"{datetime.date.today()}; jax {version('jax')}, orbax {version('orbax-checkpoint')}; CPU processes")
    with tempfile.TemporaryDirectory() as folder:
        place, cache = Path(folder), Path(folder) / "cache"
        write_small(place / "small")
        for hosts in (ONE, TWO):
            kills(place, cache, hosts)
        one_of_two(place, cache)
        four_to_two(place, cache)
        undisturbed = losses_of(place, cache, "undisturbed")
        for name, disturb in (
            ("the first compilation", DURING_COMPILATION),
            ("a save", DURING_A_SAVE),
            ("both", TWICE),
        ):
            step = end_by_sigterm(place, cache, name, disturb, undisturbed)
            print(f"SIGTERM during {name}: exit code 0 after step {step}; gone on, all losses are those undisturbed")
        full_disk(place, cache, undisturbed)


def kills(place: Path, cache: Path, hosts: Hosts) -> None:
    """Kill a run five times, at random steps."""
    name, draw = f"{hosts.processes} killed", random.Random(hosts.processes)
    run_on_hosts(place, f"{hosts.processes} whole", cache, hosts, steps=STEPS, **EVERY)
    moments = sorted(draw.sample(range(2, STEPS - 2), 5))
    for moment in moments:
        started = start_on_hosts(place, name, cache, hosts, steps=STEPS, **EVERY)
        wait_for(place, name, moment, started)
        for process in started:
            process.send_signal(signal.SIGKILL)
        assert ended(started) == [-signal.SIGKILL] * hosts.processes
        print(f"  killed after step {last(place / name)}; whole checkpoints: {steps_in(place / name / 'checkpoints')}")
    run_on_hosts(place, name, cache, hosts, steps=STEPS, **EVERY)
    same = losses(place / name) == losses(place / f"{hosts.processes} whole")
    print(f"{hosts.processes} processes, SIGKILL five times: {STEPS} losses bit for bit those undisturbed: {same}")
    assert same


def one_of_two(place: Path, cache: Path) -> None:
    """Send a SIGTERM to the second of two processes."""
    started = start_on_hosts(place, "stopped", cache, TWO, steps=STEPS, **EVERY)
    wait_for(place, "stopped", 3, started)
    started[1].send_signal(signal.SIGTERM)
    codes = ended(started)
    step = steps_in(place / "stopped/checkpoints")[-1]
    told = f"stopped by a SIGTERM after step {step}" in log_of(place, "stopped", 0).read_text()
    run_on_hosts(place, "stopped", cache, TWO, steps=STEPS, **EVERY)
    same = losses(place / "stopped") == losses(place / "2 whole")
    print(f"SIGTERM to one of two: exit codes {codes}, both saved step {step}, told: {told}; gone on, same: {same}")
    assert codes == [0, 0] and told and same


def four_to_two(place: Path, cache: Path) -> None:
    """Kill a run on four processes, and continue it on two, with the same batches and losses up to rounding."""
    run_on_hosts(place, "4 whole", cache, FOUR, steps=STEPS, **EVERY)
    started = start_on_hosts(place, "4 to 2", cache, FOUR, steps=STEPS, **EVERY)
    wait_for(place, "4 to 2", STEPS // 2, started)
    for process in started:
        process.send_signal(signal.SIGKILL)
    ended(started)
    at = steps_in(place / "4 to 2/checkpoints")[-1]
    run_on_hosts(place, "4 to 2", cache, TWO, steps=STEPS, **EVERY)
    found, expected = (np.array(losses(place / name)) for name in ("4 to 2", "4 whole"))
    off = float(np.abs(found / expected - 1).max())
    tokens = [[line["trained_tokens"] for line in metrics(place / n) if "loss" in line] for n in ("4 to 2", "4 whole")]
    print(
        f"four processes to two at step {at}: losses within {off:.1e}; trained tokens of every batch the same: ", end=""
    )
    print(tokens[0] == tokens[1])
    assert off < 1e-6 and tokens[0] == tokens[1]


FILLING = """
import shutil, sys
usage = shutil.disk_usage
shutil.disk_usage = lambda path: usage(path)._replace(free=10**12)  # the command does not see that it is too small
from llava_cot_jax import cli, train
sys.argv[1:] = {arguments}
cli.run(train.main)
"""


def full_disk(place: Path, cache: Path, undisturbed: list[float]) -> None:
    """Run on a disk with room for one and a half checkpoints, enlarge the disk, and start the run again."""
    disk = place / "disk"
    disk.mkdir()
    script = FILLING.format(arguments=arguments(place / "small", disk / "run", steps=12, **EVERY))
    steps = (
        f'mount -t tmpfs -o size=12m tmpfs {disk}; "$0" -c "$1"; echo code $?; ls {disk}/run/checkpoints; '
        f'mount -o remount,size=200m {disk}; "$0" -c "$1"; echo code $?; cp {disk}/run/metrics.jsonl {disk}.jsonl'
    )
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", steps, sys.executable, script],
        env=environment(cache),
        capture_output=True,
        text=True,
    )
    codes = [line for line in done.stdout.splitlines() if line.startswith("code")]
    error = next(line for line in done.stderr.splitlines() if line.startswith("error"))
    went_on = next(line for line in done.stdout.splitlines() if line.startswith("resuming"))
    lines = [json.loads(line) for line in Path(f"{disk}.jsonl").read_text().splitlines()]
    same = [line["loss"] for line in lines if "loss" in line] == undisturbed
    print(
        f"a disk that fills up in a save: {codes[0]}, {error.split(':')[1].strip()[:60]}...; made larger: {codes[1]},"
    )
    print(f"  {went_on.split(',')[0]}; all losses are those undisturbed: {same}")
    assert codes == ["code 2", "code 0"] and same


def wait_for(place: Path, name: str, step: int, started: list[subprocess.Popen[bytes]]) -> None:
    """Wait until a run has logged ``step``."""
    while all(process.poll() is None for process in started):
        if last(place / name) >= step:
            return
        time.sleep(0.01)
    ended(started)
    logs = [log_of(place, name, index).with_suffix(".err").read_text()[-2000:] for index in range(len(started))]
    raise AssertionError("\n".join([f"it ended too soon, after step {last(place / name)}", *logs]))


def last(output: Path) -> int:
    """Return the last step that is logged."""
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


if __name__ == "__main__":
    main()
