"""What a command prints: on terminals that lack characters, to readers that have ended, and to disks that are full."""

import contextlib
import io
import os
import sys
from collections.abc import Callable

from llava_cot_jax.paths import NO_SPACE


def escape_what_cannot_be_printed() -> None:
    """Let a terminal that is not UTF-8 show the code of a character that it lacks, instead of an error of Python."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not where a test or a notebook has put another object
            stream.reconfigure(errors="backslashreplace")


def run_to_the_last_output(main: Callable[[], None]) -> None:
    """Call ``main`` and write all that it has printed, so that an error of that is the command's, not Python's."""
    try:
        main()
    except SystemExit:  # after --help, say
        _flush()
        raise
    _flush()


def _flush() -> None:
    if sys.stdout is not None:  # the process may have been started without one
        sys.stdout.flush()


def drop_output() -> None:
    """Let what is still to be printed go nowhere, so that Python does not try to write it when the process ends."""
    with contextlib.suppress(AttributeError, OSError):  # there is no output, or it is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_full_disk(fault: BaseException) -> bool:
    """Whether an exception reports a full disk."""
    return isinstance(fault, OSError) and fault.errno in NO_SPACE
