"""The command line that all commands share: their names, the spelling of options, booleans, and usage lines."""

import importlib
import io
import os
import re
import subprocess
import sys
import tomllib
from functools import partial
from importlib.metadata import version
from itertools import count
from typing import Any

import pytest
import yaml
from rich.console import Console
from rich.progress import Progress, TaskID

import llava_cot_jax
from llava_cot_jax import cli
from llava_cot_jax.errors import UserError
from tests.parsers import STARTS, options_of, parser_of, required_arguments
from tests.processes import ROOT

every_parser = pytest.mark.parametrize("start", STARTS)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)


def outcome(parser: cli.Parser, *arguments: str) -> Any:
    """What the parser makes of the arguments: the options, or the message of the error."""
    try:
        return parser.parse_args([*required_arguments(parser), *arguments])
    except UserError as error:
        return str(error)


def named_options(start: str) -> list[Any]:
    """The options of a parser, but for those that every parser has."""
    general = {"--help", "--version", "--config", "--print_config"}
    return [a for a in options_of(parser_of(start)) if a.option_strings and not general & {*a.option_strings}]


def booleans(start: str) -> list[str]:
    return [a.option_strings[0] for a in named_options(start) if getattr(a, "_typehint", None) is bool]


@every_parser
def test_an_option_is_declared_with_underscores(start):
    names = [name for action in named_options(start) for name in action.option_strings]
    assert names and [name for name in names if "-" in name.removeprefix("--")] == []


@pytest.mark.slow
@every_parser
def test_an_option_may_be_typed_with_hyphens(start):
    parser = parser_of(start)
    for name in (name for action in named_options(start) for name in action.option_strings):
        typed = "--" + name.removeprefix("--").replace("_", "-")
        for values in (["3"], ["a-b"], ["=3"]):
            spelled = [[n + values[0]] if values[0].startswith("=") else [n, *values] for n in (name, typed)]
            expected, got = (outcome(parser, *arguments) for arguments in spelled)
            assert got == expected and f"nrecognized arguments: {typed}" not in str(got)


def test_hyphens_of_values_and_of_unknown_options_stay():
    parser = parser_of("generate")
    options = outcome(parser, "--draw-to", "a-b", "--judge-prompts=c-d=e-f", "--question", "one-two", "-3")
    assert (options.draw_to, options.judge_prompts, options.question) == ("a-b", "c-d=e-f", ["one-two", "-3"])
    assert "--no-such-option" in outcome(parser, "--no-such-option", "3")


@every_parser
def test_a_boolean_stands_alone_or_takes_true_or_false(start):
    parser = parser_of(start)
    for name in booleans(start):
        dest = name.removeprefix("--")
        typed = "--" + dest.replace("_", "-")
        for arguments in ([name], [name, "true"], [typed], [f"{name}=true"], [name, "--config", "{}"]):
            assert outcome(parser, *arguments)[dest] is True
        for arguments in ([name, "false"], [typed, "false"], [f"{name}=false"]):
            assert outcome(parser, *arguments)[dest] is False
        assert "yesterday" in outcome(parser, f"{name}=yesterday")


@every_parser
def test_no_boolean_is_declared_in_another_way(start):
    """Only --help and --version take no value."""
    assert {action.dest for action in options_of(parser_of(start)) if action.nargs == 0} == {"help", "version"}


def test_there_are_booleans_of_both_kinds():
    assert "--json" in booleans("generate") and "--random_init" in booleans("train")


def test_a_boolean_before_a_positional_does_not_take_it():
    parser = cli.Parser("convert")
    parser.add_argument("source", type=str)
    parser.add_argument("--flag", type=bool, default=False)
    options = parser.parse_args(["--flag", "folder"])
    assert (options.flag, options.source) == (True, "folder")


@pytest.mark.parametrize("start", ["generate", "prepare", "bench", "plan", "plan --search", "train"])
def test_the_model_to_start_from_is_the_checkpoint(start):
    assert "--checkpoint" in [action.option_strings[0] for action in named_options(start)]


SEARCHES = [
    path for path in sorted((ROOT / "configs").glob("*.yaml")) if "search" in (yaml.safe_load(path.read_text()) or {})
]


@pytest.mark.parametrize("path", SEARCHES, ids=lambda path: path.name)
def test_plan_takes_a_configuration_of_generate(path):
    """What it says of pictures and of output is checked and has no effect."""
    parser = parser_of("plan --search")
    options = outcome(parser, "--topology=v5e-8", "--config", str(path))
    assert options.search == yaml.safe_load(path.read_text())["search"]
    assert "draw" in outcome(parser, "--topology=v5e-8", "--draw", "many")
    assert "draw_to" not in parser.format_help()


def test_without_a_command_the_commands_are_listed():
    for arguments in ([], ["--help"], ["-h"]):
        ended = run("-m", "llava_cot_jax", *arguments)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert ended.stdout.startswith("usage: python -m llava_cot_jax COMMAND")
        for name, summary in cli.COMMANDS.items():
            assert f"  {name:8}  {summary}\n" in ended.stdout
        assert max(map(len, ended.stdout.splitlines())) <= 100


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("trian", "there is no command 'trian'; did you mean train?"),
        (
            "--json",
            "there is no command '--json'; the commands are generate, evaluate, serve, rollout, train, annotate, "
            "prepare, convert, plan, bench",
        ),
    ],
)
def test_an_unknown_command(command, message):
    ended = run("-m", "llava_cot_jax", command)
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", f"error: {message}\n")


class DrawnAtOnce(Progress):
    """A progress bar that draws each update."""

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes, refresh=True)


def shown(screen: io.StringIO) -> str:
    """The last line of a progress bar, without its colours."""
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", screen.getvalue()).replace("\r", "\n")
    return [line.rstrip() for line in plain.splitlines() if line.strip()][-1]


@pytest.mark.parametrize(
    ("width", "note"),
    [
        (60, "loss 1."),
        (80, "loss 1.2345, 12.3"),
        (120, "loss 1.2345, 12.3 samples/s, MFU 34.5%"),
    ],
)
def test_a_progress_bar_shows_step_rate_and_time_left_on_any_screen(monkeypatch, width, note):
    """And no total before it is known, as rich's own of 100."""
    screen, clock = io.StringIO(), count(0.0, 2.5)
    console = Console(width=width, force_terminal=True, file=screen, legacy_windows=False)
    monkeypatch.setattr(cli, "Console", lambda stderr: console)
    monkeypatch.setattr(cli, "Progress", partial(DrawnAtOnce, auto_refresh=False, get_time=lambda: next(clock)))
    with cli.progress_bar("training", "steps", 10) as update:
        before = shown(screen)
        update(0, 3000)
        known = shown(screen)
        for done in range(1200, 1210):
            update(done, 3000, "loss 1.2345, 12.3 samples/s, MFU 34.5%")
        last = shown(screen)
    assert " 0/? steps" in before and "100" not in before
    assert " 0/3000 steps" in known
    assert len(last) <= width and "1209/3000 steps" in last and note in last
    assert re.search(r"(\d s each|\d/s) \d+:\d\d:\d\d ", last), last


def test_programs_that_cannot_be_kept_are_a_warning(tmp_path, monkeypatch, warnings_of):
    """And what jax was to keep, by whichever name, it does not try to."""
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    for name, value in (("XDG_CACHE_HOME", "file"), ("JAX_COMPILATION_CACHE_DIR", "file/programs")):
        monkeypatch.setenv(name, str(tmp_path / value))
        set_to: dict[str, Any] = {}
        monkeypatch.setattr("jax.config.update", set_to.__setitem__)
        cli.enable_compilation_cache()
        assert set_to == {"jax_enable_compilation_cache": False}
        assert "compiled programs cannot be kept in" in warnings_of.messages[-1]


@pytest.mark.slow
def test_a_platform_that_jax_does_not_know_is_one_line():
    script = "from llava_cot_jax import cli\nimport jax\ncli.run(jax.devices)"
    environment = os.environ | {"JAX_PLATFORMS": "nonsense"}
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=environment)
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: jax cannot use the devices: Unable to initialize backend 'nonsense'")
    assert ended.returncode == 2


def test_devices_that_another_process_holds_deserve_another_start(capsys):
    text = "Unable to initialize backend 'tpu': ABORTED: The TPU is already in use by process with pid 7"
    assert cli.report(RuntimeError(text)) == 1
    assert capsys.readouterr().err == f"error: jax cannot use the devices: {text}\n"
    cli.report(RuntimeError("another one"))
    assert capsys.readouterr().err == "RuntimeError: another one\n"


def test_the_version():
    assert run("-m", "llava_cot_jax", "--version").stdout == f"llava-cot {version('llava_cot_jax')}\n"
    assert llava_cot_jax.__version__ == version("llava_cot_jax")


@every_parser
def test_the_version_of_a_command(start, capsys):
    with pytest.raises(SystemExit) as end:
        parser_of(start).parse_args(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"{cli.program_name(start.split()[0])} {version('llava_cot_jax')}\n"


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "utf-8"},
    ],
)
def test_a_terminal_without_a_character_shows_its_code(environment):
    """Half of a character, too, ends no answer in a traceback. Errors are told as well."""
    code = (
        "from llava_cot_jax import cli; from llava_cot_jax.errors import UserError\n"
        "def main(): print('d\\xe9j\\xe0 \\u5317 \\ud83d'); raise UserError('\\u4eac')\n"
        "cli.run(main)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, env=os.environ | environment)
    assert ended.returncode == 2 and b"Traceback" not in ended.stderr
    utf8 = "utf-8" in environment.values()
    out = "d\u00e9j\u00e0 \u5317 \\ud83d" if utf8 else r"d\xe9j\xe0 \u5317 \ud83d"
    assert ended.stdout == f"{out}\n".encode()
    assert ended.stderr == ("error: \u4eac\n" if utf8 else "error: \\u4eac\n").encode()


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["plan", "--print_config"]])
def test_an_output_that_cannot_be_written(arguments, unbuffered):
    """A full disk is told in one line, a reader that has ended ends the command, and without an output all goes on."""
    command = [sys.executable, "-m", "llava_cot_jax", *arguments]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}

    def ended(output: str) -> tuple[int, str]:
        shell = ["sh", "-c", f'"$@" {output}', "sh", *command]
        process = subprocess.run(shell, cwd=ROOT, env=environment, text=True, stderr=subprocess.PIPE, timeout=60)
        return process.returncode, process.stderr

    full = "error: no space left for what the command prints, or for one of its files: free some on that disk\n"
    assert ended(">/dev/full") == (2, full)
    assert ended("| true") == (0, "")
    assert ended(">&-") == (0, "")


SCRIPT = "import sys; from llava_cot_jax.__main__ import main; sys.argv[0] = 'bin/llava-cot'; main()"


@pytest.mark.parametrize(
    ("command", "program"),
    [
        (["-m", "llava_cot_jax.convert"], "python -m llava_cot_jax.convert"),
        (["-m", "llava_cot_jax", "convert"], "python -m llava_cot_jax convert"),
        (["-c", SCRIPT, "convert"], "llava-cot convert"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_usage_line_names_the_command_as_it_was_started(command, program):
    ended = run(*command, "--help")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith(f"usage: {program} [")


@pytest.mark.slow
def test_a_command_is_the_same_however_it_is_started():
    arguments = ["no-such-folder", "out", "--for", "transformers"]
    starts = (["-m", "llava_cot_jax.convert"], ["-m", "llava_cot_jax", "convert"], ["-c", SCRIPT, "convert"])
    ended = [run(*start, *arguments) for start in starts]
    assert {one.returncode for one in ended} == {2}
    assert {one.stderr for one in ended} == {f"error: no such folder: {ROOT / 'no-such-folder'}\n"}


def test_options_in_processes_of_their_own():
    ended = run("-m", "llava_cot_jax", "generate", "--draw-to", "a-b", "--show-search", "--max-new-tokens=7", "--json")
    assert ended.returncode == 2 and "--show_search needs a search" in ended.stderr
    ended = run("-m", "llava_cot_jax.generate", "--draw-to", "a-b", "--json", "--print_config")
    options = yaml.safe_load(ended.stdout)
    assert (options["draw_to"], options["json"], options["show_search"]) == ("a-b", True, False)


def test_the_script_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, name = project["scripts"]["llava-cot"].split(":")
    assert callable(getattr(importlib.import_module(module), name))
