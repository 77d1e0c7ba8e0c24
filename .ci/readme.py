"""Run what the README tells a reader to type: its bash and python blocks, in order, as they stand.

A block that cannot run here has, on the line directly before its fence, the comment
``<!-- not run in CI: REASON -->``.

    python3 .ci/readme.py          run everything; the first failure ends it
    python3 .ci/readme.py --list   say what would run and what would not
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"

FENCE = re.compile(r"```(\w*)\s*")
MARK = re.compile(r"<!-- not run in CI: (.+) -->\s*")
LANGUAGES = ("bash", "python")
ACTIVATE = "`source .venv/bin/activate`"
"""What the README says, in a sentence, before the commands that are for an activated environment."""


@dataclass(frozen=True)
class Command:
    """A command of the README.

    Attributes:
        line: the number of its first line.
        language: ``bash``, for one command, or ``python``, for the code of a whole block.
        text: what a reader types.
        reason: why it does not run here; None where it does.
        activated: whether the README has told the reader to activate the environment by then.
    """

    line: int
    language: str
    text: str
    reason: str | None
    activated: bool

    @property
    def arguments(self) -> list[str]:
        """The process that runs it."""
        if self.language == "python":
            return [str(ROOT / ".venv" / "bin" / "python"), "-c", self.text]
        return ["bash", "-euo", "pipefail", "-c", self.text]


def read_commands(text: str) -> Iterator[Command]:
    """The commands of a README in order.

    Raises:
        SystemExit: a block without an end, or a comment that belongs to no block of commands.
    """
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        mark = MARK.fullmatch(lines[number - 1]) if number else None
        fence = FENCE.fullmatch(lines[number])
        if mark and not (fence and fence[1] in LANGUAGES):
            sys.exit(f"README.md line {number}: no block of {' or '.join(LANGUAGES)} follows the comment")
        number += 1
        if not fence:
            continue
        end = next((i for i in range(number, len(lines)) if lines[i].rstrip() == "```"), None)
        if end is None:
            sys.exit(f"README.md line {number}: the block has no end")
        reason = mark[1] if mark else None
        if fence[1] == "python":
            yield Command(number + 1, "python", "\n".join(lines[number:end]), reason, True)
        if fence[1] == "bash":
            activated = any(ACTIVATE in line for line in lines[:number])
            for line, command in _join(lines[number:end], number + 1):
                yield Command(line, "bash", command, reason, activated)
        number = end + 1


def _join(lines: list[str], first: int) -> Iterator[tuple[int, str]]:
    """The commands of a bash block, each with the number of its first line; a trailing backslash joins two lines."""
    command: list[str] = []
    for number, line in enumerate(lines, first):
        if not command and (not line.strip() or line.lstrip().startswith("#")):
            continue
        command.append(line)
        if not line.endswith("\\"):
            yield number - len(command) + 1, "\n".join(command)
            command = []
    if command:
        yield first + len(lines) - len(command), "\n".join(command)


def run(command: Command) -> None:
    """Run a command without input, in the environment ``.venv`` where the README has told to activate it.

    Raises:
        SystemExit: it fails.
    """
    environment = dict(os.environ)
    if command.activated:
        environment["VIRTUAL_ENV"] = str(ROOT / ".venv")
        environment["PATH"] = os.pathsep.join((str(ROOT / ".venv" / "bin"), os.environ.get("PATH", os.defpath)))
    print(f"+ {command.text}", flush=True)
    began = time.monotonic()
    try:
        code = subprocess.run(command.arguments, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL).returncode
        code = 128 - code if code < 0 else code  # ended by a signal: the number that a shell gives
    except OSError as fault:  # no .venv yet
        sys.exit(f"README.md line {command.line} cannot run ({fault}): {command.text}")
    seconds = time.monotonic() - began
    print(f"(exit {code} after {seconds:.0f} s)", flush=True)
    if code:
        sys.exit(f"README.md line {command.line} failed with exit {code}: {command.text}")


def main() -> None:
    """Run the commands, or list them."""
    parser = argparse.ArgumentParser(description="Run what README.md tells a reader to type.")
    parser.add_argument("--list", action="store_true", help="say what would run and what would not, and run nothing")
    options = parser.parse_args()
    for command in list(read_commands(README.read_text(encoding="utf-8"))):
        if command.reason is not None:
            print(f"- not run ({command.reason}): {command.text}", flush=True)
        elif options.list:
            print(f"+ {command.text}")
        else:
            run(command)


if __name__ == "__main__":
    main()
