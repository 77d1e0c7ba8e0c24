"""Ctrl-C: one line and code 130 at every moment of a command, and nothing of it in other programs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava_cot_jax import cli
from llava_cot_jax.training import stopping
from llava_cot_jax.training.stopping import stop_on_interrupt
from tests.processes import ROOT
from tests.training.small_run import arguments

PRESSED = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(20)
except KeyboardInterrupt as pressed:  # as a compiled module does
    raise ImportError("initialization failed") from pressed
"""
SCRIPT = "from llava_cot_jax.__main__ import main\nmain()\n"


def run(folder: Path, module: str, *command: str) -> tuple[int, str, str]:
    """A command in whose import of a module Ctrl-C is pressed."""
    (folder / module).mkdir(exist_ok=True)
    (folder / module / "__init__.py").write_text(PRESSED)
    script = folder / "llava-cot"
    script.write_text(SCRIPT)
    start = [str(script)] if command[0] == "llava-cot" else ["-m", command[0]]
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    ended = subprocess.run(
        [sys.executable, *start, *command[1:]], env=environment, capture_output=True, text=True, timeout=60
    )
    return ended.returncode, ended.stdout, ended.stderr


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_in_the_first_imports_of_a_command(tmp_path, name):
    for command in ([f"llava_cot_jax.{name}"], ["llava_cot_jax", name], ["llava-cot", name]):
        assert run(tmp_path, "jsonargparse", *command) == (130, "", "interrupted\n"), command


@pytest.mark.slow
@pytest.mark.parametrize("module", ["jax", "transformers"])
def test_in_the_later_imports_of_a_command(tmp_path, module):
    command = ["llava_cot_jax.train", *arguments("shapes", tmp_path / "out")]
    assert run(tmp_path, module, *command) == (130, "", "interrupted\n")


def test_other_programs_keep_their_own_handling():
    code = "import signal, llava_cot_jax; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    for program in (["-c", code], ["-c", code, "-m", "llava_cot_jax.train"]):
        subprocess.run([sys.executable, *program], check=True)
    for before in (signal.default_int_handler, signal.SIG_IGN):
        kept = signal.signal(signal.SIGINT, before)
        cli.run(lambda: None)
        with stop_on_interrupt():
            pass
        assert signal.signal(signal.SIGINT, kept) is before


IGNORED = """
import signal, time
from llava_cot_jax import cli

class Dying:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

def main():
    try:
        Dying()
        time.sleep(20)
    finally:
        print("cleaned up")

cli.run(main)
"""


def test_where_python_ignores_exceptions(tmp_path):
    """As in a destructor that is called while jax traces a program."""
    (tmp_path / "llava-cot").write_text(IGNORED)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "llava-cot")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=15)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "cleaned up\n", "interrupted\n")


def test_a_command_may_clean_up(capsys):
    cleaned = []

    def work() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            cleaned.append(True)

    with pytest.raises(SystemExit) as end:
        cli.run(work)
    assert (end.value.code, capsys.readouterr().err, cleaned) == (130, "interrupted\n", [True])


def test_a_run_hears_the_first_as_a_sigterm_and_ends_at_the_second(monkeypatch, caplog):
    """A thread hears it, whatever the main thread does."""
    sent: list[object] = []
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    monkeypatch.setattr(os, "kill", lambda process, number: sent.append((process, number)))
    monkeypatch.setattr(stopping, "end_at_once", lambda: sent.append("end"))
    before = signal.getsignal(signal.SIGINT)
    with stop_on_interrupt() as interruption:
        assert not interruption.heard
        for count in (1, 2):
            signal.raise_signal(signal.SIGINT)
            deadline = time.monotonic() + 10
            while len(sent) < count and time.monotonic() < deadline:
                time.sleep(0.001)
    assert interruption.heard and sent[:2] == [(os.getpid(), signal.SIGTERM), "end"]
    assert "Ctrl-C: the run stops after the step under way and saves a checkpoint. A second" in caplog.text
    assert signal.getsignal(signal.SIGINT) is before and signal.set_wakeup_fd(-1) == -1


def test_where_no_sigterm_is_heard_it_is_raised(monkeypatch):
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: False)
    with pytest.raises(KeyboardInterrupt), stop_on_interrupt():
        signal.raise_signal(signal.SIGINT)
