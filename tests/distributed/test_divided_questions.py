"""``generate --questions`` on real processes that each have the model: the same file, whoever is killed on the way."""

import json
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from llava_cot_jax.data.shapes.rows import ShapesRows
from tests.processes import free_port
from tests.training.small_run import write_small

pytestmark = pytest.mark.slow

COUNT = 14
"""Number of questions."""

COMMAND = """
import os, signal
from llava_cot_jax import cli, generate
from llava_cot_jax.hosts.question_server import RemoteQuestions
from llava_cot_jax.question_files import AnswerFile
from tests.processes import free_port
{disturb}
cli.run(generate.main, leave=os._exit, command="generate")
"""

KILLED_WITH_QUESTIONS = """
finish, finished = RemoteQuestions.finish, []
def finish_once(self, question, row):
    if finished:
        os.kill(os.getpid(), signal.SIGKILL)
    finished.append(question)
    finish(self, question, row)
RemoteQuestions.finish = finish_once
"""
"""A process that is killed when it hands in its second answer."""

KILLED_WITH_THE_FILE = """
append, stored = AnswerFile.append, []
def append_some(self, row):
    if len(stored) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    stored.append(row)
    append(self, row)
AnswerFile.append = append_some
"""
"""A first process that is killed when it is about to store the sixth answer."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a checkpoint, and with a file of questions, of which one has no picture."""
    folder = tmp_path_factory.mktemp("divided")
    write_small(folder / "small")
    rows = []
    for i in range(COUNT):
        row = ShapesRows("test")[i]
        if i != 3:
            row.images[0].save(folder / f"{i}.png")
        question = row.turns[0].question.replace("<image>", "").strip()
        rows.append({"id": f"q{i}", "question": question, "image": f"{i}.png", "seed": i % 3})
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Run:
    """Processes that divide the questions into one file."""

    def __init__(self, place: Path, name: str, count: int) -> None:
        address = f"localhost:{free_port()}"
        self.place, self.name, self.output = place, name, place / f"{name}.jsonl"
        self.arguments = [f"--questions={place / 'questions.jsonl'}", f"--output={self.output}", "--slots=2"]
        self.arguments += [f"--checkpoint={place / 'small'}", "--search=sample", "--max_new_tokens=30"]
        self.arguments += [f"--hosts.coordinator={address}", f"--hosts.count={count}"]

    def start(self, index: int, disturb: str = "", *more: str) -> subprocess.Popen:
        script = COMMAND.format(disturb=disturb)
        log = (self.place / f"{self.name}.{index}.err").open("a")
        arguments = [sys.executable, "-c", script, *self.arguments, f"--hosts.index={index}", *more]
        printed = (self.place / f"{self.name}.{index}.out").open("a")
        return subprocess.Popen(arguments, stdout=printed, stderr=log)

    def share_model(self) -> list[int]:
        """Let two processes have one model over their devices, and return their exit codes."""
        return ends(*(self.start(index, "", "--hosts.divide=model", "--mesh.tensor=2") for index in range(2)))

    def printed(self, index: int) -> str:
        """Return what a process has printed, without the lines of the library that connects CPUs."""
        lines = (self.place / f"{self.name}.{index}.out").read_text().splitlines(True)
        return "".join(line for line in lines if not line.startswith("[Gloo]"))

    def errors(self, index: int) -> str:
        return (self.place / f"{self.name}.{index}.err").read_text()


def ends(*processes: subprocess.Popen) -> list[int]:
    try:
        return [process.wait(900) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def alone(place) -> bytes:
    """The file that one process writes."""
    run = Run(place, "alone", 1)
    assert ends(run.start(0)) == [0], run.errors(0)
    rows = [json.loads(line) for line in run.output.read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"q{i}" for i in range(COUNT)]  # in the order of the questions
    assert [row["id"] for row in rows if "error" in row] == ["q3"]
    assert len({row.get("text") for row in rows}) > 5
    return run.output.read_bytes()


def test_one_of_three_is_killed_and_the_run_goes_on(place, alone):
    run = Run(place, "three", 3)
    processes = [run.start(index, KILLED_WITH_QUESTIONS if index == 1 else "") for index in range(3)]
    assert ends(*processes) == [0, -signal.SIGKILL, 0], run.errors(0)
    assert run.output.read_bytes() == alone
    name = socket.gethostname()
    assert f"warning: process 1 ({name}) was lost: the others answer the " in run.errors(0)
    assert not run.errors(2)


@pytest.mark.exhaustive
def test_the_first_is_killed_and_started_again(place, alone):
    """The other keeps its model and its questions, and waits."""
    run = Run(place, "two", 2)
    processes = [run.start(0, KILLED_WITH_THE_FILE), run.start(1)]
    assert processes[0].wait(900) == -signal.SIGKILL
    assert run.output.read_bytes().count(b"\n") == 5 and processes[1].poll() is None
    again = run.start(0)
    assert ends(processes[1], again) == [0, 0], run.errors(1)
    assert run.output.read_bytes() == alone


def test_a_process_with_another_seed_or_other_images_is_refused(place):
    run = Run(place, "other", 2)
    first, second = run.start(0), run.start(1, "", "--seed=1")
    assert second.wait(900) == 2
    assert "error: the processes of the run differ: seed is 0 in process 0" in run.errors(1)
    first.send_signal(signal.SIGINT)
    assert ends(first) == [130]


def test_one_model_over_two_processes(place, alone):
    """The first four questions, of which the first process has answered one before."""
    run = Run(place, "shared", 2)
    run.arguments[0] = f"--questions={place / 'four.jsonl'}"
    lines = (place / "questions.jsonl").read_text().splitlines(True)
    (place / "four.jsonl").write_text("".join(lines[:4]))
    shutil.copy(place / "alone.jsonl.settings.json", f"{run.output}.settings.json")
    run.output.write_bytes(alone.splitlines(True)[1])
    assert run.share_model() == [0, 0], run.errors(0)
    assert run.output.read_bytes() == b"".join(alone.splitlines(True)[:4])
    assert "warning: 1 of 3 questions have no answer" in run.errors(0)


@pytest.mark.exhaustive
def test_one_question_to_one_model_over_two_processes(place, alone):
    """The first process prints the answer, and the other nothing."""
    run, row = Run(place, "single", 2), json.loads(alone.splitlines()[0])
    asked = ["--image", str(place / "0.png"), "--question", row["question"], "--json", "true"]
    run.arguments = [*run.arguments[3:], *asked]
    assert run.share_model() == [0, 0], run.errors(0)
    assert run.printed(1) == "" and json.loads(run.printed(0))["text"] == row["text"]
