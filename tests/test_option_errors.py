"""Mistakes in options and configuration files are told in the user's words: what was given, where, what is needed."""

import re
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import yaml

from llava_cot_jax import cli
from llava_cot_jax.errors import UserError
from tests.parsers import STARTS, parser_of, required_arguments
from tests.test_cli import named_options

LIBRARY = re.compile(r"<class|typing\.|Union|Subtypes|Parser key|Expected a|Does not validate|valid subclass|argument ")
"""Words of the libraries that read options."""

NEEDED = {int: "a whole number", float: "a number", bool: "true or false"}


def told(start: str, *arguments: str) -> str:
    """The message that arguments end in."""
    with pytest.raises(UserError) as mistake:
        parser = parser_of(start)
        parser.instantiate(parser.parse_args(list(arguments)))
    message = str(mistake.value)
    assert "\n" not in message and not LIBRARY.search(message), message
    return message


def with_wrong_value(start: str) -> list[Any]:
    """The options that do not take any text."""
    hints = ((action, getattr(action, "_typehint", str)) for action in named_options(start))
    return [action for action, hint in hints if action.choices or str not in (hint, *get_args(hint))]


def nested(name: str, value: object) -> dict[str, Any]:
    """The mapping by which a file sets an option, whose name has dots where it is in a group."""
    first, _, rest = name.partition(".")
    return {first: nested(rest, value) if rest else value}


@pytest.mark.parametrize("start", STARTS)
def test_a_wrong_value_of_any_option(start, tmp_path):
    """Every option of every command, typed or in a file, names itself, the value, the file and what it must be."""
    options = with_wrong_value(start)
    path = tmp_path / "options.yaml"
    for action in options:
        name = action.option_strings[0].removeprefix("--")
        if any(other.dest.startswith(f"{name}.") for other in options):  # a group
            path.write_text(yaml.safe_dump(nested(name, 3)))
            message = told(start, *required_arguments(parser_of(start)), "--config", str(path))
            assert message.startswith(f"{path}: {name} is 3; it must be a mapping of options, such as ")
            continue
        given = required_arguments(parser_of(start))
        assert told(start, *given, f"--{name}=wr0ng").startswith(f"--{name} is 'wr0ng'; it must be ")
        path.write_text(yaml.safe_dump(nested(name, "wr0ng")))
        message = told(start, *given, "--config", str(path))
        assert message.startswith(f"{path}: {name} is 'wr0ng'; it must be ")
        needed = message.partition("it must be ")[2]
        hint = getattr(action, "_typehint", None)
        assert needed == NEEDED.get(hint, needed) and "null" not in needed
        choices = action.choices or (hint.__args__ if getattr(hint, "__origin__", None) is Literal else ())
        assert all(str(choice) in needed for choice in choices)


FILES = {
    "seed: [1]": "{path}: seed is [1]; it must be a whole number",
    "seed: null": "{path}: seed is null; it must be a whole number",
    "seed: 1.5": "{path}: seed is 1.5; it must be a whole number",
    "temperature: [a]": "{path}: temperature is ['a']; it must be a number or a list of numbers",
    "quantize: int4": "{path}: quantize is 'int4'; it must be int8",
    "question: what": "{path}: question is 'what'; it must be a list of texts",
    "question: [a, 1]": "{path}: question, element 2, is 1; it must be a text",
    "checkpoint: 3": "{path}: checkpoint is 3; it must be a text",
    "mesh: null": "{path}: mesh is null; it must be a mapping of options, such as data, fsdp or tensor",
    "mesh: {x: 3}": "{path}: there is no option mesh.x; mesh has data, fsdp and tensor",
    "mesh: {tensr: 3}": "{path}: there is no option mesh.tensr; did you mean mesh.tensor?",
    "sede: 3": "{path}: there is no option sede; did you mean seed?",
    "msh: {data: 3}": "{path}: there is no option msh.data; did you mean mesh.data?",
    "msh: 3": "{path}: there is no option msh; did you mean mesh?",
    "3: 4": "{path}: there is no option 3",
    "seed: 1\njson: true\nseed: 2": "{path}: line 3 gives seed again, which line 1 gives already: remove one",
    "mesh: {data: 1, data: 2}": "{path}: line 1 gives data again, which line 1 gives already: remove one",
    "- a": "{path} holds a list; it must hold options, as in `seed: 3`, one a line",
    "hello": "{path} holds 'hello'; it must hold options, as in `seed: 3`, one a line",
    "# nothing": "{path} holds nothing; it must hold options, as in `seed: 3`, one a line",
    "seed: [1": "{path} is no YAML at line 2, column 1: did not find expected ',' or ']'",
    "a: b: c": "{path} is no YAML at line 1, column 5: mapping values are not allowed in this context",
    "\tseed: 3": "{path} is no YAML at line 1, column 1: found character that cannot start any token",
    "seed: *other": "{path} is no YAML at line 1, column 7: found undefined alias",
    "config: a.yaml": "{path}: config names another file; give --config once for each file instead",
}


@pytest.mark.parametrize("text", FILES)
def test_a_configuration_file_that_cannot_be_used(text, tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text(text)
    assert told("generate", "--config", str(path)) == FILES[text].format(path=path)


ARGUMENTS = [
    ("train", [], "give --output, --checkpoint and --data or set them in a --config file"),
    ("plan --search", [], "give --topology or set it in a --config file"),
    ("convert", ["a"], "give DESTINATION"),
    ("convert", [], "give SOURCE and DESTINATION"),
    ("generate", ["--seed"], "--seed needs a value: a whole number"),
    ("plan", ["--config"], "--config needs a value: a mapping, or a YAML file of one"),
    ("generate", ["--question"], "--question needs a value: a list of texts"),
    (
        "generate",
        ["--num_candidates", "[1, x]"],
        "--num_candidates is [1, 'x']; it must be a whole number or a list of ",
    ),
    ("generate", ["--config", "{seed: x}"], "--config: seed is 'x'; it must be a whole number"),
    ("generate", ["--config", "/"], "/ is a folder; name a configuration file"),
    ("generate", ["--mesh", "3"], "unrecognized arguments: --mesh 3; mesh has data, fsdp and tensor"),
    ("generate", ["--show-serch"], "unrecognized arguments: --show-serch; did you mean show_search?"),
    ("train", ["--lora.rnk", "3"], "unrecognized arguments: --lora.rnk 3; did you mean lora.rank?"),
    ("train", ["--optimizer", "{b1: x}"], "--optimizer: optimizer.b1 is 'x'; it must be a number"),
    ("bench", ["--workload", "no.yaml"], f"there is no configuration file {Path.cwd()}/no.yaml, nor one of this name"),
    ("bench", ["--workload.stage_tokens", "3"], "--workload.stage_tokens is 3; it must be a list of whole numbers"),
]


@pytest.mark.parametrize(("start", "arguments", "message"), ARGUMENTS, ids=[" ".join([s, *a]) for s, a, _ in ARGUMENTS])
def test_arguments_that_cannot_be_used(start, arguments, message):
    assert told(start, *arguments).startswith(message)


def test_a_text_in_a_list_may_end_in_a_question_mark(tmp_path):
    """YAML's loader in Python refuses it, and the one in C does not."""
    (tmp_path / "options.yaml").write_text("question: [How many?]")
    assert parser_of("generate").parse_args(["--config", str(tmp_path / "options.yaml")]).question == ["How many?"]


def test_an_option_typed_after_a_file_is_the_one_that_is_named(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("seed: 3")
    assert told("generate", "--config", str(path), "--seed", "x") == "--seed is 'x'; it must be a whole number"


def test_a_file_within_a_file(tmp_path):
    (tmp_path / "work.yaml").write_text("prompt_token: 3")
    (tmp_path / "bench.yaml").write_text("workload: work.yaml")
    assert "prompt_token" in told("bench", "--config", str(tmp_path / "bench.yaml"))


class TestConfigurationsOfThePackage:
    """They are found by name, wherever a command is started, unless a file of one's own has the name."""

    def test_they_are_found_from_anywhere(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in ("shapes_search.yaml", "configs/shapes_search.yaml"):
            options = parser_of("generate").parse_args(["--config", name])
            assert (options.search, options.draw) == ("stage_beam", 4)
            assert cli.configurations_in(["--config", name]) == [cli.CONFIGURATIONS / "shapes_search.yaml"]
        options = parser_of("bench").parse_args(["--workload=bench_standard.yaml", "--random", "100m"])
        assert options.workload.prompt_tokens == 128

    def test_a_file_of_ones_own_comes_first(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "shapes_search.yaml").write_text("search: greedy")
        assert parser_of("generate").parse_args(["--config", "shapes_search.yaml"]).search == "greedy"

    def test_another_name(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in ("shapes_serch.yaml", "elsewhere/shapes_search.yaml"):
            message = f"there is no configuration file {tmp_path / name}, nor one of this name in the package"
            assert told("generate", "--config", name) == f"{message}; did you mean shapes_search.yaml?"
