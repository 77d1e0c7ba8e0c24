"""Checkpoints of a run: Orbax, one folder a step, written while training goes on.

A checkpoint has three parts, which can be read apart: ``model`` (the trained arrays by path, stacked
layout), ``progress`` (step, moments, skipped) and ``run`` (what else must agree for a run to go on).
Frozen parameters are not in it: they are those of the checkpoint that the run started from.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from llava_cot_jax.errors import UserError
from llava_cot_jax.paths import is_remote
from llava_cot_jax.training.state import State

MODEL, PROGRESS, RUN = "model", "progress", "run"


class Checkpoints:
    """The checkpoints in a folder; a context manager that waits for the last one to be written.

    Args:
        folder: made where there is none.
        keep: so many of the newest.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep
        newest = ocp.training.preservation_policies.LatestN(keep)
        self._orbax = ocp.training.Checkpointer(folder, preservation_policy=newest)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if failure is None:
            self.wait()
        self._orbax.close()

    @property
    def latest(self) -> int | None:
        """The newest step there is."""
        return newest.step if (newest := self._orbax.latest) else None

    def check_room(self, state: State) -> None:
        """Whether the disk holds the checkpoints of a run: one more than are kept, while the oldest goes.

        Raises:
            UserError: it does not.
        """
        if is_remote(self._folder):
            return
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(_parts(state)))
        needed = size * max(self._keep + 1 - len(self._orbax.checkpoints), 1)
        if needed > (free := shutil.disk_usage(self._folder).free):
            raise UserError(
                f"{self._folder} has {free / 1e9:.1f} GB free; {self._keep + 1} checkpoints of {size / 1e9:.1f} GB "
                f"need {needed / 1e9:.1f} GB more: free some, name another output, or lower checkpoints_kept"
            )

    def save(self, state: State, run: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint of ``state``; it may be donated once this returns.

        Raises:
            UserError: the one before could not be written, or this one cannot be begun.
        """
        self.wait()
        parts = {**_parts(state), RUN: dict(run)}
        with _named(self._folder):
            self._orbax.save_checkpointables_async(int(state.step), parts, force=True)

    def wait(self) -> None:
        """Wait until what was begun is written.

        Raises:
            UserError: it cannot be: the disk is full, say.
        """
        with _named(self._folder):
            self._orbax.wait()

    def restore(self, step: int, like: State, run: Mapping[str, Any]) -> State:
        """The state of a step, laid out as ``like`` says, with its frozen arrays.

        Raises:
            UserError: it is the checkpoint of another model or another run.
        """
        place = self._folder / str(step)
        found = read_run(place)
        if changed := [name for name, value in run.items() if found.get(name) != value]:
            raise UserError(
                f"{place} is of another run: {', '.join(changed)} differ; name another output to start anew"
            )
        parts = _parts(like)
        _check_shapes(place, self._orbax.checkpointables_metadata(step).metadata[MODEL], parts[MODEL])
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), parts)
        loaded = self._orbax.load_checkpointables(step, abstract)
        return State(trained=loaded[MODEL], frozen=like.frozen, **loaded[PROGRESS])


def read_arrays(folder: Path, paths: list[str]) -> dict[str, np.ndarray]:
    """Some trained arrays of a checkpoint, whole, on the host, whichever mesh they were written from.

    Args:
        folder: of one step.
        paths: of arrays that it holds.
    """
    held = stored_arrays(folder)
    wanted = {path: np.empty(0, held[path].dtype) for path in paths}
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        loaded: dict[str, np.ndarray] = ocp.load_checkpointables(folder, {MODEL: wanted})[MODEL]
    return loaded


def read_run(folder: Path) -> dict[str, Any]:
    """What was saved of a step beside arrays: the ``run`` of ``Checkpoints.save``."""
    found: dict[str, Any] = ocp.load_checkpointables(folder, {RUN: None})[RUN]
    return found


def stored_arrays(folder: Path) -> dict[str, Any]:
    """What ``read_arrays`` can read of a step: shape and dtype by path."""
    held: dict[str, Any] = ocp.checkpointables_metadata(folder).metadata[MODEL]
    return held


def steps_in(folder: Path) -> list[int]:
    """The steps whose checkpoints are whole, increasing."""
    if not folder.is_dir():
        return []
    with ocp.training.Checkpointer(folder) as orbax:
        return [checkpoint.step for checkpoint in orbax.checkpoints]


def _parts(state: State) -> dict[str, Any]:
    progress = {"step": state.step, "optimizer": state.optimizer, "skipped": state.skipped}
    return {MODEL: state.trained, PROGRESS: progress}


def _check_shapes(place: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for path in sorted(found.keys() ^ wanted.keys()):
        where = "only in the checkpoint" if path in found else "missing in the checkpoint"
        raise UserError(f"{place} is of another model: {path} is {where}")
    for path, array in wanted.items():
        for name in ("shape", "dtype"):
            if (has := getattr(found[path], name)) != (needs := getattr(array, name)):
                raise UserError(f"{place} is of another model: {path} has {name} {has}, not {needs}")


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Turns a full disk into a line that names the folder."""
    try:
        yield
    except Exception as fault:  # what orbax and tensorstore raise for it is of several kinds
        if any("No space left" in str(cause) for cause in _causes(fault)):
            raise UserError(f"no room on the disk of {folder} for a checkpoint: free some and start again") from fault
        raise


def _causes(fault: BaseException | None) -> Iterator[BaseException]:
    while fault is not None:
        yield fault
        fault = fault.__cause__ or fault.__context__
