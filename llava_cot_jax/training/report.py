"""Texts that a run shows: the table at its start, and lines on loading, steps and validations."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.table import Table

from llava_cot_jax.data.loader import Loader
from llava_cot_jax.training.metrics import Throughput
from llava_cot_jax.training.program import TrainProgram
from llava_cot_jax.training.run import Run
from llava_cot_jax.training.settings import TrainSettings


def run_table(run: Run, program: TrainProgram, loader: Loader, throughput: Throughput, steps: int) -> Table:
    """Return the table at the start of a run: its devices, data and costs.

    Args:
        run: Run that starts.
        program: Programs of the run.
        loader: Loader of the batches to train on.
        throughput: Clock of the run, for its FLOPs.
        steps: Number of steps of the run.
    """
    settings, mesh, state = run.settings, run.mesh, program.state
    device = jax.devices()[0]
    coming = loader.rows_of_epoch()
    lengths, images = loader.index.lengths[coming], loader.index.images[coming]
    sample = np.linspace(0, len(lengths) - 1, min(1000, len(lengths))).astype(int)
    batch_size = settings.loader.batch_size
    flops = batch_size * throughput.flops(lengths[sample], images[sample]) / len(sample)
    trained, total = _count(state.trained), _count(state.trained) + _count(state.frozen)
    precision = {"float32": "float32", "bfloat16_stochastic": "bfloat16, rounded stochastically"}.get(
        settings.optimizer.precision, "bfloat16, rounded to the nearest (small updates are lost)"
    )
    names = [settings.data] if isinstance(settings.data, str) else list(settings.data)
    sets = [f"{name}: {count:,} rows x {weight:g}" for name, (count, weight) in zip(names, loader.sets, strict=True)]
    rows = {
        "devices": f"{mesh.size} x {device.device_kind}, processes: {jax.process_count()}",
        "mesh": " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items()),
        "parameters": f"{total:,}, of which {trained:,} are trained ({run.initial_model.config.convention})",
        "precision": f"computed in {settings.dtype}; parameters and moments in {precision}",
        "bytes per device": f"{_bytes_per_device(state) / 1e9:.3f} GB of parameters and moments",
        "data": "; ".join(sets) if len(sets) > 1 else names[0],
        "rows": f"{np.count_nonzero(loader.index.lengths):,}; {loader.index.summary()}",
        "tokens per step": f"{batch_size * lengths.mean():,.0f} on average, {batch_size} rows",
        "lengths": f"{', '.join(map(str, loader.buckets))} tokens; {loader.padding():.0%} of all tokens are padding",
        "steps": f"{steps:,}; {loader.batches_per_epoch:,} per epoch",
        "FLOPs per step": f"{flops / 1e12:,.3g} TFLOP on average",
        "output": settings.output,
    }
    table = Table(show_header=False, title="training", title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def loading_line(checkpoint: str, read: int) -> str:
    """Return a line on the bytes of the weights that each host read. All processes must call this.

    Args:
        checkpoint: Name of the checkpoint.
        read: Number of bytes that this process read.
    """
    hosts = multihost_utils.process_allgather(np.float32(read / 1e9)).reshape(-1)  # float32: jax has no int64
    if not hosts.any():
        return f"{checkpoint}: random weights"
    return f"{checkpoint}: weights read by each host, GB: {', '.join(f'{host:.6g}' for host in hosts)}"


def nothing_left_line(settings: TrainSettings, step: int) -> str:
    """Return a line on a run that has nothing left to do after ``step`` steps, and on how to make it longer."""
    if settings.steps:
        return f"nothing is left to do: the run has made {step} steps, and steps is {settings.steps}; set more of them"
    times = "once" if settings.epochs == 1 else f"{settings.epochs} times"
    return f"nothing is left to do: the run has seen its data {times}, in {step} steps; set more epochs to go on"


def step_note(measured: Mapping[str, Any]) -> str:
    """Return a short note on a step, from its metrics."""
    words = [f"loss {measured['loss']:.4f}"]
    if "verifier_loss" in measured:
        words.append(f"verifier {measured['verifier_loss']:.4f}, right {measured['verifier_accuracy']:.1%}")
    if "seconds" in measured:
        words.append(f"{measured['samples_per_second']:.1f} samples/s")
        mfu, rate = measured["mfu"], measured["tflops_per_second_per_device"]
        words.append(f"{rate:.3g} TFLOP/s a device" if mfu is None else f"MFU {mfu:.1%}")
    else:
        words.append(f"compiled in {measured['compiling_seconds']:.0f} s")
    if measured["skipped"]:
        words.append(f"{measured['skipped']} steps skipped: loss or gradient not finite")
    return ", ".join(words)


def validation_line(step: int, losses: Mapping[str, float]) -> str:
    """Return a line on a validation after ``step`` steps, from its losses by name."""
    stages = ", ".join(
        f"{name.removeprefix('validation_loss_').removeprefix('validation_').replace('_', ' ')} {value:.4f}"
        for name, value in losses.items()
        if name != "validation_loss"
    )
    return f"step {step}: validation loss {losses['validation_loss']:.4f}" + (f" ({stages})" if stages else "")


def _count(arrays: Mapping[str, jax.Array]) -> int:
    return sum(math.prod(array.shape) for array in arrays.values())


def _bytes_per_device(state: Any) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state))
