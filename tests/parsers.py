"""The parsers of all commands, for tests that look at every option."""

import importlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from llava_cot_jax import cli


class Caught(Exception):
    """Ends a command once its parser is known."""

    def __init__(self, parser: cli.Parser) -> None:
        super().__init__()
        self.parser = parser


STARTS = {name: [] for name in cli.COMMANDS} | {"plan --search": ["--search", "greedy"]}
"""Arguments by which each parser is made: ``plan`` has one for training and one for a search."""


@cache
def parser_of(start: str) -> cli.Parser:
    """Return the parser that a command makes of the arguments in ``STARTS``."""

    def catch(parser: cli.Parser, *_: Any, **__: Any) -> Any:
        raise Caught(parser)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Caught) as caught:
        patch.setattr(cli.Parser, "parse_args", catch)
        importlib.import_module(f"llava_cot_jax.{start.split()[0]}").main(STARTS[start])
    return caught.value.parser


def options_of(parser: cli.Parser) -> Iterator[Any]:
    """Yield the actions of a parser that are shown to a user."""
    for action in parser._actions:
        if action.help != "==SUPPRESS==":
            yield action


def required_arguments(parser: cli.Parser) -> list[str]:
    """Return values for everything that the parser requires."""
    required = [action for action in parser._actions if action.required]
    return [f"--{action.dest}=x" if action.option_strings else "x" for action in required]
