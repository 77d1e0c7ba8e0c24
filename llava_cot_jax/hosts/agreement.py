"""Comparison of what the processes of a run have read, each for itself."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

_SHOWN = 3
"""Number of fields, and of processes of a value, that a message names."""

_LONGEST_VALUE = 80

_MISSING = "missing"
"""Value of a field that a process does not have."""


def describe_differences(fields: Mapping[int, Mapping[str, str]], hosts: Mapping[int, str]) -> str:
    """Return which fields differ between processes, with their values, in one sentence; nothing if none does.

    Args:
        fields: Name and value of each field, by process.
        hosts: Names of the processes' machines.
    """
    names = dict.fromkeys(name for found in fields.values() for name in found)
    differences = []
    for name in names:
        by_value = defaultdict(list)
        for process in sorted(fields):
            by_value[fields[process].get(name, _MISSING)].append(process)
        if len(by_value) > 1:
            values = (f"{_shortened(value)} in {name_processes(of, hosts)}" for value, of in by_value.items())
            differences.append(f"{name} is {_joined(list(values))}")
    if not differences:
        return ""
    rest = len(differences) - _SHOWN
    more = f"; and {rest} more" if rest > 0 else ""
    return f"the processes of the run differ: {'; '.join(differences[:_SHOWN])}{more}. Give all of them the same"


def name_processes(processes: Iterable[int], hosts: Mapping[int, str]) -> str:
    """Return "process 1 (its host)" or "processes 1, 2 and 3", without hosts that are not known."""
    named = [f"{process} ({hosts[process]})" if process in hosts else str(process) for process in processes]
    shown = named if len(named) <= _SHOWN + 1 else [*named[:_SHOWN], f"{len(named) - _SHOWN} more"]
    return f"{'process' if len(named) == 1 else 'processes'} {_joined(shown)}"


def _joined(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]


def _shortened(value: str) -> str:
    return value if len(value) <= _LONGEST_VALUE else f"{value[:_LONGEST_VALUE]}..."
