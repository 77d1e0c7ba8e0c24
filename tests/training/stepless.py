"""Training runs in this process whose steps compute nothing: all the rest of a run, at a tenth of the time."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from llava_cot_jax import cli
from llava_cot_jax.data.rows import FirstRows
from llava_cot_jax.data.sources import open_training_rows
from llava_cot_jax.train import read_arguments
from llava_cot_jax.training import loop
from llava_cot_jax.training.checkpoints import read_run, steps_in
from llava_cot_jax.training.layout import CHECKPOINTS
from llava_cot_jax.training.loop import TrainResult, _Loop, train
from llava_cot_jax.training.resume import place_description
from llava_cot_jax.training.settings import TrainSettings
from llava_cot_jax.training.state import TrainState
from tests.training.small_run import arguments, write_small

ROWS = 100


@dataclass
class Place:
    """A folder with the small checkpoint, as ``small`` and as ``base``, and the runs that started from ``base``.

    Attributes:
        folder: the folder.
        stop: the step after which a run is cut off.
        rows: those that each step of the last run had.
    """

    folder: Path
    stop: int = 1_000_000
    rows: tuple[list[int], ...] = ()

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def settings(self, name: str, **settings: Any) -> TrainSettings:
        given = {"eval_examples": 0, **settings}
        return read_arguments(arguments(self / "base", self / name, **given))[0]

    def run(self, name: str, accept_changes: bool = False, **settings: Any) -> list[str]:
        """What a run says."""
        said: list[str] = []

        def log(line: Any) -> None:
            said.append(line if isinstance(line, str) else "")

        found = self.settings(name, **settings)
        train(found, log=log, progress_bar=cli.no_progress_bar, accept_changes=accept_changes)
        return said

    def run_steps(self, steps: _Loop, state: TrainState, first: int, last: int) -> TrainResult:
        """Note the rows of each step, and save the state after the last one, as if it had been changed."""
        last = min(last, self.stop)
        self.rows = tuple(steps.training._order[index].rows.tolist() for index in range(first, last))
        if first < last:
            step = jax.device_put(np.int32(last), state.step.sharding)
            description = {**steps.description, "place": place_description(steps.training, last)}
            steps.checkpoints.save(replace(state, step=step), description)
        return TrainResult(steps.run, state, complete=True)

    def stored(self, name: str) -> dict[str, Any]:
        """The description in the newest checkpoint of a run."""
        folder = self / name / CHECKPOINTS
        return read_run(folder / str(steps_in(folder)[-1]))


def compute_nothing(patch: pytest.MonkeyPatch, run_steps: Callable[[_Loop, TrainState, int, int], TrainResult]) -> None:
    """Let runs have ``run_steps`` for their steps, and the first ``ROWS`` rows alone, as each row is counted."""
    patch.setattr(_Loop, "run_steps", lambda steps, *given: run_steps(steps, *given))
    patch.setattr(loop, "open_training_rows", lambda *given: FirstRows(open_training_rows(*given), ROWS))


@pytest.fixture(name="place", scope="module")
def stepless_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("stepless")
    write_small(folder / "small")
    shutil.copytree(folder / "small", folder / "base")
    found = Place(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        compute_nothing(patch, found.run_steps)
        yield found
