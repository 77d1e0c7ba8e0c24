"""What a run shows to a person: its bar, the table at its start, and a few words on each step."""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.table import Table

from llava_cot_jax.data.loader import Loader
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.training.metrics import Meter
from llava_cot_jax.training.program import Program
from llava_cot_jax.training.settings import TrainSettings


class Bar(Protocol):
    """Moves a progress bar."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """How many are done, how many there are in all, and a few words on how it goes."""


class ProgressBar(Protocol):
    """Opens a progress bar."""

    def __call__(self, label: str, unit: str = "bytes", every: int | None = None) -> AbstractContextManager[Bar]:
        """Of what is counted in ``unit``; where no bar can be, a line after ``every`` so many."""


def describe_run(
    settings: TrainSettings,
    config: MllamaConfig,
    mesh: Mesh,
    program: Program,
    loader: Loader,
    meter: Meter,
    steps: int,
) -> Table:
    """The table at the start of a run: what it takes, before anything is computed."""
    state = program.state
    device = jax.devices()[0]
    lengths = loader.index.lengths[loader.index.lengths > 0]
    sample = np.linspace(0, len(lengths) - 1, min(1000, len(lengths))).astype(int)
    flops = settings.loader.batch_size * meter.flops(lengths[sample]) / len(sample)
    trained, total = _count(state.trained), _count(state.trained) + _count(state.frozen)
    axes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    precision = {"float32": "float32", "bfloat16_stochastic": "bfloat16, rounded stochastically"}.get(
        settings.optimizer.precision, "bfloat16, rounded to the nearest (small updates are lost)"
    )
    rows = {
        "devices": f"{mesh.size} x {device.device_kind}, processes: {jax.process_count()}",
        "mesh": axes,
        "parameters": f"{total:,}, of which {trained:,} are trained ({config.convention})",
        "precision": f"computed in {settings.dtype}; parameters and moments in {precision}",
        "bytes per device": f"{_bytes_per_device(state) / 1e9:.3f} GB of parameters and moments",
        "rows": f"{len(lengths):,}; {loader.index.summary()}",
        "tokens per step": f"{settings.loader.batch_size * lengths.mean():,.0f} on average, {settings.loader.batch_size} rows",
        "lengths": f"{', '.join(map(str, loader.buckets))} tokens; {loader.padding():.0%} of all tokens are padding",
        "steps": f"{steps:,}; {loader.batches_per_epoch:,} per epoch",
        "FLOPs per step": f"{flops / 1e12:,.3g} TFLOP on average",
        "output": settings.output,
    }
    table = Table(show_header=False, title="training", title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def describe_loading(checkpoint: str, read: int) -> str:
    """A line on the bytes that each host read of the weights; every process must call this.

    Args:
        checkpoint: what they were read from.
        read: bytes that this process read.
    """
    hosts = multihost_utils.process_allgather(np.float32(read / 1e9)).reshape(-1)  # float32: jax has no int64
    if not hosts.any():
        return f"{checkpoint}: fresh weights"
    return f"{checkpoint}: weights read by each host, GB: {', '.join(f'{host:.6g}' for host in hosts)}"


def describe_step(measured: Mapping[str, Any]) -> str:
    """A few words on a step."""
    words = [f"loss {measured['loss']:.4f}"]
    if "seconds" in measured:
        words.append(f"{measured['samples_per_second']:.1f} samples/s")
        mfu, rate = measured["mfu"], measured["tflops_per_second_per_device"]
        words.append(f"{rate:.3g} TFLOP/s a device" if mfu is None else f"MFU {mfu:.1%}")
    else:
        words.append(f"compiled in {measured['compiling_seconds']:.0f} s")
    if measured["skipped"]:
        words.append(f"{measured['skipped']} steps skipped: loss or gradient not finite")
    return ", ".join(words)


def describe_validation(step: int, found: Mapping[str, float]) -> str:
    """A line on a validation."""
    stages = ", ".join(
        f"{name.removeprefix('validation_loss_')} {value:.4f}"
        for name, value in found.items()
        if name != "validation_loss"
    )
    return f"step {step}: validation loss {found['validation_loss']:.4f}" + (f" ({stages})" if stages else "")


def _count(arrays: Mapping[str, jax.Array]) -> int:
    return sum(math.prod(array.shape) for array in arrays.values())


def _bytes_per_device(state: Any) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state))
