"""Execution of the steps of a run, and the metrics of each."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from llava_cot_jax.costs.device_memory import peak_memory
from llava_cot_jax.data.loader import Loader
from llava_cot_jax.errors import UserError
from llava_cot_jax.progress import ProgressUpdate
from llava_cot_jax.training.metrics import MetricsWriter, Throughput, losses_by_stage
from llava_cot_jax.training.program import TrainProgram
from llava_cot_jax.training.report import step_note
from llava_cot_jax.training.state import TrainState
from llava_cot_jax.training.step import Metrics


@dataclass(frozen=True)
class _PendingStep:
    """Step that the devices may still be computing.

    Attributes:
        index: Index of the step, counted from 0.
        measures: Measures of the step, as ``make_train_step`` describes them.
        compiles: Whether it is the first step of its shape, so that its time is that of the compiler.
        waiting_seconds: Time that it waited for its batch.
    """

    index: int
    measures: Metrics
    compiles: bool
    waiting_seconds: float


class Stepper:
    """Executor of the steps of a run in order.

    It writes the metrics of a step while the devices compute the next one.

    Args:
        program: Programs of the run.
        loader: Loader of its batches.
        steps: Indices of the steps, counted from 0, which are those of the batches too.
        metrics: Writer of the metrics.
        throughput: Clock of the steps.
        update_bar: Function that moves the progress bar.
    """

    def __init__(
        self,
        program: TrainProgram,
        loader: Loader,
        steps: range,
        metrics: MetricsWriter,
        throughput: Throughput,
        update_bar: ProgressUpdate,
    ) -> None:
        self._program, self._loader = program, loader
        self._metrics, self._throughput, self._update_bar = metrics, throughput, update_bar
        self._batches = enumerate(loader.batches(steps.start, steps.stop), steps.start)
        self._done, self._total = steps.start, steps.stop
        self._pending: _PendingStep | None = None
        self._nonfinite: list[tuple[int, list[str]]] = []  # consecutive steps, and the ids of their rows
        self._shapes_seen: set[tuple[tuple[int, ...], ...]] = set()
        throughput.restart()

    def step(self, state: TrainState) -> TrainState:
        """Start the step of the next batch, and return the state after it. ``state`` is donated.

        Raises:
            UserError: Data is damaged, or too many consecutive steps had a loss or gradient that is not finite.
        """
        began = time.perf_counter()
        index, batch = next(self._batches)
        waiting_seconds = time.perf_counter() - began
        shapes = tuple(array.shape for array in batch.values())
        if compiles := shapes not in self._shapes_seen:
            self.finish()
            self._shapes_seen.add(shapes)
        state, measures = self._program.step(state, batch)
        previous, self._pending = self._pending, _PendingStep(index, measures, compiles, waiting_seconds)
        if previous:
            self._write(previous)
        if compiles:
            self.finish()
        return state

    def finish(self) -> None:
        """Wait for the pending step, and write its metrics."""
        if self._pending:
            self._write(self._pending)
            self._pending = None

    @contextmanager
    def pause(self, name: str) -> Iterator[None]:
        """Time the work of the block, between two steps, apart from them, and write its seconds as ``name``."""
        self.finish()
        began = time.perf_counter()
        yield
        self._metrics.write(self._done, {name: time.perf_counter() - began})
        self._throughput.restart()

    def _write(self, step: _PendingStep) -> None:
        found = jax.device_get(step.measures)  # waits for the step
        rates = self._throughput.lap(self._loader.lengths(step.index), self._loader.images(step.index))
        if step.compiles:
            rates = {"compiling_seconds": rates["seconds"]}
        self._done = step.index + 1
        updates = step.index - int(found["skipped"]) + int(not found["finite"])  # before this step
        measured = {
            "loss": float(found["loss"]),
            **losses_by_stage("loss", found["stage_losses"], found["stage_tokens"]),
            **_replies(found),
            "learning_rate": float(self._program.learning_rate(np.int32(updates))),
            "gradient_norm": float(found["gradient_norm"]),
            "trained_tokens": int(found["tokens"]),
            "skipped": int(found["skipped"]),
            "epoch": self._loader.epochs_before(self._done),
            **rates,
            "waiting_seconds": step.waiting_seconds,
            "peak_memory_bytes": peak_memory(),
        }
        self._metrics.write(self._done, measured)
        self._update_bar(self._done, self._total, step_note(measured))
        if found["finite"]:
            self._nonfinite.clear()
        else:
            self._report_nonfinite(step.index, measured)

    def _report_nonfinite(self, index: int, measured: dict[str, Any]) -> None:
        """Write which rows a step had whose loss or gradient was not finite.

        Raises:
            UserError: The number of such consecutive steps has reached ``max_nonfinite_steps``.
        """
        rows = self._loader.row_ids(index)
        self._nonfinite.append((index + 1, rows))
        details = {"loss": str(measured["loss"]), "gradient_norm": str(measured["gradient_norm"]), "rows": rows}
        self._metrics.write_skipped(index + 1, details)
        if len(self._nonfinite) >= self._program.settings.max_nonfinite_steps:
            steps = "; ".join(f"step {done}: rows {', '.join(ids)}" for done, ids in self._nonfinite)
            raise UserError(
                f"{len(self._nonfinite)} steps in a row had a loss or gradient that is not finite, and changed "
                "nothing: correct or remove their examples, or lower the learning rate, and start again from the "
                f"newest checkpoint. {steps}"
            )


def _replies(found: Metrics) -> dict[str, float]:
    """Return the measures of the verifier's replies, if a step had some."""
    names = [name for name in found if name.startswith("verifier_")] if found.get("replies") else []
    return {name: float(found[name]) for name in names}
