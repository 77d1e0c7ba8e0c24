"""Measure what the verifier adds to a search, beside the token judge and upstream's loop in transformers, on a CPU.

    python tests/evidence/verifier.py --turns 2 | tee tests/evidence/verifier.txt

The model has 95M random parameters in float32, and the workload is the standard one of ``bench``, with 10 candidates.
The searches take turns, so that whatever else the machine does meets all of them alike; a share is the median over
the turns. Upstream's loop runs once, between two halves of the turns.
"""

import argparse
import datetime
import os
import statistics
import time
from importlib.metadata import version

import jax

from llava_cot_jax.benchmark.baseline import TransformersBaseline
from llava_cot_jax.benchmark.inputs import endless_tables, random_model
from llava_cot_jax.benchmark.search_benchmark import SearchBenchmark
from llava_cot_jax.benchmark.workload import Workload
from llava_cot_jax.search.program import StageResult, default_prefill_chunk, search
from llava_cot_jax.search.scorers import Judge, LogProbability, Scorer, Verifier
from llava_cot_jax.search.strategies import StageBeam

CANDIDATES = 10
SCORERS: dict[str, Scorer] = {
    "log-probability": LogProbability(),
    "verifier": Verifier(),
    "token judge": Judge(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3, help="Number of turns of the searches in each half.")
    turns = parser.parse_args().turns
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "jaxlib", "transformers", "torch"))
    print(f"{datetime.date.today()}; {versions}; {os.cpu_count()} cores")
    work = Workload(num_candidates=(CANDIDATES,))
    print(work)
    bench = SearchBenchmark(random_model("100m", "float32", None), work, turns)
    seconds: dict[str, list[float]] = {name: [] for name in SCORERS}
    for name in SCORERS:
        time_search(bench, name)  # compiles
    take_turns(bench, seconds, turns)
    took, calls = TransformersBaseline(bench.model, work, bench.search_inputs).sequential(CANDIDATES)
    print(f"upstream's loop in transformers: {took:.1f} s in {calls} calls{load()}", flush=True)
    take_turns(bench, seconds, turns)
    for name, taken in seconds.items():
        shares = [1 - base / own for base, own in zip(seconds["log-probability"], taken, strict=True)]
        median = statistics.median(taken)
        print(
            f"{name}, N = {CANDIDATES}: median {median:.2f} s ({min(taken):.2f} to {max(taken):.2f}); upstream's loop "
            f"takes {took / median:.1f} times as long; share of the scorer {statistics.median(shares):.1%}"
        )


def take_turns(bench: SearchBenchmark, seconds: dict[str, list[float]], turns: int) -> None:
    for _ in range(turns):
        for name, taken in seconds.items():
            taken.append(time_search(bench, name))
        print(", ".join(f"{name} {taken[-1]:.2f} s" for name, taken in seconds.items()) + load(), flush=True)


def time_search(bench: SearchBenchmark, name: str) -> float:
    """Return the seconds of one search."""
    stages = tuple(f"S{i}" for i in range(len(bench.work.stage_tokens)))
    spec = StageBeam(CANDIDATES, SCORERS[name], max_new_tokens=bench.work.stage_tokens, stages=stages).to_spec()
    tables = endless_tables(bench.config, bench.work, spec)
    static = {"config": bench.config, "spec": spec, "prefill_chunk": default_prefill_chunk(None), "mesh": None}
    began = time.perf_counter()
    result: StageResult = search(bench.params, bench.search_inputs, *tables, **static)
    jax.block_until_ready(result)
    return time.perf_counter() - began


def load() -> str:
    """Return the load of the machine in the last minute, of which this process has up to one for each core."""
    return f"; load {os.getloadavg()[0]:.1f}"


if __name__ == "__main__":
    main()
