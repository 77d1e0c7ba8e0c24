"""The options of ``hosts``, by which a command learns of the other processes of its run."""

import argparse
import contextlib
from collections.abc import Sequence
from typing import Any

import yaml

from llava_cot_jax import cli
from llava_cot_jax.hosts.process_group import ProcessGroup, find_group


def add_hosts_options(parser: cli.Parser) -> None:
    """Add the options that name the processes of a run to the parser of a command."""
    add = parser.add_argument_group("Several processes").add_argument
    add(
        "--hosts.coordinator",
        type=str | None,
        default=None,
        help="Address HOST:PORT of the first process. On TPU slices, and under Slurm or Open MPI, leave out all three "
        "options of hosts.",
    )
    add(
        "--hosts.count",
        type=int | None,
        default=None,
        help="Number of processes of the run. 1 runs with this process alone, whatever its environment says.",
    )
    add("--hosts.index", type=int | None, default=None, help="Index of this process, counted from 0.")


def group_in(arguments: Sequence[str]) -> ProcessGroup:
    """Return the processes that arguments name which cannot be used, so that the others hear of it, or this one."""
    coordinator, count, index = (hosts_option(arguments, name) for name in ("coordinator", "count", "index"))
    try:
        return find_group(coordinator, None if count is None else int(count), None if index is None else int(index))
    except ValueError:  # a UserError is one too
        return ProcessGroup()


def hosts_option(arguments: Sequence[str], name: str) -> str | None:
    """Return an option of ``hosts`` of arguments which cannot be used, or of the files that they name."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(f"--hosts.{name}", dest="value", default=_configured_hosts(arguments).get(f"hosts.{name}"))
    try:
        found: str | None = parser.parse_known_args(list(arguments))[0].value
    except argparse.ArgumentError:  # its value is missing
        return None
    return found


def _configured_hosts(arguments: Sequence[str]) -> dict[str, str]:
    """Return the options of hosts in the configuration files that arguments name, as far as these can be read."""
    configured: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):  # a UserError is a ValueError
        for configuration in cli.configurations_in(arguments):
            content = yaml.safe_load(configuration.read_text(encoding="utf-8"))
            group = content.pop("hosts", None) if isinstance(content, dict) else None
            if isinstance(group, dict):
                configured |= {f"hosts.{name}": value for name, value in group.items()}
    return {name: str(value) for name, value in configured.items() if value is not None}
