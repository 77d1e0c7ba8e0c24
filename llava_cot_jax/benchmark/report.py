"""The whole benchmark, and how it is told."""

import datetime
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from llava_cot_jax import cli
from llava_cot_jax.benchmark.baseline import Baseline
from llava_cot_jax.benchmark.measure import Rates, peak_memory, rates
from llava_cot_jax.benchmark.parts import Bench, Part
from llava_cot_jax.benchmark.workload import Workload
from llava_cot_jax.costs.counts import parameter_counts
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.search.strategies import Greedy, Judge, LogProbability, MajorityVote, StageBeam, Strategy


def measure(model: Mllama, work: Workload, runs: int, console: Console, *, baseline: bool) -> dict[str, Any]:
    """Time every part and every search, tell them to a person, and give them back for a machine to read.

    Args:
        model: any.
        work: what it works on.
        runs: of each timing.
        console: where a person reads.
        baseline: whether to time transformers too.
    """
    console.print(_head(model, work))
    bench = Bench(model, work, runs)
    found = rates(model.dtype)
    table = _table(found)
    report: dict[str, Any] = {
        "date": str(datetime.date.today()),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "transformers")},
        "device": jax.devices()[0].device_kind,
        "workload": asdict(work),
        "rates": [asdict(rate) for rate in found],
        "parts": [],
    }
    wholes = (bench.whole(name, strategy) for name, strategy in _searches(work))
    for parts in (bench.parts(), wholes):
        for part in parts:
            report["parts"].append(asdict(part))
            with cli.status(f"{part.name}: {part.timing.median:.3f} s"):
                _add(table, part, found)
    report["recompilations"] = sum(part["timing"]["compiled_again"] for part in report["parts"])
    report["peak_memory"] = peak_memory()
    console.print(table)
    memory = report["peak_memory"]
    console.print(
        f"compiled again when run again: {report['recompilations']}; "
        f"peak memory: {'not told by this device' if memory is None else f'{memory / 1e9:.1f} GB'}"
    )
    report["judge_share"] = _judge_shares(report["parts"], work)
    console.print("the judge's share of a search:", ", ".join(f"{n} {s:.0%}" for n, s in report["judge_share"].items()))
    if baseline:
        beside = _against(Baseline(model, work, bench.request), report, work, console)
        report["baseline"] = [asdict(row) for row in beside]
    return report


def _head(model: Mllama, work: Workload) -> str:
    count = sum(parameter_counts(model.config).values())
    device, quantized = jax.devices()[0], ", text in int8" if model.is_quantized else ""
    return (
        f"{datetime.date.today()}; jax {version('jax')}; {jax.device_count()} x {device.device_kind} "
        f"({platform.machine()}); {count / 1e6:,.1f}M parameters, {model.dtype}{quantized}\n{work}"
    )


def _searches(work: Workload) -> list[tuple[str, Strategy]]:
    """Every strategy at every number of candidates."""
    whole, most = sum(work.stages), max(work.candidates)
    reasons = Judge("rationale", both_orders=False, reason_tokens=work.reason, check_tokens=work.check)
    found: list[tuple[str, Strategy]] = [
        ("greedy", Greedy(whole)),
        (f"majority vote, N = {most}", MajorityVote(most, budget=whole)),
    ]
    for count in work.candidates:
        for name, scorer in (("likelihood", LogProbability()), ("token", Judge()), ("rationale", reasons)):
            if count > 1 or name == "likelihood":
                stages = tuple(f"S{i}" for i in range(len(work.stages)))
                found.append(
                    (f"stage beam, {name}, N = {count}", StageBeam(count, scorer, budget=work.stages, stages=stages))
                )
    return found


def _table(found: list[Rates]) -> Table:
    table = Table(title="median of the runs, and the share of each floor that it reached")
    for name in ("part", "s", "least to most", "compiled, and kept", "a second"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for rate in found:
        table.add_column(
            f"{rate.source}: {rate.flops / 1e12:.3g} TFLOP/s, {rate.bytes / 1e9:.3g} GB/s", justify="right"
        )
    table.add_column("bare products", justify="right")
    return table


def _add(table: Table, part: Part, found: list[Rates]) -> None:
    t = part.timing
    floors = [f"{rate.floor(part.flops, part.bytes) / t.median:.0%}" for rate in found]
    bare = "" if part.bare is None else f"{part.bare / t.median:.0%}"
    speed = f"{part.count / t.median:.3g} {part.unit}s"
    if part.unit == "step":
        speed += f", {part.rows * part.count / t.median:.3g} tokens"
    table.add_row(
        part.name,
        f"{t.median:.3f}",
        f"{t.least:.3f} to {t.most:.3f}",
        f"{t.cold:.1f} s, {t.warm:.1f} s",
        speed,
        *floors,
        bare,
    )


def _judge_shares(parts: list[dict[str, Any]], work: Workload) -> dict[str, float]:
    """Of the time of each judged search, what the same search without a judge does not take."""
    seconds = {part["name"]: part["timing"]["median"] for part in parts}
    return {
        f"{verdict}, N = {count}": 1
        - seconds[f"stage beam, likelihood, N = {count}"] / seconds[f"stage beam, {verdict}, N = {count}"]
        for count in work.candidates
        if count > 1
        for verdict in ("token", "rationale")
    }


@dataclass(frozen=True)
class Ratio:
    """A way of transformers beside ours.

    Attributes:
        way: which.
        candidates: N.
        seconds: transformers'.
        calls: of ``generate``.
        ours: seconds of our search of the same name, by its name.
    """

    way: str
    candidates: int
    seconds: float
    calls: int
    ours: dict[str, float]


def _against(baseline: Baseline, report: dict[str, Any], work: Workload, console: Console) -> list[Ratio]:
    """Time transformers at every N above 1."""
    off, largest = baseline.parity()
    console.print(f"logits after the prompt differ from transformers' by at most {off:.2g} of {largest:.3g}")
    seconds = {part["name"]: part["timing"]["median"] for part in report["parts"]}
    rows = []
    for count in (n for n in work.candidates if n > 1):
        for way, run, names in (
            ("one call after another", baseline.sequential, ("rationale", "token")),
            ("batched sampling, no judge", baseline.batched, ("likelihood",)),
        ):
            with cli.status(f"transformers, {way}, N = {count}"):
                took, calls = run(count)
            ours = {name: seconds[f"stage beam, {name}, N = {count}"] for name in names}
            rows.append(Ratio(way, count, took, calls, ours))
            beside = ", ".join(
                f"{took / s:.1f} times as long as ours by {name} ({s:.1f} s)" for name, s in ours.items()
            )
            console.print(f"transformers, {way}, N = {count}: {took:.1f} s in {calls} calls: {beside}")
    return rows
