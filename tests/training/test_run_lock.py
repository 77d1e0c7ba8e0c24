"""One run at a time: on a disk, against a real process; in a bucket see ``test_runs_in_buckets.py``."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llava_cot_jax.errors import UserError
from llava_cot_jax.training.run_lock import RunLock

HOLD = """
import sys
from pathlib import Path
from llava_cot_jax.training.run_lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    """A process that holds the folder."""
    started = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert started.stdout is not None and started.stdout.readline() == "held\n"
    return started


@pytest.mark.parametrize("end", ["close", "kill"])
def test_a_second_run_is_refused_until_the_first_ends(tmp_path, end):
    other = hold(tmp_path)
    with (
        pytest.raises(UserError, match=rf"{tmp_path}: a run is under way there \(process {other.pid} on"),
        RunLock(tmp_path),
    ):
        pytest.fail("it was let in")
    if end == "kill":
        other.send_signal(signal.SIGKILL)
    other.communicate()
    with RunLock(tmp_path):
        pass


def test_the_same_process_may_hold_it_again(tmp_path):
    for _ in range(2):
        with RunLock(tmp_path), pytest.raises(UserError, match="under way"), RunLock(tmp_path):
            pass
