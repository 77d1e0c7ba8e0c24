"""What a training run survives: real signals, sent to real processes. Many more kills: ``evidence/survival.py``."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llava_cot_jax.training.checkpoints import steps_in
from tests.training.small_run import arguments, command, environment, losses, metrics, write_small

EVERY = {"checkpoints.every": 2, "log_every": 1, "eval_examples": 0}
STEPS = 8


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the small checkpoint, and the runs."""
    folder = tmp_path_factory.mktemp("survival")
    write_small(folder / "small")
    return folder


@pytest.fixture(scope="module")
def undisturbed(place: Path, cache: Path) -> list[float]:
    """The losses of a run that nothing happens to."""
    return losses_of(place, cache, "undisturbed")


def losses_of(place: Path, cache: Path, name: str) -> list[float]:
    """The losses of a run, once it has ended well."""
    done = command("train", *arguments(place / "small", place / name, steps=STEPS, **EVERY), cache=cache)
    assert done.returncode == 0, done.stderr
    return losses(place / name)


PATCHED = """
import os, signal, sys, time
import jax
from llava_cot_jax import cli, train
from llava_cot_jax.training import checkpoints, stepper

def terminate(*_, **__):
    os.kill(os.getpid(), signal.SIGTERM)

def before(module, name, act, when=lambda count: True):
    real, calls = getattr(module, name), []
    def patched(*given, **named):
        calls.append(given)
        if when(len(calls)):
            act()
        return real(*given, **named)
    setattr(module, name, patched)

{disturb}
sys.argv[1:] = {arguments}
cli.run(train.main)
"""


def disturbed(
    place: Path, cache: Path, name: str, disturb: str, **settings: object
) -> subprocess.CompletedProcess[str]:
    """A run in a process whose code is changed: something happens to it at an exact moment."""
    given = arguments(place / "small", place / name, **{"steps": STEPS, **EVERY, **settings})
    return subprocess.run(
        [sys.executable, "-c", PATCHED.format(disturb=disturb, arguments=given)],
        env=environment(cache),
        capture_output=True,
        text=True,
        timeout=600,
    )


SLOWLY = 'before(stepper.Stepper, "step", lambda: time.sleep(0.5))'
"""Or the run is over before it has heard a signal."""

DURING_COMPILATION = """
def compiling(event, seconds, fun_name="", **_):
    if event == "/jax/core/compile/jaxpr_to_mlir_module_duration" and "step" in fun_name:
        terminate()
jax.monitoring.register_event_duration_secs_listener(compiling)
"""
# The first save is that of a trial.
DURING_A_SAVE = 'before(checkpoints, "write_checksums", terminate, lambda count: count == 3)'
TWICE = DURING_COMPILATION + DURING_A_SAVE.replace("== 3", "== 2")
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.slow
def test_a_sigterm_ends_a_run_cleanly(place, cache, undisturbed):
    """One during the first compilation, and another one during the save that it leads to."""
    end_by_sigterm(place, cache, "twice", TWICE, undisturbed)


def end_by_sigterm(place: Path, cache: Path, name: str, disturb: str, undisturbed: list[float]) -> int:
    """The step that a run was stopped after, which then goes on to the end of the undisturbed one."""
    done = disturbed(place, cache, name, f"{SLOWLY}\n{disturb}")
    assert done.returncode == 0, done.stderr
    step = steps_in(place / name / "checkpoints")[-1]
    assert f"stopped by a SIGTERM after step {step}: the same command resumes from there" in done.stdout
    assert 0 < step < STEPS and losses(place / name) == undisturbed[:step]
    assert losses_of(place, cache, name) == undisturbed
    return step


@pytest.mark.slow
def test_ctrl_c_saves_and_a_second_ends_at_once(place, cache, undisturbed):
    """The first during the compilation, in which the main thread hears nothing; then both, also during it."""
    pressed = DURING_COMPILATION.replace("terminate()", "os.kill(os.getpid(), signal.SIGINT)")
    done = disturbed(place, cache, "pressed", f"{SLOWLY}\n{pressed}")
    assert done.returncode == 130 and "Traceback" not in done.stderr
    (step,) = steps_in(place / "pressed/checkpoints")
    assert "A second Ctrl-C ends it at once." in done.stderr
    assert f"stopped by Ctrl-C after step {step}: the same command resumes from there" in done.stdout
    assert losses_of(place, cache, "pressed") == undisturbed

    twice = pressed.replace("SIGINT)", "SIGINT); time.sleep(1); os.kill(os.getpid(), signal.SIGINT); time.sleep(60)")
    done = disturbed(place, cache, "pressed twice", twice)
    assert done.returncode == 130 and done.stderr.endswith("interrupted\n") and "Traceback" not in done.stderr
    assert steps_in(place / "pressed twice/checkpoints") == []


BECOMES_A_FILE = """
import shutil
from llava_cot_jax.training.checkpoints import Checkpoints
real = Checkpoints.save
def save(self, state, run, loss=None):
    if self._folder.name == "checkpoints":
        shutil.rmtree(self._folder)
        self._folder.write_text("")
    real(self, state, run, loss)
Checkpoints.save = save

import runpy
real_run = cli.run
def run_as_users_do(_):
    cli.run = real_run
    runpy.run_path(train.__file__, run_name="__main__")
cli.run = run_as_users_do
"""


@pytest.mark.slow
def test_a_save_that_cannot_begin_ends_the_process(place, cache):
    """Orbax's threads wait for hours for the folder of a checkpoint, and Python for them."""
    done = disturbed(place, cache, "became a file", BECOMES_A_FILE)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: a checkpoint cannot be written to ") and "Not a directory" in done.stderr


IN_A_SAVE = f'before(checkpoints, "write_checksums", lambda: {KILLED}, lambda count: count == 3)'


@pytest.mark.slow
def test_a_sigkill_in_a_save_loses_nothing_that_was_saved(place, cache, undisturbed):
    """The checkpoint before it is there, and what was begun is cleaned up."""
    done = disturbed(place, cache, "killed", IN_A_SAVE)
    assert done.returncode == -signal.SIGKILL
    assert steps_in(place / "killed/checkpoints") == [2]
    assert losses_of(place, cache, "killed") == undisturbed
    assert not list((place / "killed/checkpoints").glob("*tmp*"))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_damaged_checkpoint_is_told_and_the_one_before_taken(place, cache, undisturbed):
    shutil.copytree(place / "undisturbed", place / "damaged")
    newest = place / "damaged/checkpoints" / str(STEPS)
    path = max((newest / "progress").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[5000:5064] = bytes(byte ^ 0x55 for byte in content[5000:5064])
    path.write_bytes(content)
    done = command("train", *arguments(place / "small", place / "damaged", steps=STEPS, **EVERY), cache=cache)
    assert done.returncode == 0, done.stderr
    assert f"the checkpoint of step {STEPS} is damaged: progress/" in done.stdout.replace("\n", " ")
    assert f"resuming from step {STEPS - 2}" in done.stdout
    assert losses(place / "damaged") == undisturbed


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_changed_configuration_is_refused_unless_told(place, cache, undisturbed):
    shutil.copytree(place / "undisturbed", place / "changed")
    kept = (place / "changed/config.yaml").read_text()
    given = arguments(place / "small", place / "changed", steps=STEPS + 1, optimizer__b2=0.9, log_every=2)
    done = command("train", *given, cache=cache)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "optimizer.b2 was 0.98, now 0.9; steps was 8, now 9" in done.stderr
    assert (place / "changed/config.yaml").read_text() == kept
    done = command("train", *given, "--accept_changes", "true", cache=cache)
    assert done.returncode == 0, done.stderr
    assert "resuming with changes: optimizer.b2 was 0.98" in done.stdout.replace("\n", " ")
    assert f"resuming from step {STEPS}" in done.stdout and len(losses(place / "changed")) == STEPS + 1


NOT_FINITE = """
import numpy as np
real = stepper.Stepper.step
def planted(self, state):
    loader = self._batches
    def spoil():
        for index, batch in loader:
            if index in {steps}:
                pixels = batch["pixel_values"].astype("float32")
                batch = dict(batch, pixel_values=pixels.at[0].set(float("nan")))
            yield index, batch
    if not hasattr(self, "_spoilt"):
        self._spoilt, self._batches = True, spoil()
    return real(self, state)
stepper.Stepper.step = planted
"""


@pytest.mark.slow
def test_batches_that_are_not_finite_are_skipped_until_there_are_several_in_a_row(place, cache, undisturbed):
    """The fourth alone, as if it had not been; from the sixth on, they end the run and their rows are told."""
    spoilt = {3, *range(5, 20)}
    done = disturbed(place, cache, "spoilt", NOT_FINITE.format(steps=spoilt), max_nonfinite_steps=3)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "3 steps in a row had a loss or gradient that is not finite" in done.stderr
    lines = [line for line in metrics(place / "spoilt") if "learning_rate" in line]
    assert [line["skipped"] for line in lines] == [0, 0, 0, 1, 1, 2, 3, 4]
    assert losses(place / "spoilt")[:3] == undisturbed[:3] and len(losses(place / "spoilt")) == 4
    assert lines[4]["learning_rate"] == lines[3]["learning_rate"]  # that of the step that was not made
    told = [json.loads(line) for line in (place / "spoilt/skipped.jsonl").read_text().splitlines()]
    assert [line["step"] for line in told] == [4, 6, 7, 8] and {len(line["rows"]) for line in told} == {8}
    assert all(f"rows {', '.join(line['rows'])}" in done.stderr for line in told[1:])
