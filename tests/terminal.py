"""A terminal in small: what a person sees of the bytes that a process writes to one."""

import codecs
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len

_TOKEN = re.compile(r"\x1b\[(\??)([\d;]*)([A-Za-z])|[\r\n]|[^\x00-\x1f\x7f]+|(.)", re.DOTALL)

_BEGUN = re.compile(r"\x1b(\[[?\d;]*)?\Z")
"""Beginning of a control sequence at the end of a text."""


@dataclass
class Terminal:
    """Screen with the lines that have scrolled off it. A control sequence that it does not know is an error.

    Attributes:
        columns: Columns of the screen.
        rows: Rows of the screen.
        lines: All lines so far. The last ones, as many as there are rows, are on the screen.
        shows_cursor: Whether the cursor is shown.
        wrapped: Characters that did not fit their line while the cursor was hidden.
        erased: Lines that were on the screen and were erased, without spaces at their ends.
    """

    columns: int
    rows: int
    lines: list[str] = field(default_factory=lambda: [""])
    shows_cursor: bool = True
    wrapped: str = ""
    erased: set[str] = field(default_factory=set)
    _row: int = 0
    _column: int = 0

    @property
    def text(self) -> str:
        """All lines so far, without spaces at their ends, and without empty lines after them."""
        return "\n".join(line.rstrip() for line in self.lines).rstrip("\n")

    def write(self, text: str) -> None:
        """Take what a process writes. Control sequences must be whole."""
        for found in _TOKEN.finditer(text):
            private, number, command, unknown = found.groups()
            assert unknown is None, f"a control character: {unknown!r}"
            if command:
                self._control(private + command, number)
            elif found[0] == "\r":
                self._column = 0
            elif found[0] == "\n":
                self._row += 1
                self.lines += [""] * (self._row + 1 - len(self.lines))
            else:
                for character in found[0]:
                    self._put(character)

    def _control(self, command: str, number: str) -> None:
        match command:
            case "m":  # a colour
                pass
            case "A":
                self._row = max(self._row - int(number or 1), len(self.lines) - self.rows, 0)
            case "K":
                self.erased.add(self.lines[self._row].rstrip())
                kept = "" if number == "2" else self.lines[self._row][: self._column]
                self.lines[self._row] = kept
            case "?h" | "?l":
                assert number == "25"
                self.shows_cursor = command == "?h"
            case _:
                raise AssertionError(f"a control sequence: {number}{command}")

    def _put(self, character: str) -> None:
        assert cell_len(character) == 1, f"a character that does not take one column: {character!r}"
        if self._column == self.columns:
            self.wrapped += "" if self.shows_cursor else character
            self.write("\r\n")
        line = self.lines[self._row].ljust(self._column)
        self.lines[self._row] = line[: self._column] + character + line[self._column + 1 :]
        self._column += 1


def run_in_terminal(
    command: Sequence[str],
    terminal: Terminal,
    environment: Mapping[str, str],
    interrupt_when: Callable[[Terminal], bool] = lambda terminal: False,
) -> int:
    """Run a command whose streams are all a terminal, and return its exit code.

    Args:
        command: Arguments of the command, without Python.
        terminal: Terminal that it writes to.
        environment: Environment of the process.
        interrupt_when: Function of the terminal. Ctrl-C is pressed once, after the first output for which it is true.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", terminal.rows, terminal.columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, *command],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=dict(environment),
        start_new_session=True,
    )
    os.close(theirs)
    decoder = codecs.getincrementaldecoder("utf-8")()
    unread, is_pressed, deadline = "", False, time.monotonic() + 120
    try:
        while time.monotonic() < deadline:
            try:
                unread += decoder.decode(os.read(ours, 1 << 16))
            except OSError:  # the process has ended
                break
            whole = _BEGUN.sub("", unread)
            terminal.write(whole)
            unread = unread[len(whole) :]
            if not is_pressed and interrupt_when(terminal):
                is_pressed = True
                process.send_signal(signal.SIGINT)
        terminal.write(unread)
        return process.wait(10)
    finally:
        os.close(ours)
        process.kill()
