"""The one way a command reads its arguments, shows progress, counts compilations, and fails."""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any, NoReturn, Protocol, TypeVar

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
from llava_cot_jax.paths import as_path, cache_folder

T = TypeVar("T")

UNKNOWN = re.compile(
    r"unrecognized arguments: --([\w.-]+)|[Oo]ption '([\w.]+)' is not accepted"
    r"|Group '([\w.]+)' does not accept option '([\w.]+)'"
)
"""How jsonargparse says that it does not know an argument."""


GOOGLE_PCI_VENDOR = "0x1ae0"
"""By which jax, too, finds the TPUs of a machine."""

LIBTPU_WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
}
"""What libtpu asks the environment, and else the network, before it finds that there is no TPU."""


class Parser(jsonargparse.ArgumentParser):
    """Arguments with checked types, ``--config FILE.yaml`` and dotted overrides; a mistake is a ``UserError``."""

    def __init__(self, module: str, description: str) -> None:
        super().__init__(prog=f"python -m llava_cot_jax.{module}", description=description, exit_on_error=False)
        self.add_argument("--config", action="config", help="a YAML file of these arguments; later arguments win")

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """As jsonargparse does it, which lets a file through that is no text."""
        try:
            return super().parse_args(*args, **kwargs)
        except UnicodeDecodeError as fault:
            raise UserError(f"a configuration file is no text in UTF-8: {fault}") from None

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = " ".join(message.split()).replace("Parser key", "argument")
        raise UserError(text + self._nearest(text)) from None

    def _nearest(self, message: str) -> str:
        """The known argument that is most like the one that ``message`` calls unknown."""
        if not (unknown := UNKNOWN.search(message)):
            return ""
        known = [option.removeprefix("--") for option in self._option_string_actions if option.startswith("--")]
        near = difflib.get_close_matches(".".join(filter(None, unknown.groups())), known, n=1)
        return f"; did you mean {near[0]}?" if near else ""


def configurations_in(arguments: Sequence[str]) -> list[Path]:
    """The files that ``--config`` names among the arguments of a command."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", default=[])
    try:
        known, _ = parser.parse_known_args(list(arguments))
    except SystemExit:  # it lacks its value: the command's own parser will say so
        return []
    return [as_path(name) for name in known.config]


def run(main: Callable[[], None], leave: Callable[[int], object] = sys.exit) -> None:
    """Run a command: a user's mistake ends it with one line and exit code 2, Ctrl-C with 130.

    Args:
        main: the command.
        leave: how to end after Ctrl-C; ``os._exit`` waits for no computation that is under way.
    """
    _quiet_libtpu()
    try:
        main()
    except UserError as mistake:
        print("error:", " ".join(str(mistake).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        leave(130)
    except BrokenPipeError:  # whoever read the output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def keep_compilations() -> None:
    """Keep what XLA compiles for the next process, in the user's cache folder.

    ``JAX_COMPILATION_CACHE_DIR`` names another place, a bucket too; ``JAX_ENABLE_COMPILATION_CACHE=false``
    keeps nothing.
    """
    import jax

    place = os.environ.get("JAX_COMPILATION_CACHE_DIR") or cache_folder() / "compilations"
    jax.config.update("jax_compilation_cache_dir", str(as_path(place)))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)  # by default a second: small models gain


def heard(function: Callable[[], T]) -> T:
    """``function``'s result. It runs in a thread, so that Ctrl-C is heard even while something is compiled in it."""
    outcome: Future[T] = Future()

    def work() -> None:
        try:
            outcome.set_result(function())
        except BaseException as fault:
            outcome.set_exception(fault)

    Thread(target=work, daemon=True).start()
    return outcome.result()


def _quiet_libtpu() -> None:
    """Keep libtpu from printing what it misses where it is installed on a machine without a TPU."""
    vendors = (path.read_text().strip() for path in Path("/sys/bus/pci/devices").glob("*/vendor"))
    if GOOGLE_PCI_VENDOR not in vendors:
        for name, value in LIBTPU_WITHOUT_TPU.items():
            os.environ.setdefault(name, value)


class RateColumn(ProgressColumn):
    """Things a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.{0 if speed >= 10 else 1}f}/s", style="progress.data.speed")


class OnProgress(Protocol):
    """Moves a bar."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """How many are done, how many there are in all, and a few words on how it goes."""


@contextmanager
def progress_bar(label: str, unit: str = "bytes", every: int | None = None) -> Iterator[OnProgress]:
    """A bar with rate and time left on stderr, where that is a terminal. What is printed meanwhile stands above it.

    Args:
        unit: "bytes", or what is counted, as in "rows".
        every: where stderr is no terminal, print a line after so many, and after the last.
    """
    counts: tuple[ProgressColumn, ...] = (DownloadColumn(), TransferSpeedColumn())
    if unit != "bytes":
        counts = (MofNCompleteColumn(), TextColumn(unit), RateColumn())
    columns = (TextColumn(label), BarColumn(), *counts, TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, note="")

        def move(done: int, total: int, note: str = "") -> None:
            progress.update(task, completed=done, total=total, note=note)
            if every and progress.disable and (done % every == 0 or done == total):
                print(f"{label} {done}/{total} {unit}: {note}", flush=True)

        yield move


@contextmanager
def no_bar(label: str, unit: str = "bytes", every: int | None = None) -> Iterator[OnProgress]:
    """As ``progress_bar``, for a process that shows nothing."""
    yield lambda done, total, note="": None


@contextmanager
def status(what: str) -> Iterator[None]:
    """Says on stderr what is being done: turning while it is, where that is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        print(what, file=sys.stderr, flush=True)
        yield
        return
    with console.status(what):
        yield


class CompilationCounter:
    """Counts the programs that XLA compiles from its making on."""

    def __init__(self) -> None:
        import jax

        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._see)

    def _see(self, event: str, duration_secs: float, **_: str | int) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"
