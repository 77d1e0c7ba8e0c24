"""Metrics of a run: its rates and MFU, and the files and services that keep them."""

import json
import math
import shutil
import tempfile
import time
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from tensorboardX import SummaryWriter

from llava_cot_jax.costs.chips import find_chip
from llava_cot_jax.costs.model_costs import ModelPart, training_flops
from llava_cot_jax.errors import UserError
from llava_cot_jax.files import copy_file
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.paths import is_remote
from llava_cot_jax.stage_format import STAGES

METRICS_FILE = "metrics.jsonl"
"""Name of the file in the folder of a run with a JSON line of metrics for each step."""

SKIPPED_STEPS_FILE = "skipped.jsonl"
"""Name of the file in the folder of a run with a JSON line for each skipped step and the ids of its rows."""

UPLOAD_SECONDS = 60.0
"""Least time between two uploads of the metrics of a run whose folder is in a bucket."""


class Throughput:
    """Clock that measures the rates of the steps of a run.

    Args:
        config: Configuration of the model.
        trained: Parts of the model that are trained whole.
        adapted: Parts of the model that have adapters.
    """

    def __init__(self, config: MllamaConfig, trained: frozenset[ModelPart], adapted: frozenset[ModelPart]) -> None:
        device = jax.devices()[0]
        chip = find_chip(device.device_kind)
        self._peak = chip.peak_flops / chip.devices_per_chip * jax.device_count() if chip else None
        self._last = time.perf_counter()

        @cache
        def row_flops(tokens: int, images: int) -> int:
            return sum(training_flops(config, tokens, images, trained=trained, adapted=adapted).values())

        self._row_flops = row_flops

    def flops(self, lengths: np.ndarray, images: np.ndarray) -> int:
        """Return the useful FLOPs of a step.

        Args:
            lengths: Number of tokens of each row of its global batch without padding, int [rows].
            images: Number of images of each row without padding, int [rows].
        """
        return sum(map(self._row_flops, lengths.tolist(), images.tolist()))

    def restart(self) -> None:
        """Measure from now on: the time before belongs to no step."""
        self._last = time.perf_counter()

    def lap(self, lengths: np.ndarray, images: np.ndarray) -> dict[str, float | None]:
        """Return the rates since the last call or restart, in which one step was finished.

        Args:
            lengths: Number of tokens of each row of its global batch without padding, int [rows].
            images: Number of images of each row without padding, int [rows].

        Returns:
            ``seconds``; ``samples_per_second`` and ``tokens_per_second`` of all devices together;
            ``tflops_per_second_per_device``; and ``mfu``, which is None if the chip is not in ``chips.CHIPS``.
        """
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        rate = self.flops(lengths, images) / seconds
        return {
            "seconds": seconds,
            "samples_per_second": len(lengths) / seconds,
            "tokens_per_second": int(lengths.sum()) / seconds,
            "tflops_per_second_per_device": rate / jax.device_count() / 1e12,
            "mfu": rate / self._peak if self._peak else None,
        }


def losses_by_stage(name: str, losses: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
    """Return the mean losses of the stages that have tokens, by names such as ``loss_summary``.

    Args:
        name: Name of the loss.
        losses: Mean losses, float32 [1 + stages].
        tokens: Numbers of tokens, float32 [1 + stages].
    """
    return {f"{name}_{stage.lower()}": float(losses[i]) for i, stage in enumerate(STAGES, 1) if tokens[i]}


class MetricsWriter:
    """Writer of metrics to metrics.jsonl, to TensorBoard and, if asked for, to Weights & Biases.

    Only the first of several processes writes files that last.

    Attributes:
        folder: Folder of the files: that of the run or, if that is in a bucket, a temporary one that is uploaded now
            and then. In other processes, a temporary one.

    Args:
        folder: Folder of the run.
        settings: All settings of the run, for Weights & Biases.
        wandb: Project of Weights & Biases; None does not log there.
        step: Number of steps done when the run starts. Lines of later steps, which an interrupted run left, are
            dropped.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], wandb: str | None, step: int) -> None:
        self._writes = jax.process_index() == 0
        self._bucket = folder if self._writes and is_remote(folder) else None
        self._temporary = bool(self._bucket) or not self._writes
        self.folder = Path(tempfile.mkdtemp()) if self._temporary else Path(folder)
        if not self._writes:
            return
        self._uploaded = time.monotonic()
        for name in (METRICS_FILE, SKIPPED_STEPS_FILE):
            path = self.folder / name
            if self._bucket and (self._bucket / name).exists():
                copy_file(self._bucket / name, path)
            if path.exists():
                lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
                path.write_text("".join(line for line in lines if _step_of(line) <= step), encoding="utf-8")
        self._lines = (self.folder / METRICS_FILE).open("a", encoding="utf-8")
        self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1, filename_suffix=f".{step}")
        self._wandb = _init_wandb(wandb, self.folder, settings) if wandb else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writes:
            self._lines.close()
            self._board.close()
            if self._wandb:
                self._wandb.finish()
            if self._bucket:
                self._upload()
        if self._temporary:
            shutil.rmtree(self.folder, ignore_errors=True)

    def write(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Write the metrics after ``step`` steps. Values that are None or not finite are left out."""
        if not self._writes:
            return
        known = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        self._lines.write(json.dumps({"step": step, **known}) + "\n")
        self._lines.flush()
        for name, value in known.items():
            self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(known, step=step)
        if self._bucket and time.monotonic() - self._uploaded > UPLOAD_SECONDS:
            self._upload()

    def write_skipped(self, step: int, details: Mapping[str, Any]) -> None:
        """Write that ``step`` was skipped, with details such as the ids of its rows."""
        if self._writes:
            with (self.folder / SKIPPED_STEPS_FILE).open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"step": step, **details}) + "\n")

    def _upload(self) -> None:
        assert self._bucket is not None
        for path in self.folder.rglob("*"):
            if path.is_file():
                target = self._bucket / str(path.relative_to(self.folder))
                target.parent.mkdir(parents=True, exist_ok=True)
                copy_file(path, target)
        self._uploaded = time.monotonic()


def _step_of(line: str) -> float:
    """Return the step of a line, or infinity for a line that was cut off."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def check_wandb(project: str | None) -> None:
    """Check that Weights & Biases is installed if a project is given.

    Raises:
        UserError: It is not installed.
    """
    if project and find_spec("wandb") is None:
        raise UserError("wandb is set, but not installed: pip install 'llava-cot-jax[wandb]'")


def _init_wandb(project: str, folder: Path, settings: Mapping[str, Any]) -> Any:
    import wandb

    return wandb.init(project=project, config=dict(settings), dir=str(folder))
