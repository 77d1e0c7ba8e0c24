"""Collectives of a compiled program, read from its text: kind, mesh axis, bytes, and number of executions."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from llava_cot_jax.rounding import ceil_div

COLLECTIVE_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(COLLECTIVE_KINDS)})(-start)?\((.*?)\), ")
_BETWEEN_SLICES = re.compile(
    r' = \((.*?), .* send\(.*_xla_megascale_target="(.*?)".*_xla_megascale_transfer_type="(\w+)"'
)
_TRANSFERS = {kind.upper().replace("-", "_"): kind for kind in COLLECTIVE_KINDS} | {"ONE_TO_ONE": "collective-permute"}
_WHILE = re.compile(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|async_computation|branch_computations)=\{?((?:%?[\w.-]+(?:, )?)+)\}?")
_ARRAY = re.compile(r"([a-z]+\d+)\[([\d,]*)\]")
_CONSTANT = re.compile(r"%?([\w.-]+) = [su]\d+\[\]\S* constant\((\d+)\)")
_COMPARISON = re.compile(r"ROOT .* compare\(%?([\w.-]+), %?([\w.-]+)\), direction=LT")
_NAMED = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+))?")
_SAME = re.compile(r"channel_id=\d+|replica_groups=\S+|source_target_pairs=\S+|op_name=\S+")
_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_PLACE = re.compile(r"get-tuple-element\(.*\), index=(\d+)")
_RESULTS = re.compile(r" tuple\((.*?)\)(?:,|$)")
_ADDITION = re.compile(r" add\(.*, %?([\w.-]+)\)")
_BITS = re.compile(r"\d+$")


@dataclass(frozen=True)
class Collective:
    """A collective operation of a program.

    Attributes:
        kind: One of ``COLLECTIVE_KINDS``.
        axes: Mesh axes along which devices take part, joined by "+"; "" where no devices differ.
        result_bytes: Bytes of the result on a device.
        sent_bytes: Bytes that a device sends in each execution. It receives as many.
        executions: Number of executions in a run of the program.
        op_name: Name of the operation of the model that it comes from, as the program has it.
    """

    kind: str
    axes: str
    result_bytes: int
    sent_bytes: float
    executions: int
    op_name: str


def find_collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """Find the collectives of a compiled program and the transfers between slices, with their executions in loops.

    A loop whose trip count depends on data, as in a search, counts as one execution.

    Args:
        text: Text of the program, as ``compiled.as_text()`` returns it.
        mesh: Number of devices along each mesh axis, the slowest-varying axis of the program's devices first.
    """
    computations, entry = _computations(text)
    times = _execution_counts(computations, entry)
    found: dict[str, Collective] = {}
    for name, lines in computations.items():
        for line in lines if times.get(name) else ():
            if transfer := _BETWEEN_SLICES.search(line):
                found[line] = _transfer(transfer, line, times[name])
            if not (match := _COLLECTIVE.search(line)):
                continue
            # A pipelined collective is written once for each of its steps, always with the same channel.
            key = str(_SAME.findall(line) + _ARRAY.findall(match[1])) if "channel_id=" in line else line
            if key not in found:
                scattered = "all-reduce-scatter" in name or "reduce-scatter" in line.split(" = ")[0]
                found[key] = _collective(match, line, mesh, times[name], scattered)
    return list(found.values())


def sent_by_axis(found: Iterable[Collective]) -> dict[str, float]:
    """Bytes that a device sends in a run of the program, by mesh axis."""
    sums: dict[str, float] = {}
    for each in found:
        sums[each.axes] = sums.get(each.axes, 0.0) + each.sent_bytes * each.executions
    return sums


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Return the instructions of each computation by its name, and the name of the entry computation."""
    found: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            lines = found.setdefault(start[2], [])
            entry = start[2] if start[1] else entry
        elif line.startswith(" "):
            lines.append(line)
    return found, entry


def _execution_counts(computations: Mapping[str, list[str]], entry: str) -> dict[str, int]:
    """Return how often each computation is executed in a run of the program."""
    times = {entry: 1}
    waiting = [entry]
    while waiting:
        name = waiting.pop()
        for called, count in _calls(computations, name):
            if times.get(called, 0) < times[name] * count:
                times[called] = times[name] * count
                waiting.append(called)
    return times


def _calls(computations: Mapping[str, list[str]], name: str) -> Iterator[tuple[str, int]]:
    for line in computations.get(name, ()):
        if loop := _WHILE.search(line):
            known = _KNOWN.search(line)
            trips = int(known[1]) if known else _trip_count(computations[loop[1]], computations[loop[2]])
            yield loop[2], trips or 1
        for group in _CALLED.findall(line):
            for called in re.split(r",\s*", group):
                yield called.lstrip("%"), 1


def _trip_count(condition: list[str], body: list[str]) -> int | None:
    """Return the trip count of a loop that counts from 0 up to a constant, by 1, or by more where XLA unrolled it.

    Return None for any other loop.
    """
    constants = {match[1]: int(match[2]) for line in condition + body if (match := _CONSTANT.search(line))}
    compared = next((match for line in condition if (match := _COMPARISON.search(line))), None)
    if compared is None or compared[2] not in constants:
        return None
    place = next((_PLACE.search(line) for line in condition if line.startswith(f"  %{compared[1]} = ")), None)
    after = next((_RESULTS.search(line) for line in body if line.startswith("  ROOT")), None)
    by = 1
    if place and after:
        counter = after[1].split(", ")[int(place[1])].strip()
        counting = next((_ADDITION.search(line) for line in body if line.startswith(f"  {counter} = ")), None)
        by = constants.get(counting[1], 1) if counting else 1
    return ceil_div(constants[compared[2]], by)


def _collective(match: re.Match[str], line: str, mesh: Mapping[str, int], times: int, scattered: bool) -> Collective:
    kind = "reduce-scatter" if match[2] == "all-reduce" and scattered else match[2]
    arrays = [_bytes(*array) for array in _ARRAY.findall(match[1])]
    # The results of a start are its operands, its results, and numbers of its own.
    result = max(arrays) if match[3] else sum(arrays)
    groups = _replica_groups(line, math.prod(mesh.values()))
    size = groups.shape[1]
    share = (size - 1) / size if size > 1 else 0.0
    if kind == "collective-permute":
        moving = groups[groups[:, 0] != groups[:, 1]]
        axes, sent = _axes(moving, mesh), result * len(moving) / math.prod(mesh.values())
    else:
        # What is reduced and scattered is written as an all-reduce of the whole.
        whole = result * size if match[2] == "reduce-scatter" else result
        axes, sent = _axes(groups, mesh), whole * share * (2 if kind == "all-reduce" else 1)
    return Collective(kind, axes, result, sent, times, _op_name(line))


def _transfer(match: re.Match[str], line: str, times: int) -> Collective:
    """Return a transfer between slices, along the mesh axis ``data``, as a collective."""
    kind = _TRANSFERS[match[3]]
    given = sum(_bytes(*array) for array in _ARRAY.findall(match[1]))
    slices = len(re.findall(r"\d+", match[2].split("x")[0]))  # as {1,2}x{0:3}: two, of four chips
    share = (slices - 1) / slices
    sent = {"all-reduce": 2 * share, "all-gather": slices - 1.0, "collective-permute": 1.0}.get(kind, share) * given
    result = {"all-gather": given * slices, "reduce-scatter": given // slices}.get(kind, given)
    return Collective(kind, "data", result, sent, times, _op_name(line))


def _op_name(line: str) -> str:
    found = re.search(r'op_name="([^"]*)"', line)
    return found[1] if found else ""


def _bytes(dtype: str, shape: str) -> int:
    bits = _BITS.search(dtype)
    assert bits is not None
    return math.prod(int(size) for size in shape.split(",") if size) * max(int(bits[0]), 8) // 8


def _replica_groups(line: str, devices: int) -> np.ndarray:
    """Return the groups of devices of a collective, int [groups, size]; the pairs of a permutation, int [pairs, 2]."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line + "}"):
        return np.array(re.findall(r"\{(\d+),(\d+)", pairs[0]), int)
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        ids = np.arange(devices).reshape([int(n) for n in iota[3].split(",")])
        if iota[4]:
            ids = ids.transpose([int(n) for n in iota[4].split(",")])
        return ids.reshape(int(iota[1]), int(iota[2]))
    if named := re.search(r"replica_groups=mesh\[(.*?)\] ?\{(.*?)\}", line):
        return _named_groups(named[1], named[2])
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", line)
    if listed is None:
        return np.arange(devices)[None]
    return np.array([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])])


def _named_groups(mesh: str, along: str) -> np.ndarray:
    """Return the groups of devices that a mesh ``'a'=2,'b'=4`` and axes of it, such as ``'b'``, stand for.

    An axis may be a part of a mesh axis: ``'b':(2)2`` is the second factor of ``b`` split into 2 x 2 x the rest.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    taken = {name: (int(before or 1), int(size or sizes[name])) for name, before, size in _NAMED.findall(along)}
    shape: list[int] = []
    moved: list[int] = []
    for name, size in sizes.items():
        before, part = taken.get(name, (size, 1))
        moved.append(len(shape) + 1)
        shape += [before, part, size // (before * part)]
    ids = np.arange(math.prod(sizes.values())).reshape(shape)
    return np.moveaxis(ids, moved, range(-len(moved), 0)).reshape(-1, math.prod(part for _, part in taken.values()))


def _axes(groups: np.ndarray, mesh: Mapping[str, int]) -> str:
    """Return the mesh axes along which the devices of a group differ."""
    places = np.stack(np.unravel_index(groups, tuple(mesh.values())))  # [axes, groups, size]
    varying = (places != places[:, :, :1]).any(axis=(1, 2))
    return "+".join(axis for axis, varies in zip(mesh, varying, strict=True) if varies)
