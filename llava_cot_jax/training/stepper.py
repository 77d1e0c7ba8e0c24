"""The steps of a run, one after the other, and what each is measured by."""

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
from llava_cot_jax.training.metrics import Meter, Metrics, by_stage
from llava_cot_jax.training.program import Program
from llava_cot_jax.training.report import Bar, describe_step
from llava_cot_jax.training.state import State


@dataclass(frozen=True)
class _UnderWay:
    """A step that the devices may still be at.

    Attributes:
        index: counted from 0.
        measures: what ``make_step`` tells of it.
        compiled: whether its shape was the first of its kind, so that its time is that of the compiler.
        waited: seconds that it waited for its batch.
    """

    index: int
    measures: dict[str, jax.Array]
    compiled: bool
    waited: float


class Stepper:
    """Runs the steps in order and writes each down, one behind: while its measures are fetched, the next runs.

    Args:
        program: of the run.
        loader: of its batches.
        steps: their indices, from 0; they are those of the batches too.
        meter: of their rates.
        metrics: takes what was measured.
        bar: is moved.
        max_nonfinite_steps: so many steps that are not finite end the run.
    """

    def __init__(
        self,
        program: Program,
        loader: Loader,
        steps: range,
        meter: Meter,
        metrics: Metrics,
        bar: Bar,
        max_nonfinite_steps: int,
    ) -> None:
        self._program, self._loader, self._meter, self._metrics, self._bar = program, loader, meter, metrics, bar
        self._batches = enumerate(loader.batches(steps.start, steps.stop), steps.start)
        self._total = steps.stop
        self._under_way: _UnderWay | None = None
        self._most_skipped = max_nonfinite_steps
        self._skipped: list[tuple[int, list[str]]] = []  # steps in a row, and the ids of their rows
        self._lengths_seen: set[int] = set()
        meter.begin()

    def step(self, state: State) -> State:
        """The state after the next batch; ``state`` is donated.

        Raises:
            UserError: damaged data, or too many steps in a row whose loss or gradient is not finite.
        """
        began = time.perf_counter()
        index, batch = next(self._batches)
        waited = time.perf_counter() - began
        length = batch["input_ids"].shape[1]
        if compiles := length not in self._lengths_seen:
            self.finish()
            self._lengths_seen.add(length)
        state, measures = self._program.step(state, batch)
        before, self._under_way = self._under_way, _UnderWay(index, measures, compiles, waited)
        if before:
            self._write(before)
        if compiles:
            self.finish()
        return state

    def finish(self) -> None:
        """Wait for the step that is under way, and write it down."""
        if self._under_way:
            self._write(self._under_way)
            self._under_way = None

    @contextmanager
    def pause(self, name: str) -> Iterator[None]:
        """For work between two steps, whose seconds are written down by ``name`` and are no step's."""
        self.finish()
        began = time.perf_counter()
        yield
        self._metrics.write(self._done, {name: time.perf_counter() - began})
        self._meter.begin()

    def _write(self, step: _UnderWay) -> None:
        found = jax.device_get(step.measures)  # waits for the step
        rates = self._meter.lap(self._loader.lengths(step.index))
        if step.compiled:
            rates = {"compiling_seconds": rates["seconds"]}
        self._done = step.index + 1
        updates = step.index - int(found["skipped"]) + int(not found["finite"])  # before this step
        measured = {
            "loss": float(found["loss"]),
            **by_stage("loss", found["stage_losses"], found["stage_tokens"]),
            "learning_rate": float(self._program.learning_rate(np.int32(updates))),
            "gradient_norm": float(found["gradient_norm"]),
            "trained_tokens": int(found["tokens"]),
            "skipped": int(found["skipped"]),
            "epoch": self._done / self._loader.batches_per_epoch,
            **rates,
            "waiting_seconds": step.waited,
            "peak_memory_bytes": peak_memory(),
        }
        self._metrics.write(self._done, measured)
        self._bar(self._done, self._total, describe_step(measured))
        self._watch(step.index, bool(found["finite"]), measured)

    def _watch(self, index: int, finite: bool, measured: dict[str, Any]) -> None:
        """Keep the rows of a step that is not finite.

        Raises:
            UserError: it is one too many in a row.
        """
        if finite:
            self._skipped.clear()
            return
        rows = self._loader.row_ids(index)
        self._skipped.append((index + 1, rows))
        what = {"loss": str(measured["loss"]), "gradient_norm": str(measured["gradient_norm"]), "rows": rows}
        self._metrics.note_skipped(index + 1, what)
        if len(self._skipped) >= self._most_skipped:
            told = "; ".join(f"step {done}: rows {', '.join(ids)}" for done, ids in self._skipped)
            raise UserError(
                f"{len(self._skipped)} steps in a row had a loss or gradient that is not finite, and changed nothing: "
                f"mend their rows, or lower the learning rate, and start again from the newest checkpoint. {told}"
            )
