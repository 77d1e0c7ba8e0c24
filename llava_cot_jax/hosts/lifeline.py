"""Bond between the processes of a run, so that none of them waits for one that has failed.

Over their ``connections``, which stay open to the end, the processes meet, compare what each has read for itself, and
learn at once when one of them fails or is killed. jax's own coordination service, which takes over the port once all
have met, would notice that after minutes, and end the others by SIGABRT. Nothing here needs jax.
"""

import contextlib
import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NoReturn

from llava_cot_jax.errors import TransientError, UserError, causes
from llava_cot_jax.hosts import connections
from llava_cot_jax.hosts.connections import Failure, FirstConnections, OtherConnections
from llava_cot_jax.hosts.process_group import ALONE, ProcessGroup
from llava_cot_jax.memory_errors import describe_exhausted_memory

MEETING_SECONDS = 300.0
"""Time in which all processes must have come."""

FIRST_NOTICE_SECONDS, NOTICE_SECONDS = 15.0, 60.0
"""Time of waiting after which a line says what is waited for, and time between further lines."""

_LONGEST_REASON = 300
"""Number of characters that other processes show of an exception's text, of which XLA writes pages."""


class Lifeline:
    """Connections of this process to the others of its run. A process that is alone has none.

    Args:
        group: Processes of the run.
        leave: Function that ends this process at once, with an exit code.
    """

    def __init__(self, group: ProcessGroup, leave: Callable[[int], object] = os._exit) -> None:
        self._alone = group.count == 1
        self._leave = leave
        self._round = 0
        make = OtherConnections if group.index else FirstConnections
        self._hub: FirstConnections | OtherConnections = make(group, self._watch)
        self._ending = False
        self._is_follower = group.index > 0
        self._may_abort = False
        self._code = 1
        if not self._alone:
            self._hub.start()

    def meet(self) -> None:
        """Wait until all processes of the run are there. From ``FIRST_NOTICE_SECONDS`` on, lines say what is missing.

        Raises:
            TransientError: They are not there after ``MEETING_SECONDS``. They may only be late.
        """
        hub = self._hub
        if not self._alone and not self._wait(lambda: hub.met and not hub.failure, MEETING_SECONDS, f"; {ALONE}"):
            hub.given_up = True
            raise TransientError(f"gave up after {MEETING_SECONDS:.0f} s of waiting for {hub.awaited}; {ALONE}")

    def agree(self, read: Callable[[], Mapping[str, str]]) -> None:
        """Compare what each process has read for itself. All processes must call this, equally often.

        Args:
            read: Function that returns the name and value of each thing that must be the same in all processes. A
                process that is alone does not call it.

        Raises:
            UserError: They differ. Every process raises it, and the message names processes and fields.
        """
        if self._alone:
            return
        self._round += 1
        number = self._round
        self._hub.post({"round": number, "fields": dict(read())})
        self._wait(lambda: number in self._hub.verdicts)
        if difference := self._hub.verdicts[number]:
            raise UserError(difference)

    @contextmanager
    def shared_failures(self, report: Callable[[BaseException], int]) -> Iterator[None]:
        """End all processes if the block raises an exception in one of them, which prints it and ends with its code.

        In a process that is alone, the exception is raised as usual. So is ``SystemExit`` in any process: it is the end
        of a run that all processes agree on.

        Args:
            report: Function that prints an exception and returns the exit code, such as ``cli.report``.
        """
        if self._alone:
            yield
            return
        try:
            yield
        except SystemExit:
            raise
        except BaseException as fault:
            self._fail(fault, report)
        finally:
            self._hub.post({"done": True})

    def catch_aborts(self) -> None:
        """Let SIGABRT, with which jax's service answers the loss of the first process, end this process as others."""
        if self._alone:
            return

        def on_abort(_: int) -> None:
            with self._hub.changed:
                self._hub.changed.wait_for(lambda: self._hub.failure is not None, connections.GRACE_SECONDS)
                if self._ending:
                    self._hub.changed.wait(connections.LEAVING_SECONDS)  # another thread is about to end the process
            if self._hub.failure:
                self._watch(self._hub.failure)
            self._leave(self._code)

        self._on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(on_abort)  # kept for as long as C may call it
        self._may_abort = self._is_follower
        ctypes.CDLL(None).signal(signal.SIGABRT, self._on_abort)

    def _wait(self, ready: Callable[[], bool], limit: float = float("inf"), remedy: str = "") -> bool:
        """Wait at most ``limit`` seconds until ``ready``, and return whether it is. A failure is waited out."""
        hub, began, notice = self._hub, time.monotonic(), FIRST_NOTICE_SECONDS
        with hub.changed:
            while not ready():
                waited = time.monotonic() - began
                if hub.failure:
                    hub.changed.wait()
                elif waited >= limit:
                    return False
                elif waited >= notice:
                    logging.getLogger(__name__).warning("waiting for %s%s", hub.awaited, remedy)
                    notice += NOTICE_SECONDS
                else:
                    hub.changed.wait(min(notice, limit) - waited)
        return True

    def _fail(self, fault: BaseException, report: Callable[[BaseException], int]) -> NoReturn:
        """End this process because of its own exception, and the others with it."""
        hub = self._hub
        with hub.changed:
            if any(type(cause).__name__ in ("JaxRuntimeError", "XlaRuntimeError") for cause in causes(fault)):
                # It may only tell that another process has ended, whose failure is about to arrive.
                hub.changed.wait_for(lambda: hub.failure is not None, 2 * connections.GRACE_SECONDS)
                while hub.failure:
                    hub.changed.wait()
            while self._ending:
                hub.changed.wait()
            self._ending = True
        self._code = report(fault)
        hub.tell(f"ended with {_in_a_line(fault)}", self._code)
        self._finish(self._code)

    def _watch(self, failure: Failure) -> None:
        """End this process because of the failure of another, unless it is about to end by itself."""
        with self._hub.changed:
            if self._ending:
                return
            self._ending = True
        if self._may_abort:
            _leave_stderr_to_python()
        print(f"error: {failure}", file=sys.stderr, flush=True)
        self._finish(failure.code)

    def _finish(self, code: int) -> NoReturn:
        with contextlib.suppress(Exception):
            if sys.stderr.isatty():
                print("\x1b[?25h", end="", file=sys.stderr)  # a progress bar has hidden the cursor
            sys.stdout.flush()
            sys.stderr.flush()
        self._hub.let_others_leave()
        self._leave(code)
        raise SystemExit(code)


def _leave_stderr_to_python() -> None:
    """Let nothing that jax writes follow this process's last line: it may be about to tell of its abort."""
    with contextlib.suppress(OSError):
        sys.stderr = os.fdopen(os.dup(2), "w", errors="backslashreplace")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _in_a_line(fault: BaseException) -> str:
    """Return what ended a process, for the others."""
    message = " ".join(str(fault).split())
    if isinstance(fault, UserError):
        return f"an error: {message}"
    if exhausted := describe_exhausted_memory(fault):
        return f"an error: {exhausted}"
    shown = message if len(message) <= _LONGEST_REASON else f"{message[:_LONGEST_REASON]}..."
    return f"{type(fault).__name__}{': ' if shown else ''}{shown}"
