"""The one way a command reads its arguments, shows progress, counts compilations, and fails."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import jax
import jsonargparse
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from llava_cot_jax.errors import UserError


class Parser(jsonargparse.ArgumentParser):
    """Arguments with checked types, ``--config FILE.yaml`` and dotted overrides; a mistake is a ``UserError``."""

    def __init__(self, module: str, description: str) -> None:
        super().__init__(prog=f"python -m llava_cot_jax.{module}", description=description, exit_on_error=False)
        self.add_argument("--config", action="config", help="a YAML file of these arguments; later arguments win")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(" ".join(message.split()).replace("Parser key", "argument")) from None


def run(main: Callable[[], None]) -> None:
    """Run a command: a user's mistake ends it with one line and exit code 2, Ctrl-C with 130."""
    try:
        main()
    except UserError as mistake:
        print("error:", " ".join(str(mistake).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


class RateColumn(ProgressColumn):
    """Things a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f}/s", style="progress.data.speed")


@contextmanager
def progress_bar(label: str, unit: str = "bytes") -> Iterator[Callable[[int, int], None]]:
    """A bar with rate and time left on stderr, where that is a terminal.

    Args:
        unit: "bytes", or what is counted, as in "rows".

    Yields:
        A function to call with how many are done, and how many there are in all.
    """
    counts: tuple[ProgressColumn, ...] = (DownloadColumn(), TransferSpeedColumn())
    if unit != "bytes":
        counts = (MofNCompleteColumn(), TextColumn(unit), RateColumn())
    columns = (TextColumn(label), BarColumn(), *counts, TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(label)
        yield lambda done, total: progress.update(task, completed=done, total=total)


class CompilationCounter:
    """Counts the programs that XLA compiles from its making on."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._see)

    def _see(self, event: str, duration_secs: float, **_: str | int) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"
