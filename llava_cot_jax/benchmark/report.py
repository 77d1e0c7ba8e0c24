"""The whole benchmark: its measurements, the printed table, and the parts of the report as they are measured."""

import datetime
import itertools
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from llava_cot_jax import cli
from llava_cot_jax.benchmark.baseline import TransformersBaseline
from llava_cot_jax.benchmark.search_benchmark import BenchmarkRow, SearchBenchmark
from llava_cot_jax.benchmark.timing import DeviceRates, device_rates
from llava_cot_jax.benchmark.workload import Workload
from llava_cot_jax.costs.device_memory import peak_device_memory
from llava_cot_jax.costs.model_costs import parameter_counts
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.search.scorers import Judge, LogProbability, Scorer, Verifier
from llava_cot_jax.search.sentence_beam import SentenceBeam
from llava_cot_jax.search.strategies import Greedy, MajorityVote, StageBeam, Strategy


def measure(
    model: Mllama,
    work: Workload,
    runs: int,
    console: Console,
    *,
    baseline: bool,
    write: Callable[[Mapping[str, Any]], None],
) -> None:
    """Measure every component and every search, and print them as a table.

    Args:
        model: Model to measure.
        work: Lengths of a question and its search.
        runs: Number of timed runs of each measurement.
        console: Console to print on.
        baseline: Whether to measure transformers as well.
        write: Function that takes each part of the report, a JSON object, as soon as it is measured: what is measured
            with; each measurement, as "row"; the totals; and each measurement of transformers, as "baseline".
    """
    console.print(_heading(model, work))
    bench = SearchBenchmark(model, work, runs)
    rates = device_rates(model.dtype)
    table = _results_table(rates)
    write(
        {
            "date": str(datetime.date.today()),
            "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "transformers")},
            "device": jax.devices()[0].device_kind,
            "workload": asdict(work),
            "rates": [asdict(rate) for rate in rates],
        }
    )
    rows: list[BenchmarkRow] = []
    wholes = (bench.whole_search(name, strategy) for name, strategy in _searches(work))
    for row in itertools.chain(bench.component_rows(), wholes):
        rows.append(row)
        write({"row": asdict(row)})
        with cli.status(f"{row.name}: {row.timing.median:.3f} s"):
            _add_row(table, row, rates)
    recompilations, memory = sum(row.timing.recompilations for row in rows), peak_device_memory()
    seconds = {row.name: row.timing.median for row in rows}
    scorer_shares = _scorer_shares(seconds, work)
    write({"recompilations": recompilations, "peak_memory": memory, "scorer_share": scorer_shares})
    console.print(table)
    console.print(
        f"recompilations: {recompilations}; "
        f"peak memory: {'not reported by this device' if memory is None else f'{memory / 1e9:.1f} GB'}"
    )
    shares = ", ".join(f"{name} {share:.0%}" for name, share in scorer_shares.items())
    console.print("share of the scorer in the time of a search:", shares)
    if baseline:
        for measured in _measure_baseline(
            TransformersBaseline(model, work, bench.search_inputs), seconds, work, console
        ):
            write({"baseline": asdict(measured)})


def _heading(model: Mllama, work: Workload) -> str:
    count = sum(parameter_counts(model.config).values())
    device, quantized = jax.devices()[0], ", text in int8" if model.is_quantized else ""
    return (
        f"{datetime.date.today()}; jax {version('jax')}; {jax.device_count()} x {device.device_kind} "
        f"({platform.machine()}); {count / 1e6:,.1f}M parameters, {model.dtype}{quantized}\n{work}"
    )


def _searches(work: Workload) -> list[tuple[str, Strategy]]:
    """Return the searches to measure, each with its name."""
    whole, most = sum(work.stage_tokens), max(work.num_candidates)
    reasons = Judge("rationale", both_orders=False, reason_tokens=work.reason_tokens, check_tokens=work.check_tokens)
    found: list[tuple[str, Strategy]] = [
        ("greedy", Greedy(whole)),
        (f"majority vote, N = {most}", MajorityVote(most, max_new_tokens=whole)),
    ]
    for count in work.num_candidates:
        scorers: dict[str, Scorer] = {
            "likelihood": LogProbability(),
            "verifier": Verifier(),
            "token": Judge(),
            "rationale": reasons,
        }
        for name, scorer in scorers.items():
            if count > 1 or name == "likelihood":
                stages = tuple(f"S{i}" for i in range(len(work.stage_tokens)))
                found.append(
                    (
                        f"stage beam, {name}, N = {count}",
                        StageBeam(count, scorer, max_new_tokens=work.stage_tokens, stages=stages),
                    )
                )
    few = min((count for count in work.num_candidates if count > 1), default=None)
    if few is not None:
        tokens, sentences = work.sentence_tokens, work.sentences
        beam = SentenceBeam(few, max_new_tokens=whole, max_sentences=sentences, max_sentence_tokens=tokens)
        found.append((f"sentence beam, token, N = {few}", beam))
    return found


def _results_table(rates: list[DeviceRates]) -> Table:
    table = Table(title="median of the runs, and the share of each roofline that is reached")
    for name in ("component", "s", "min to max", "compiled, cold and warm", "per second"):
        table.add_column(name, justify="left" if name == "component" else "right")
    for rate in rates:
        table.add_column(
            f"{rate.source}: {rate.flops / 1e12:.3g} TFLOP/s, {rate.bytes / 1e9:.3g} GB/s", justify="right"
        )
    table.add_column("matrix products alone", justify="right")
    return table


def _add_row(table: Table, row: BenchmarkRow, rates: list[DeviceRates]) -> None:
    t = row.timing
    rooflines = [f"{rate.roofline_seconds(row.flops, row.bytes) / t.median:.0%}" for rate in rates]
    matmuls = "" if row.matmul_seconds is None else f"{row.matmul_seconds / t.median:.0%}"
    speed = f"{row.count / t.median:.3g} {row.unit}s"
    if row.unit == "step":
        speed += f", {row.sequences * row.count / t.median:.3g} tokens"
    table.add_row(
        row.name,
        f"{t.median:.3f}",
        f"{t.min:.3f} to {t.max:.3f}",
        f"{t.cold_compile:.1f} s, {t.warm_compile:.1f} s",
        speed,
        *rooflines,
        matmuls,
    )


def _scorer_shares(seconds: Mapping[str, float], work: Workload) -> dict[str, float]:
    """Share of the time of each search by which it exceeds that of the same search by log-probability."""
    return {
        f"{scorer}, N = {count}": 1
        - seconds[f"stage beam, likelihood, N = {count}"] / seconds[f"stage beam, {scorer}, N = {count}"]
        for count in work.num_candidates
        if count > 1
        for scorer in ("verifier", "token", "rationale")
    }


@dataclass(frozen=True)
class BaselineRow:
    """Measurement of transformers, with the searches that it is compared with.

    Attributes:
        method: How transformers is called.
        candidates: Number of candidates.
        seconds: Seconds that transformers takes.
        calls: Number of calls of ``generate``.
        ours: Seconds of the searches that it is compared with, by name.
    """

    method: str
    candidates: int
    seconds: float
    calls: int
    ours: dict[str, float]


def _measure_baseline(
    baseline: TransformersBaseline, seconds: Mapping[str, float], work: Workload, console: Console
) -> Iterator[BaselineRow]:
    """Measure transformers at every number of candidates above 1, beside the ``seconds`` of our searches by name."""
    difference, largest = baseline.logit_difference()
    console.print(f"logits after the prompt differ from transformers' by at most {difference:.2g} of {largest:.3g}")
    for count in (n for n in work.num_candidates if n > 1):
        for method, run, names in (
            ("one call after another", baseline.sequential, ("rationale", "token", "verifier")),
            ("batched sampling, no judge", baseline.batched, ("likelihood",)),
        ):
            with cli.status(f"transformers, {method}, N = {count}"):
                took, calls = run(count)
            ours = {name: seconds[f"stage beam, {name}, N = {count}"] for name in names}
            yield BaselineRow(method, count, took, calls, ours)
            comparison = ", ".join(
                f"{took / s:.1f} times as long as ours by {name} ({s:.1f} s)" for name, s in ours.items()
            )
            console.print(f"transformers, {method}, N = {count}: {took:.1f} s in {calls} calls: {comparison}")
