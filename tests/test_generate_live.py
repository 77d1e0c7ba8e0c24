"""A search that is shown while it runs, by the real command: on a terminal, in a pipe, and ended by Ctrl-C."""

import os
import re
import subprocess
import sys

import pytest

from llava_cot_jax.answering_model import DEFAULT_MODEL_NOTE
from tests.terminal import Terminal, run_in_terminal
from tests.tiers import in_tiers

COMMAND = "-m llava_cot_jax.generate --search stage_beam --num_candidates 3 --judge verifier --temperature 1.0 --live"


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    return kept | {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> list[str]:
    return [*COMMAND.split(), "--draw", "2", "--draw_to", str(tmp_path_factory.mktemp("p"))]


@pytest.fixture(scope="module")
def piped(environment, command) -> tuple[list[str], list[str]]:
    """The lines that the command writes to standard output and to standard errors where these are no terminal."""
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, check=True)
    assert b"\x1b" not in done.stdout + done.stderr
    return done.stdout.decode().splitlines(), done.stderr.decode().splitlines()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_pipe_takes_two_lines_for_each_stage(piped):
    out, errors = piped
    lines = [line for line in errors if "stage" in line]
    assert len(out) == 6 and len(lines) == 16
    for i, line in enumerate(lines):
        name = ("Summary", "Caption", "Reasoning", "Conclusion")[i // 2 % 4]
        title = f"{name}, stage {i // 2 % 4 + 1} of 4: "
        if i % 2 == 0:
            assert line == f"{title}writing 3 candidates"
        else:
            assert re.match(rf"{title}3 candidates, [123] has the highest score \(scores .*\): ", line)
            assert line.endswith(f"</{name.upper()}>")


@pytest.mark.parametrize("size", in_tiers([(80, 24), (200, 7)], suite=[(80, 24)]), ids=str)
def test_a_terminal_is_left_with_the_answers_alone(environment, command, piped, size):
    """While it runs, the stages are there, no line is too long, and nothing but the view is written over."""
    columns, rows = size
    terminal = Terminal(columns, rows)
    assert run_in_terminal(command, terminal, environment) == 0
    assert terminal.shows_cursor and not terminal.wrapped
    note, _, answers = terminal.text.partition(piped[0][0][:columns])
    assert " ".join(note.split()) == DEFAULT_MODEL_NOTE
    wrapped = [line[i : i + columns] for line in piped[0] for i in range(0, len(line), columns)]
    assert (piped[0][0][:columns] + answers).splitlines() == wrapped
    lines = {line[2:] for line in terminal.erased}
    for number, name in enumerate(("Summary", "Caption", "Reasoning", "Conclusion"), 1):
        title = f"{name}, stage {number} of 4: "
        assert any(re.match(rf"{title}3 candidates, [123] has the highest score", line) for line in lines), title
    assert "To come: Caption, Reasoning, Conclusion" in terminal.erased
    assert max(map(len, terminal.erased)) <= columns


@pytest.mark.slow
def test_ctrl_c_removes_the_view_and_shows_the_cursor(environment, command):
    terminal = Terminal(80, 24)
    is_in_the_middle = lambda terminal: "Caption, stage 2 of 4" in terminal.text + str(terminal.erased)  # noqa: E731
    assert run_in_terminal(command, terminal, environment, is_in_the_middle) == 130
    assert terminal.shows_cursor
    assert terminal.text.splitlines()[-1] == "interrupted" and "stage" not in terminal.text
