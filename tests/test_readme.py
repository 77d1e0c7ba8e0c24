"""What the README tells a reader to type works."""

import importlib
import re
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest

from llava_cot_jax import cli
from llava_cot_jax.data.shapes.drawn import draw_questions

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
LINES = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]
COMMANDS = [part.strip() for line in LINES for part in line.split("&&")]
WORDS = [shlex.split(command) for command in COMMANDS if "llava_cot_jax." in command]
OURS = [words[words.index("-m") - 1 :] for words in WORDS]  # a launch script may stand before them


def test_the_commands_of_the_package_are_all_there():
    modules = {command[2].removeprefix("llava_cot_jax.") for command in OURS}
    assert modules == {p.stem for p in (ROOT / "llava_cot_jax").glob("*.py") if "cli.run(main" in p.read_text()}


@pytest.mark.parametrize("command", OURS, ids=" ".join)
def test_a_command_parses(command, monkeypatch):
    """The real parser takes the arguments; what it would do is left out."""
    monkeypatch.chdir(ROOT)
    parsed = []

    class Parsed(Exception):
        pass

    parse = cli.Parser.parse_args

    def stop(self, arguments):
        parsed.append(parse(self, arguments))
        raise Parsed

    monkeypatch.setattr(cli.Parser, "parse_args", stop)
    with pytest.raises(Parsed):
        importlib.import_module(command[2]).main(command[3:])
    assert parsed


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith(("bash ", "python tests/"))])
def test_a_script_is_there(command):
    script = ROOT / command.split()[1]
    assert script.is_file()
    if script.suffix == ".sh":
        subprocess.run(["bash", "-n", script], check=True)


def test_the_library_in_ten_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw_questions(Path("runs/pictures"), 4, seed=0)  # as the README has done by then
    code = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line]) <= 10
    Path("snippet.py").write_text(code)
    runpy.run_path("snippet.py")
    conclusion, log_prob = capsys.readouterr().out.split()
    assert conclusion == "two" and float(log_prob) <= 0
    assert (tmp_path / "runs/copy/model.safetensors").exists()


def test_the_figures_name_scripts_that_are_there():
    for script in re.findall(r"python (tests/evidence/\w+\.py)", TEXT):
        assert (ROOT / script).is_file()
        assert (ROOT / script).with_suffix(".txt").is_file()
