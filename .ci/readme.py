"""Run the commands that the README and the guides tell a reader to type: their bash and python blocks, word for word.

The README comes first, then the guides in the order of ``DOCUMENTS``. All commands run in the root of the repository.
A block that cannot run in CI has, on the line directly before its fence, the comment
``<!-- not run in CI: REASON -->``. A block that would take too long has there
``<!-- interrupted in CI at: PATTERN; PATTERN -->``: its command is started once for each pattern. When its output
matches the pattern (a regular expression, in which a point may be a line break), it gets Ctrl-C, and must then end with
exit code 130. So the training of the README begins, resumes and stops again, and the benchmark measures the parts of a
search, but no whole one. The tests have both to the end, with small models.

    python3 .ci/readme.py          run everything; the first failure ends it
    python3 .ci/readme.py --list   list the commands that would run and those that would not
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (
    "README.md",
    "configs/README.md",
    "llava_cot_jax/search/README.md",
    "launch/README.md",
    "tests/evidence/README.md",
)
"""Files with commands, in the order in which they are run: a later one uses what an earlier one has made."""

FENCE = re.compile(r"```(\w*)\s*")
MARK = re.compile(r"<!-- (not run in CI|interrupted in CI at): (.+) -->\s*")
INTERRUPTED = 130
"""Exit code of a command that Ctrl-C has ended."""
LANGUAGES = ("bash", "python")
ACTIVATE = "`source .venv/bin/activate`"
"""Text by which a document tells the reader, before its commands, to activate the environment."""


@dataclass(frozen=True)
class Command:
    """A command of a document.

    Attributes:
        place: Document and number of the command's first line, as in "README.md line 3".
        language: ``bash`` for one command, or ``python`` for the code of a whole block.
        text: Text that a reader types.
        reason: Reason why the command is not run in CI. None if it is run.
        interruptions: Patterns at which the command is interrupted, one for each start. Empty if it runs to its end.
        activated: Whether the document has told the reader to activate the environment before this command.
    """

    place: str
    language: str
    text: str
    reason: str | None
    interruptions: tuple[str, ...]
    activated: bool

    @property
    def arguments(self) -> list[str]:
        """Arguments of the process that runs the command."""
        if self.language == "python":
            return [str(ROOT / ".venv" / "bin" / "python"), "-c", self.text]
        return ["bash", "-euo", "pipefail", "-c", self.text]


def read_commands(document: str, text: str) -> Iterator[Command]:
    """Yield the commands of a document in order.

    Args:
        document: Name of the document, for messages.
        text: Its contents.

    Raises:
        SystemExit: A block has no end, or a comment precedes no block of commands.
    """
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        mark = MARK.fullmatch(lines[number - 1]) if number else None
        fence = FENCE.fullmatch(lines[number])
        if mark and not (fence and fence[1] in LANGUAGES):
            sys.exit(f"{document} line {number}: no block of {' or '.join(LANGUAGES)} follows the comment")
        number += 1
        if not fence:
            continue
        end = next((i for i in range(number, len(lines)) if lines[i].rstrip() == "```"), None)
        if end is None:
            sys.exit(f"{document} line {number}: the block has no end")
        reason = mark[2] if mark and mark[1].startswith("not") else None
        interruptions = tuple(mark[2].split("; ")) if mark and reason is None else ()
        if fence[1] == "python":
            place = f"{document} line {number + 1}"
            yield Command(place, "python", "\n".join(lines[number:end]), reason, interruptions, True)
        if fence[1] == "bash":
            activated = any(ACTIVATE in line for line in lines[:number])
            for line, command in _join(lines[number:end], number + 1):
                yield Command(f"{document} line {line}", "bash", command, reason, interruptions, activated)
        number = end + 1


def _join(lines: list[str], first: int) -> Iterator[tuple[int, str]]:
    """Yield the commands of a bash block with the numbers of their first lines. A trailing backslash joins lines."""
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
    """Run a command without input, in the environment ``.venv`` if the document has told the reader to activate it.

    Raises:
        SystemExit: The command fails, or does not end as one that is interrupted should.
    """
    environment = dict(os.environ)
    if command.activated:
        environment["VIRTUAL_ENV"] = str(ROOT / ".venv")
        environment["PATH"] = os.pathsep.join((str(ROOT / ".venv" / "bin"), os.environ.get("PATH", os.defpath)))
    for pattern in command.interruptions or (None,):
        print(f"+ {command.text}", flush=True)
        began = time.monotonic()
        try:
            if pattern is None:
                code = subprocess.run(command.arguments, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL).returncode
            else:
                code = _interrupt(command, environment, pattern)
        except OSError as fault:  # there is no .venv yet
            sys.exit(f"{command.place} cannot run ({fault}): {command.text}")
        code = 128 - code if code < 0 else code  # a shell reports a signal so
        seconds = time.monotonic() - began
        print(f"(exit {code} after {seconds:.0f} s)", flush=True)
        if pattern is not None and code != INTERRUPTED:
            sys.exit(f"{command.place} ended with exit {code}, not {INTERRUPTED} by Ctrl-C: {command.text}")
        if pattern is None and code:
            sys.exit(f"{command.place} failed with exit {code}: {command.text}")


def _interrupt(command: Command, environment: dict[str, str], pattern: str) -> int:
    """Run a command, send it Ctrl-C when its output matches a pattern, and return the code of its process.

    Raises:
        OSError: The process cannot be started.
        SystemExit: The command ends before its output matches.
    """
    process = subprocess.Popen(
        command.arguments,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,  # where stderr is a terminal, a command may show a bar in the place of lines
        text=True,
        process_group=0,  # a terminal sends Ctrl-C to all processes of a group
    )
    output, sent = "", False
    try:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            output += line
            if not sent and re.search(pattern, output, re.DOTALL):
                print("(Ctrl-C)", flush=True)
                os.killpg(process.pid, signal.SIGINT)
                sent = True
        code = process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if not sent:
        sys.exit(f"{command.place} ended with exit {code} and never printed {pattern!r}: {command.text}")
    return code


def main() -> None:
    """Run the commands, or list them."""
    parser = argparse.ArgumentParser(description="Run the commands of the README and the guides.")
    parser.add_argument("--list", action="store_true", help="list the commands and run none")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # or, as a job in the background, all would ignore it
    commands: list[Command] = []
    for document in DOCUMENTS:
        try:
            commands.extend(read_commands(document, (ROOT / document).read_text(encoding="utf-8")))
        except FileNotFoundError:
            sys.exit(f"{document} is missing")
    for command in commands:
        if command.reason is not None:
            print(f"- not run ({command.reason}): {command.text}", flush=True)
        elif options.list:
            print(f"+ {command.text}")
            for pattern in command.interruptions:
                print(f"  (interrupted at {pattern!r})")
        else:
            run(command)


if __name__ == "__main__":
    main()
