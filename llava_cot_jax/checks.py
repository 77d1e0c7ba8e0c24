"""Checks of the values that a user of the library gives: a wrong one is refused in one line that names it."""

import math
import re
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from llava_cot_jax.errors import UserError

_LONGEST_SHOWN = 60
"""Length, in characters, above which the representation of a value is cut in a message."""

_OBJECT = re.compile(r"<class '| at 0x[0-9a-f]+>")
"""Part of the representation of an object in a list that tells a user nothing."""


def shown(value: object) -> str:
    """Return a value as a message shows it: short, on one line, and with its type where that does not show."""
    if value is None or isinstance(value, bool | int | float | str):
        text = repr(value)
    elif isinstance(value, type):
        return f"the class {value.__name__}"
    elif callable(value) and hasattr(value, "__name__"):
        return f"the function {value.__name__}"
    else:
        kind = f"a {type(value).__name__}"
        # Others, such as models, have long representations that take long to make.
        text = f"{value!r}, {kind}" if isinstance(value, list | tuple | dict | set | bytes) else kind
        is_telling = len(text) <= _LONGEST_SHOWN and text.isprintable() and not _OBJECT.search(text)
        return text if is_telling else kind
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def check_int(name: str, value: Any, least: int | None = 1) -> None:
    """Check that ``value`` is a whole number of at least ``least``.

    Raises:
        UserError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise UserError(f"{name} is {shown(value)}; it must be a whole number")
    if least is not None and value < least:
        raise UserError(f"{name} is {value}; it must be at least {least}")


def check_number(name: str, value: Any) -> None:
    """Check that ``value`` is a finite number.

    Raises:
        UserError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise UserError(f"{name} is {shown(value)}; it must be a finite number")


def check_bool(name: str, value: Any) -> None:
    """Check that ``value`` is True or False.

    Raises:
        UserError: It is not.
    """
    if not isinstance(value, bool):
        raise UserError(f"{name} is {shown(value)}; it must be True or False")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Check that ``value`` is one of some texts.

    Raises:
        UserError: It is not.
    """
    if not isinstance(value, str) or value not in choices:
        raise UserError(f"{name} is {shown(value)}; it must be one of {', '.join(choices)}")


def check_text(name: str, value: Any) -> None:
    """Check that ``value`` is a text that can be written as UTF-8.

    Raises:
        UserError: It is none, or it has a lone surrogate, which is half of a character.
    """
    if not isinstance(value, str):
        raise UserError(f"{name} is {shown(value)}; it must be a text")
    try:
        value.encode()
    except UnicodeEncodeError as fault:
        raise UserError(
            f"{name} has no valid character at position {fault.start} ({value[fault.start]!a}): "
            "it is half of one, as broken JSON or a terminal that is not UTF-8 gives it; remove it"
        ) from None


def check_instance(name: str, value: Any, kind: type, remedy: str) -> None:
    """Check that ``value`` is an object of a class.

    Raises:
        UserError: It is none; the message ends with ``remedy``.
    """
    if not isinstance(value, kind):
        raise UserError(f"{name} is {shown(value)}; {remedy}")
