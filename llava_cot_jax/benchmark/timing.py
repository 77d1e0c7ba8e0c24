"""Timing of compiled programs, and the rates that a device reaches at best."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from llava_cot_jax.cli import CompilationCounter
from llava_cot_jax.costs.chips import find_chip

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Timing:
    """Seconds that a program takes.

    Attributes:
        cold_compile: Seconds until the first result, without those of a later run.
        warm_compile: Seconds until the first result, without those of a later run, where XLA finds the compiled
            program on disk, as in a second process.
        median: Median of the timed runs.
        min: Shortest of the timed runs.
        max: Longest of the timed runs.
        runs: Number of timed runs.
        recompilations: Number of programs compiled during the timed runs, which should be 0.
    """

    cold_compile: float
    warm_compile: float
    median: float
    min: float
    max: float
    runs: int
    recompilations: int


_compilations = CompilationCounter()


def time_program(program: Callable[[], ResultT], runs: int) -> tuple[Timing, ResultT]:
    """Compile and run ``program`` twice, cold and warm, then time ``runs`` runs. Return the last result as well."""

    def run() -> tuple[float, ResultT]:
        began = time.perf_counter()
        result = jax.block_until_ready(program())
        return time.perf_counter() - began, result

    cold, _ = run()
    jax.clear_caches()
    warm, result = run()
    before, seconds = _compilations.count, []
    for _ in range(runs):
        took, result = run()
        seconds.append(took)
    median, recompilations = statistics.median(seconds), _compilations.count - before
    cold, warm = max(cold - median, 0.0), max(warm - median, 0.0)
    return Timing(cold, warm, median, min(seconds), max(seconds), runs, recompilations), result


@dataclass(frozen=True)
class DeviceRates:
    """Rates of a device.

    Attributes:
        source: "nominal", from the vendor's data sheet, or "measured", here.
        flops: FLOPs per second of matrix products in the model's dtype.
        bytes: Bytes per second read from and written to the device's memory.
    """

    source: str
    flops: float
    bytes: float

    def roofline_seconds(self, flops: float, read_bytes: float) -> float:
        """Least seconds that a number of FLOPs and a number of bytes take, one at the same time as the other."""
        return max(flops / self.flops, read_bytes / self.bytes)


def device_rates(dtype: Any) -> list[DeviceRates]:
    """Return the measured rates of the device, and the nominal ones where its chip is known.

    FLOPs are measured by a large matrix product. Bytes are measured by a large copy, and by a large product of a matrix
    and a vector, which only reads, as a decoding step does; the faster of the two counts.
    """
    device = jax.devices()[0]
    small = device.platform == "cpu"
    side, length = (2048, 2**26) if small else (8192, 2**29)
    x = jnp.ones((side, side), dtype)
    product = time_program(lambda: _matmul(x, x), 5)[0].min
    data = jnp.ones(length, dtype)
    copy = time_program(lambda: _copy(data), 10)[0].min
    matrix, vector = data.reshape(-1, 4096), jnp.ones(4096, dtype)
    reading = time_program(lambda: _matmul(matrix, vector), 10)[0].min
    moved = max(2 * data.nbytes / copy, data.nbytes / reading)
    rates = [DeviceRates("measured", 2 * side**3 / product, moved)]
    if chip := find_chip(device.device_kind):
        per_device = chip.devices_per_chip
        rates.append(DeviceRates("nominal", chip.peak_flops / per_device, chip.hbm_bandwidth / per_device))
    return rates


@jax.jit
def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    return x @ y


@jax.jit
def _copy(x: jax.Array) -> jax.Array:
    return x + 1
