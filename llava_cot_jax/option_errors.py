"""Mistakes in options and in configuration files, told in the user's words: what was given, where, and what is needed.

``jsonargparse`` finds the mistakes in values. Its messages speak of its own parts, and name no file.
"""

import argparse
import difflib
import re
import types
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from llava_cot_jax.checks import shown
from llava_cot_jax.errors import UserError

_ARGUMENT = re.compile(r'(?:argument|Parser key) "?(?:--)?([\w.]+)"?(?: element (\d+))?: (.*)')
"""Beginning of a message about the value of an option: its name, perhaps the number of an element, and the rest."""

_VALUE = re.compile(r"(?:.*Given|Got) value: (.*)$|invalid choice: '(.*)' \(choose from|^'(.*)' not among choices")
"""Value that a message calls wrong. Where several are tried, the whole value is given last."""

_REQUIRED = re.compile(r"the following arguments are required: (.*)$")

_TYPES = {int: ("a whole number", "whole numbers"), float: ("a number", "numbers"), str: ("a text", "texts")}
"""Words for a value of a type, and for several."""


class UnknownOption(Exception):
    """Error for an option that a configuration file sets and the command does not have. Its text is the name."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of an error message that suggests the known name most like ``name``, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def joined(names: Iterable[str], word: str) -> str:
    """Return names as a list in a sentence, such as "a, b and c"."""
    *first, last = names
    return f"{', '.join(first)} {word} {last}" if first else last


def expected(action: argparse.Action) -> str:
    """Return what the value of an option must be."""
    hint = getattr(action, "_typehint", action.type)
    if action.nargs in ("+", "*"):
        return f"a list of {_TYPES[hint][1]}" if hint in _TYPES else "a list"
    return _one_of(tuple(action.choices)) if action.choices else joined(_alternatives(hint), "or")


def _one_of(choices: tuple[object, ...]) -> str:
    return f"one of {', '.join(map(str, choices))}" if len(choices) > 1 else str(choices[0])


def _alternatives(hint: Any) -> Iterator[str]:
    """Yield the kinds of values that a type allows, in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for each in inner:
            if each is not type(None):  # what an option is that is not given
                yield from _alternatives(each)
    elif origin is Literal:
        yield _one_of(inner)
    elif origin in (tuple, list):
        yield f"a list of {_TYPES[inner[0]][1]}" if inner and inner[0] in _TYPES else "a list"
    elif hint is bool:
        yield "true or false"
    else:
        yield _TYPES[hint][0] if hint in _TYPES else "a mapping, or a YAML file of one"


def in_words(message: str, actions: Mapping[str, argparse.Action], sources: Mapping[str, str]) -> str:
    """Return a message of ``jsonargparse`` in the user's words.

    Args:
        message: The message, on one line.
        actions: Options by their names, without hyphens before them.
        sources: Configuration file that sets an option, by the option's name. Others are from the command line.
    """
    if required := _REQUIRED.search(message):
        names = [f"--{name}" if name in actions else name.upper() for name in required[1].split(", ")]
        where = " or set it in a --config file" if len(names) == 1 else " or set them in a --config file"
        return f"give {joined(names, 'and')}{where if all(name.startswith('--') for name in names) else ''}"
    found = _ARGUMENT.search(message)
    if not found or not (action := actions.get(found[1])):
        return message
    name, element, rest = found.groups()
    label = f"{sources[name]}: {name}" if name in sources else f"--{name}"
    needed = expected(action)
    if element:
        label, needed = f"{label}, element {element},", joined(_alternatives(getattr(action, "_typehint", str)), "or")
    if rest.startswith("expected "):
        return f"{label} needs a value: {needed}"
    if "Unable to load config" in rest:
        given = rest.partition("Unable to load config ")[2].partition(" - ")[0].strip("'\"")
        nested = rest.partition(" - ")[2]
        if (inner := _ARGUMENT.search(nested)) and inner[1] != name:
            return in_words(nested, actions, {inner[1]: given, **sources})
        return f"{label} is {given!r}; it must be a mapping, such as {{name: value}}, or a YAML file of one"
    if not (value := _VALUE.search(rest)):
        return message
    return f"{label} is {_typed(next(filter(None, value.groups()), ''))}; it must be {needed}"


def _typed(value: str) -> str:
    """Return a value as a user types it: a text in quotes, anything else as it is."""
    if value in ("None", "True", "False"):
        return {"None": "null"}.get(value, value.lower())
    is_number = re.fullmatch(r"[-+]?\d*\.?\d+(e[-+]?\d+)?", value, re.IGNORECASE)
    return value if is_number or value.startswith(("[", "{")) else repr(value)


_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Loader that jsonargparse reads with. The one in C accepts a little more, such as a question mark in ``[a?]``."""


class _StrictLoader(_SafeLoader):
    """YAML's loader, but for a key that is given twice, which YAML forbids and the loader accepts."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line, name = key.start_mark.line + 1, str(key.value)
            if name in lines and name != "<<":
                raise UserError(f"line {line} gives {name} again, which line {lines[name]} gives already: remove one")
            lines[name] = line
        return super().construct_mapping(node, deep)


def read_configuration(path: Path) -> dict[str, Any]:
    """Read the mapping in a configuration file.

    Raises:
        UserError: The file cannot be read, or is no YAML or no mapping, or gives a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as fault:
        raise UserError(f"{path} is no text in UTF-8: {fault}") from None
    except OSError as fault:
        raise UserError(f"{path} cannot be read: {fault.strerror or fault}") from None
    return parse_configuration(text, str(path))


def parse_configuration(text: str, source: str) -> dict[str, Any]:
    """Return the mapping in a YAML text.

    Raises:
        UserError: The text is no YAML or no mapping, or gives a key twice. ``source`` is named.
    """
    try:
        content = yaml.load(text, _StrictLoader)
    except UserError as twice:
        raise UserError(f"{source}: {twice}") from None
    except yaml.YAMLError as fault:
        mark, problem = getattr(fault, "problem_mark", None), getattr(fault, "problem", None) or fault
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{source} is no YAML{place}: {' '.join(str(problem).split())}") from None
    if not isinstance(content, dict):
        kind = {type(None): "nothing", list: "a list"}.get(type(content)) or shown(content)
        raise UserError(f"{source} holds {kind}; it must hold options, as in `seed: 3`, one a line")
    return content


def configured_options(
    content: Mapping[Any, Any], source: str, actions: Mapping[str, argparse.Action], group: str = ""
) -> Iterator[str]:
    """Yield the names of the options that a configuration file sets, and check that each exists and may be set so.

    Args:
        content: The file's mapping, or that of a group of options in it.
        source: Name of the file, for messages.
        actions: Options by their names, such as "optimizer.b1".
        group: Name of the group, such as "optimizer".

    Raises:
        UnknownOption: There is no such option.
        UserError: A group is no mapping, or a value is missing or no list.
    """
    for key, value in content.items():
        name = f"{group}.{key}" if group else str(key)
        members = [option for option in actions if option.startswith(f"{name}.")]
        if name == "config":
            raise UserError(f"{source}: config names another file; give --config once for each file instead")
        if members and isinstance(value, dict):
            yield from configured_options(value, source, actions, name)
        elif members and not (isinstance(value, str) and name in actions):  # a text may name a file of the group
            inner = joined((member.removeprefix(f"{name}.") for member in members[:3]), "or")
            raise UserError(f"{source}: {name} is {_in_yaml(value)}; it must be a mapping of options, such as {inner}")
        elif name not in actions:
            raise UnknownOption(f"{name}.{next(iter(value))}" if isinstance(value, dict) and value else name)
        else:
            needs_list = actions[name].nargs in ("+", "*") and not isinstance(value, list)
            if needs_list or (value is None and not _may_be_null(actions[name])):
                raise UserError(f"{source}: {name} is {_in_yaml(value)}; it must be {expected(actions[name])}")
            yield name


def _in_yaml(value: object) -> str:
    return "null" if value is None else shown(value)


def _may_be_null(action: argparse.Action) -> bool:
    hint = getattr(action, "_typehint", None)
    return (action.default is None and not action.required) or type(None) in get_args(hint)


def suggestion(name: str, known: Collection[str]) -> str:
    """Return the end of an error message about an unknown option: the one most like it, or those of its group."""
    name = name.replace("-", "_")
    group, _, last = name.rpartition(".")
    for prefix, wanted in ((f"{group}.", last), (f"{name}.", "")):
        if members := [each.removeprefix(prefix) for each in known if each.startswith(prefix)]:
            near = difflib.get_close_matches(wanted, members, n=1)
            return f"; did you mean {prefix}{near[0]}?" if near else f"; {prefix[:-1]} has {joined(members, 'and')}"
    groups = {each.rpartition(".")[0] for each in known} - {""}
    return did_you_mean(name, [*known, *groups])
