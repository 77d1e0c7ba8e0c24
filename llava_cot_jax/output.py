"""Standard output and errors of a command: terminals that lack characters, readers that have ended, full disks."""

import contextlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

from llava_cot_jax.paths import NO_SPACE


def prepare_streams() -> None:
    """Let anything be printed anywhere.

    A terminal that is not UTF-8 shows the code of a character that it lacks. What a process prints that was started
    without standard output, or without standard errors, goes nowhere.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 as long as the process runs
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not where a test or a notebook has put another object
            stream.reconfigure(errors="backslashreplace")


def run_to_the_last_output(main: Callable[[], None]) -> None:
    """Call ``main`` and write all that it has printed, so that an error of that is the command's, not Python's."""
    try:
        main()
    except SystemExit:  # after --help, say
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def drop_output() -> None:
    """Let what is still to be printed go nowhere, so that Python does not try to write it when the process ends."""
    with contextlib.suppress(OSError):  # where a test or a notebook has put an object that is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_full_disk(fault: BaseException) -> bool:
    """Whether an exception reports a full disk."""
    return isinstance(fault, OSError) and fault.errno in NO_SPACE
