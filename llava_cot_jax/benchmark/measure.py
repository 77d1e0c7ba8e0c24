"""Timing, and what a device does at best: the two that every figure of a benchmark is made of."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from llava_cot_jax.cli import CompilationCounter
from llava_cot_jax.costs.chips import find_chip

T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """Seconds of a program.

    Attributes:
        cold: of compiling it: until its first result, less a later run.
        warm: likewise, once more, with what XLA compiled kept on disk, as a second process finds it.
        median: of the runs after these.
        least: of those.
        most: of those.
        runs: how many they were.
        compiled_again: programs that they compiled, where they should have compiled none.
    """

    cold: float
    warm: float
    median: float
    least: float
    most: float
    runs: int
    compiled_again: int


_compilations = CompilationCounter()


def timed(program: Callable[[], T], runs: int) -> tuple[Timing, T]:
    """Compile and run ``program``, twice, and then run it ``runs`` times to time it; its last result, too."""

    def once() -> tuple[float, T]:
        began = time.perf_counter()
        result = jax.block_until_ready(program())
        return time.perf_counter() - began, result

    cold, _ = once()
    jax.clear_caches()
    warm, result = once()
    before, each = _compilations.count, []
    for _ in range(runs):
        seconds, result = once()
        each.append(seconds)
    middle, again = statistics.median(each), _compilations.count - before
    return Timing(max(cold - middle, 0.0), max(warm - middle, 0.0), middle, min(each), max(each), runs, again), result


@dataclass(frozen=True)
class Rates:
    """What a device does in a second.

    Attributes:
        source: "nominal", from the vendor's data sheet, or "measured", here.
        flops: of matrix products in the model's dtype.
        bytes: read from memory and written to it.
    """

    source: str
    flops: float
    bytes: float

    def floor(self, flops: float, read: float) -> float:
        """Seconds that so many FLOPs and bytes take at least, each alone."""
        return max(flops / self.flops, read / self.bytes)


def rates(dtype: Any) -> list[Rates]:
    """The device's, measured, and nominal where its chip is known.

    Measured: FLOPs by a large product; bytes by a large copy, or by a large product with a vector, which reads alone,
    as a step of decoding does, whichever moves more of them.
    """
    device = jax.devices()[0]
    small = device.platform == "cpu"
    side, length = (2048, 2**26) if small else (8192, 2**29)
    x = jnp.ones((side, side), dtype)
    product = timed(lambda: _product(x, x), 5)[0].least
    data = jnp.ones(length, dtype)
    copy = timed(lambda: _copy(data), 10)[0].least
    matrix, vector = data.reshape(-1, 4096), jnp.ones(4096, dtype)
    reading = timed(lambda: _product(matrix, vector), 10)[0].least
    moved = max(2 * data.nbytes / copy, data.nbytes / reading)
    found = [Rates("measured", 2 * side**3 / product, moved)]
    if chip := find_chip(device.device_kind):
        found.append(Rates("nominal", chip.flops / chip.devices, chip.bandwidth / chip.devices))
    return found


@jax.jit
def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    return x @ y


@jax.jit
def _copy(x: jax.Array) -> jax.Array:
    return x + 1


def peak_memory() -> int | None:
    """Bytes, on the device that took the most; None where it does not tell."""
    known = [stats["peak_bytes_in_use"] for d in jax.local_devices() if (stats := d.memory_stats())]
    return max(known) if known else None
