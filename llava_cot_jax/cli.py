"""Reading of options, display of progress, counting of compilations, and report of mistakes, for all commands."""

import argparse
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any, Literal, NoReturn, TypeVar

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
from rich.table import Column
from rich.text import Text

import llava_cot_jax
from llava_cot_jax.errors import TransientError, UserError
from llava_cot_jax.files import cache_folder, usable_cache
from llava_cot_jax.interruption import EXIT_CODE, command_running
from llava_cot_jax.memory_errors import ADVICE, describe_exhausted_memory
from llava_cot_jax.option_errors import (
    UnknownOption,
    configured_options,
    did_you_mean,
    in_words,
    parse_configuration,
    read_configuration,
    suggestion,
)
from llava_cot_jax.output import drop_output, is_full_disk, prepare_streams, run_to_the_last_output
from llava_cot_jax.paths import as_path
from llava_cot_jax.progress import ProgressUpdate
from llava_cot_jax.tpu_chips import count_tpu_chips

COMMANDS = {
    "generate": "Answer questions about images, with or without a search.",
    "evaluate": "Measure accuracy on questions whose right answers are known.",
    "serve": "Answer requests to OpenAI's API for chat completions.",
    "rollout": "Give a search's candidates values: how often answers that go on from each are right.",
    "train": "Fine-tune Llama-3.2-Vision on staged answers.",
    "annotate": "Make training data: staged answers to questions whose standard answers are known.",
    "prepare": "Prepare LLaVA-CoT-100k for training, or show prepared rows.",
    "convert": "Write a checkpoint, or a training run, as a new checkpoint.",
    "plan": "Predict whether a training run or a search fits a TPU slice, and how long it takes.",
    "bench": "Measure compiled decoding and search against their roofline.",
}
"""The name of each command, which is that of its module, and what it does."""

_PACKAGE = "llava_cot_jax"

_ADVICE = "Free some memory, or take a machine with more."

_Result = TypeVar("_Result")

_OPTION = re.compile(r"--[A-Za-z][\w.-]*\+?")  # jsonargparse's --name+ appends to a list

_BOOLEANS = {"true", "false", "yes", "no", "on", "off"}

_UNKNOWN_OPTION = re.compile(r"unrecognized arguments: --([\w.-]+)")
"""Message by which jsonargparse reports an option that it does not know."""

CONFIGURATIONS = Path(__file__).with_name("configs")
"""Folder of the configuration files that come with the package."""

_BAR_WIDTH, _NARROW_BAR_WIDTH, _WIDE_SCREEN = 40, 10, 120
"""Columns of a progress bar, of one on a screen that is not wide, and of a wide screen."""

_LIBTPU_WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
}
"""Environment variables that libtpu would ask the network for before it finds that there is no TPU."""


class Parser(jsonargparse.ArgumentParser):
    """Options with checked types, ``--config FILE.yaml`` and dotted overrides. A mistake is a ``UserError``.

    Options are named with underscores, and may be typed with hyphens. A boolean option may be given alone, which means
    true, or with ``true`` or ``false``.

    Args:
        command: The command's name in ``COMMANDS``.
        renamed: Present names of options by their former names, for the error that an old one meets.
    """

    def __init__(self, command: str, renamed: Mapping[str, str] | None = None) -> None:
        super().__init__(
            prog=program_name(command),
            description=COMMANDS[command],
            version=llava_cot_jax.__version__,
            exit_on_error=False,
            allow_abbrev=False,
        )
        self._option_string_actions["--version"].help = "Print the version of the package, and exit."
        self._renamed = renamed or {}
        self._sources: dict[str, str] = {}  # configuration files that set options, by the options' names
        self.add_argument("--config", action="config", help="YAML file of these options. Later options override it.")
        self._option_string_actions["--print_config"].help = (
            "Print the configuration that all other options give, and exit. Flags, separated by commas: skip_default "
            "leaves out what equals its default, skip_unset what is not set."
        )

    def ignore(self, add_options: Callable[[jsonargparse.ArgumentParser], None]) -> None:
        """Accept the options that a function adds to a parser, without effect, and hidden from the help.

        Those that this parser has already keep their meaning.
        """
        other = jsonargparse.ArgumentParser(add_help=False)
        add_options(other)
        for option in other._actions:
            if not self._option_string_actions.keys() & set(option.option_strings):
                option.default = option.help = argparse.SUPPRESS
                self._add_action(option)

    def given(self, options: jsonargparse.Namespace) -> list[str]:
        """Return the names of the options whose values are not their defaults."""
        defaults = vars(self.get_defaults().as_flat())
        return [name for name, value in vars(options.as_flat()).items() if value != defaults.get(name)]

    def parse_args(self, args: Iterable[str] | None = None, *more: Any, **kwargs: Any) -> Any:
        """Parse ``args``, or the arguments that the process was started with.

        Raises:
            UserError: An unknown option, a wrong value, or a configuration file that cannot be read.
        """
        arguments = self._normalized(sys.argv[1:] if args is None else list(args))
        return super().parse_args(self._with_checked_files(arguments), *more, **kwargs)

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Return the text that ``--help`` prints."""
        for action in self._actions:
            if _is_boolean(action):
                action.nargs = "?"  # shown as [{true,false}]
        return super().format_help(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a ``UserError`` of one line, with the nearest known option where an option is unknown."""
        if ex is not None and isinstance(ex.__cause__, UserError):  # of a mapping that was typed
            raise UserError(str(ex.__cause__)) from None
        text = " ".join(message.split())
        unknown = _UNKNOWN_OPTION.search(text)
        end = self._suggestion(unknown[1]) if unknown else ""
        raise UserError(in_words(text, self._by_name(), self._sources) + end) from None

    def _by_name(self) -> dict[str, argparse.Action]:
        """Return the options by their names, without hyphens before them."""
        options = self._option_string_actions.items()
        return {name.removeprefix("--"): action for name, action in options if name.startswith("--")}

    def _with_checked_files(self, arguments: Sequence[str]) -> list[str]:
        """Return the arguments with the paths of their configuration files, whose contents are checked.

        Raises:
            UserError: A file cannot be read, or sets an option that there is not.
        """
        actions, checked = self._by_name(), list(arguments)
        self._sources = {}
        for i, argument in enumerate(arguments):
            if argument == "--":
                break
            typed, equals, value = argument.partition("=")
            name = typed.removeprefix("--")
            is_group = any(option.startswith(f"{name}.") for option in actions)
            if not typed.startswith("--") or name not in actions or not (name == "config" or is_group):
                self._sources.pop(name, None)
                continue
            place = i if equals else i + 1
            value = value if equals else "".join(arguments[place : place + 1])
            if not value or (not equals and value.startswith("--")):  # the value is missing
                continue
            if value.lstrip().startswith("{"):
                content, source = parse_configuration(value, typed), typed
            else:
                path = find_configuration(value)
                content, source = read_configuration(path), str(path)
                checked[place] = f"{typed}={path}" if equals else str(path)
            group = "" if name == "config" else name
            try:
                self._sources |= dict.fromkeys(configured_options(content, source, actions, group), source)
            except UnknownOption as unknown:
                raise UserError(f"{source}: there is no option {unknown}{self._suggestion(str(unknown))}") from None
        return checked

    def _normalized(self, arguments: Sequence[str]) -> list[str]:
        """Return the arguments with known options spelled by underscores, and boolean options with their value."""
        normalized: list[str] = []
        for i, argument in enumerate(arguments):
            if argument == "--":
                return [*normalized, *arguments[i:]]
            typed, equals, value = argument.partition("=")
            option = typed.replace("-", "_").replace("__", "--", 1)
            action = self._option_string_actions.get(option) if _OPTION.fullmatch(typed) else None
            if action is None:
                normalized.append(argument)
            elif _is_boolean(action) and not equals and "".join(arguments[i + 1 : i + 2]).lower() not in _BOOLEANS:
                normalized.append(f"{option}=true")
            else:
                normalized.append(option + equals + value)
        return normalized

    def _suggestion(self, name: str) -> str:
        """Return the end of an error message about the unknown option ``name``: its present name, or one like it."""
        if (present := self._renamed.get(name.replace("-", "_"))) is not None:
            return f"; it is called {present} now"
        return suggestion(name, self._by_name())


def _is_boolean(action: argparse.Action) -> bool:
    """Whether an option takes true or false."""
    return getattr(action, "_typehint", None) is bool


def program_name(command: str = "") -> str:
    """Return how the user started the program, or one of its commands, for the usage line."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = spec.name if spec else ""
    if command and module == f"{_PACKAGE}.{command}":
        return f"python -m {module}"
    program = f"python -m {_PACKAGE}" if module == f"{_PACKAGE}.__main__" else "llava-cot"
    return f"{program} {command}".rstrip()


def configurations_in(arguments: Sequence[str]) -> list[Path]:
    """Return the files that ``--config`` names among the arguments of a command."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="append", default=[])
    try:
        known, _ = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError:  # --config lacks its value, which the command's own parser reports
        return []
    return [find_configuration(name) for name in known.config if not name.lstrip().startswith("{")]


def find_configuration(name: str) -> Path:
    """Return the path of a configuration file: the one that is named, or else that of the package's of this name.

    Raises:
        UserError: There is no such file.
    """
    path = as_path(name)
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a configuration file")
    ours = {file.name for file in CONFIGURATIONS.glob("*.yaml")}
    if Path(name).name in ours and Path(name).parent in (Path(), Path(CONFIGURATIONS.name)):
        return CONFIGURATIONS / Path(name).name
    near = did_you_mean(Path(name).name, ours)
    raise UserError(f"there is no configuration file {path}, nor one of this name in the package{near}")


def run(main: Callable[[], None], leave: Callable[[int], object] = sys.exit, *, command: str = "") -> None:
    """Run a command. A user's mistake or exhausted memory ends it with one line and exit code 2, Ctrl-C with 130.

    Args:
        main: The command.
        leave: Function that ends the process after Ctrl-C, a mistake, or an error of what is written. With
            ``os._exit`` it does not wait for computations or threads that are under way.
        command: The command's name in ``COMMANDS``, by which the error of exhausted memory gives advice.
    """
    with command_running():
        _quiet_libtpu()
        _show_warnings()
        prepare_streams()
        try:
            run_to_the_last_output(main)
        except BrokenPipeError as fault:
            leave(report(fault))
        except (KeyboardInterrupt, UserError) as fault:
            with suppress(OSError, ValueError):  # the reader of the output may have ended
                sys.stdout.flush()
            leave(report(fault))
        except Exception as fault:
            if is_full_disk(fault):
                leave(report(fault))
                return
            if not describe_exhausted_memory(fault) and not _unusable_devices(fault):
                raise
            leave(report(fault, command))


def report(fault: BaseException, command: str = "") -> int:
    """Print on stderr what ended a command, and return the exit code: one line, unless it is a fault of the program.

    Args:
        fault: Exception that ended the command.
        command: Name of the command, for the advice to a user for whom memory does not suffice.
    """
    match _unusable_devices(fault) or fault:
        case UserError() as mistake:
            print("error:", " ".join(str(mistake).split()), file=sys.stderr, flush=True)
            return mistake.exit_code
        case KeyboardInterrupt():
            print("interrupted", file=sys.stderr, flush=True)
            return EXIT_CODE
        case BrokenPipeError():  # the reader of the output ended
            drop_output()
        case OSError() as full if is_full_disk(full):
            drop_output()
            place = full.filename or "what the command prints, or for one of its files"
            print(f"error: no space left for {place}: free some on that disk", file=sys.stderr, flush=True)
            return 2
        case _ if exhausted := describe_exhausted_memory(fault):
            print(f"error: {exhausted}. {ADVICE.get(command, _ADVICE)}", file=sys.stderr, flush=True)
            return 2
        case _:
            traceback.print_exception(fault)
    return 1


def _unusable_devices(fault: BaseException) -> UserError | None:
    """Return the error of a platform that jax does not know, or whose devices it cannot use, if ``fault`` is that."""
    text = str(fault)
    if not isinstance(fault, RuntimeError) or not text.startswith("Unable to initialize backend"):
        return None
    kind = UserError if "list of known backends" in text else TransientError  # another process may hold the devices
    return kind(f"jax cannot use the devices: {text}")


def enable_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, so that the next process need not compile them again.

    ``JAX_COMPILATION_CACHE_DIR`` names another folder, on a disk or in a bucket.
    ``JAX_ENABLE_COMPILATION_CACHE=false`` turns the cache off. A folder that cannot be written turns it off too, with a
    warning.
    """
    import jax

    named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    folder = usable_cache(as_path(named) if named else cache_folder("compilations"), "compiled programs")
    if not folder:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # jax's default of one second is too long for small models.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def run_interruptible(function: Callable[[], _Result]) -> _Result:
    """Call ``function`` in a thread and return its result, so that Ctrl-C works even while it compiles a program."""
    outcome: Future[_Result] = Future()

    def work() -> None:
        try:
            outcome.set_result(function())
        except BaseException as fault:
            outcome.set_exception(fault)

    Thread(target=work, daemon=True).start()
    return outcome.result()


def _quiet_libtpu() -> None:
    """Keep libtpu quiet where it is installed on a machine without a TPU."""
    if not count_tpu_chips():
        for name, value in _LIBTPU_WITHOUT_TPU.items():
            os.environ.setdefault(name, value)


class _WarningLines(logging.Handler):
    """Print each record as a line on stderr, which may be another stream than at the start."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"warning: {record.getMessage()}", file=sys.stderr, flush=True)


def _show_warnings() -> None:
    """Print each warning that the package logs as a line on stderr, whatever handlers absl and jax install."""
    logger = logging.getLogger(_PACKAGE)
    logger.handlers, logger.propagate = [_WarningLines(logging.WARNING)], False


class _RateColumn(ProgressColumn):
    """Column of a progress bar with the number of items per second."""

    def render(self, task: Task) -> Text:
        """Return the column's text."""
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        rate = f"{speed:,.{0 if speed >= 10 else 1}f}/s" if speed >= 0.5 else f"{1 / speed:,.0f} s each"
        return Text(rate, style="progress.data.speed")


def _firm_column() -> Column:
    """Return a column of a progress bar that a narrow screen leaves whole."""
    return Column(no_wrap=True)


class _YieldingColumn(ProgressColumn):
    """Column of a progress bar with a text, of which a narrow screen shows the beginning.

    Args:
        field: Name of the task's attribute with the text.
    """

    def __init__(self, field: Literal["description", "note"]) -> None:
        super().__init__(Column())
        self._field = field

    def render(self, task: Task) -> Text:
        """Return the column's text."""
        text = task.description if self._field == "description" else task.fields["note"]
        return Text(text, no_wrap=True, overflow="ellipsis")


@contextmanager
def progress_bar(label: str, unit: str = "bytes", every: int | None = None) -> Iterator[ProgressUpdate]:
    """Show a progress bar with rate and remaining time on stderr, if that is a terminal. Other output appears above it.

    Args:
        label: Text before the bar.
        unit: Unit of what is counted, such as "rows" or "bytes".
        every: Number of items after which a line with the note is printed where stderr is no terminal. By default,
            none is printed.
    """
    counts: tuple[ProgressColumn, ...] = (
        DownloadColumn(table_column=_firm_column()),
        TransferSpeedColumn(table_column=_firm_column()),
    )
    if unit != "bytes":
        counts = (
            MofNCompleteColumn(table_column=_firm_column()),
            TextColumn(unit),
            _RateColumn(table_column=_firm_column()),
        )
    console = Console(stderr=True)
    bar = BarColumn(_BAR_WIDTH if console.width >= _WIDE_SCREEN else _NARROW_BAR_WIDTH)
    time_left = TimeRemainingColumn(table_column=_firm_column())
    columns = (_YieldingColumn("description"), bar, *counts, time_left, _YieldingColumn("note"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=None, note="")

        def update(done: int, total: int, note: str = "") -> None:
            progress.update(task, completed=done, total=total, note=note)
            if every and note and progress.disable and (done % every == 0 or done == total):
                print(f"{label} {done}/{total} {unit}: {note}", flush=True)

        yield update


@contextmanager
def no_progress_bar(label: str, unit: str = "bytes", every: int | None = None) -> Iterator[ProgressUpdate]:
    """Stand in for ``progress_bar`` in a process that shows nothing."""
    yield lambda done, total, note="": None


@contextmanager
def status(what: str) -> Iterator[None]:
    """Show on stderr what is being done: with a spinner on a terminal, and as a line elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        print(what, file=sys.stderr, flush=True)
        yield
        return
    with console.status(what):
        yield


class CompilationCounter:
    """Counts the programs that XLA compiles after the counter is made.

    Attributes:
        count: Number of programs.
    """

    def __init__(self) -> None:
        import jax

        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: str | int) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"
