"""Ctrl-C in the process of a command: one line and exit code 130, from the first import to the end of the process.

A ``KeyboardInterrupt`` that is raised while modules are imported ends in tracebacks of many lines, or is swallowed. So
the process ends at once there, since nothing has been begun that would have to be ended. Elsewhere it is raised as
always, so that a command can clean up. Processes that only import the package keep their own handling of signals.
"""

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

EXIT_CODE = 130
"""Exit code after Ctrl-C, which is 128 plus the number of SIGINT, as shells have it."""

_PACKAGE_FOLDER = Path(__file__).absolute().parent
_SCRIPT = "llava-cot"
_SHOW_CURSOR = b"\r\x1b[K\x1b[?25h"

_SECONDS_UNTIL_AGAIN = 0.02
"""Time after which Python has left the place where it ignores exceptions."""

_running = False


def prepare_process() -> None:
    """Handle Ctrl-C in this process, if it is that of a command, or a worker process of one."""
    if not _is_heard():
        return
    if "--multiprocessing-fork" in sys.orig_argv:
        if _is_command_file(sys.argv[0]):
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command handles it, and ends its workers
    elif _is_command():
        signal.signal(signal.SIGINT, _handle)


@contextmanager
def command_running() -> Iterator[None]:
    """Raise ``KeyboardInterrupt`` at Ctrl-C within the block, but while modules are imported, end the process."""
    global _running
    outer, heard = _running, _is_heard()
    before = signal.signal(signal.SIGINT, _handle) if heard else None
    report_ignored = sys.unraisablehook
    sys.unraisablehook = functools.partial(_raise_again, report_ignored)
    _running = True
    try:
        yield
    finally:
        _running = outer
        sys.unraisablehook = report_ignored
        if heard:
            signal.signal(signal.SIGINT, before)


def end_at_once() -> NoReturn:
    """End the process with one line, without waiting for threads or computations that are under way."""
    os.write(2, (_SHOW_CURSOR if os.isatty(2) else b"") + b"interrupted\n")
    os._exit(EXIT_CODE)


def _is_heard() -> bool:
    """Whether Ctrl-C is for this thread to handle. Background jobs of a shell ignore it; a program may handle it."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    return in_main_thread and signal.getsignal(signal.SIGINT) in (signal.default_int_handler, _handle)


def _handle(signum: int, frame: FrameType | None) -> None:
    if not _running or _is_importing(frame):
        end_at_once()
    raise KeyboardInterrupt


def _raise_again(report_ignored: Callable[[Any], object], ignored: Any) -> None:
    """Raise a ``KeyboardInterrupt`` again, elsewhere, that Python has ignored because it came in a destructor, say."""
    if ignored.exc_type is KeyboardInterrupt:
        press = functools.partial(signal.pthread_kill, threading.get_ident(), signal.SIGINT)
        threading.Timer(_SECONDS_UNTIL_AGAIN, press).start()
    else:
        report_ignored(ignored)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _is_command() -> bool:
    """Whether Python was started with the package's script, or with ``-m`` and one of its modules."""
    if sys.argv[:1] != ["-m"]:
        return _is_command_file(sys.argv[0]) if sys.argv else False
    started = zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
    return any(option == "-m" and module.split(".")[0] == __package__ for option, module in started)


def _is_command_file(path: str) -> bool:
    file = Path(path).absolute()
    return file.stem == _SCRIPT or file.parent == _PACKAGE_FOLDER
