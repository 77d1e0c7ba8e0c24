"""Checkpoints of a run: Orbax, one folder a step, written while training goes on.

A checkpoint has three parts, which can be read apart: ``model`` (the trained arrays by path, stacked
layout), ``progress`` (step, moments, skipped) and ``run`` (settings, data, versions). Frozen parameters
are not in it: they are those of the checkpoint that the run started from. Before a checkpoint becomes
visible, each of its files is read once more for a checksum; one whose files are not those is set aside.
"""

import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost
from orbax.checkpoint import v1 as ocp

from llava_cot_jax.errors import UserError
from llava_cot_jax.paths import is_remote, move
from llava_cot_jax.training.broadcast import first_said
from llava_cot_jax.training.checksums import find_damage, write_checksums
from llava_cot_jax.training.state import State

MODEL, PROGRESS, RUN = "model", "progress", "run"

JSON = "json"
"""The one entry of ``run``: orbax keeps neither an empty list nor None."""

METRIC = "validation_loss"
"""By which checkpoints are the best."""

TIMEOUT_SECONDS = 2 * 3600
"""For a checkpoint to be written and summed up in the background."""

ASIDE = "damaged"
"""Beside the folder of checkpoints: those that were found damaged."""


@dataclass(frozen=True)
class Kept:
    """Which checkpoints of a run are kept.

    Attributes:
        newest: so many.
        every: those of steps that are multiples of it, too; 0 is none.
        best: so many of the lowest validation loss, too.
    """

    newest: int
    every: int = 0
    best: int = 0

    def policy(self) -> ocp.training.preservation_policies.PreservationPolicy:
        """The same in orbax's terms."""
        policies = ocp.training.preservation_policies
        chosen: list[Any] = [policies.LatestN(self.newest)]
        if self.every:
            chosen.append(policies.EveryNSteps(self.every))
        if self.best:
            chosen.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics[METRIC],
                    reverse=True,
                    n=self.best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        return policies.AnyPreservationPolicy(chosen)


@dataclass(kw_only=True)
class _AsyncOptions(ocp.options.AsyncOptions):
    """Orbax's, with what each of several processes does once its own files are written."""

    before_barrier: Callable[[], None]

    def v0(self) -> Any:
        """What orbax builds from; its barriers have names."""
        wait = multihost.get_barrier_sync_fn()

        def barrier(*, key: str, timeout_ms: int) -> None:
            if "async_write_complete" in key:
                self.before_barrier()
            wait(key=key, timeout_ms=timeout_ms)

        return replace(super().v0(), barrier_sync_fn=barrier)


class Checkpoints:
    """The checkpoints in a folder; a context manager that waits for the last one to be written.

    Args:
        folder: made where there is none.
        kept: which are.
    """

    def __init__(self, folder: Path, kept: Kept) -> None:
        self._folder = folder
        self._kept = kept
        self._saving = 0
        # Functions of their own: orbax copies its options deeply, and a method's object with them.
        options = _AsyncOptions(
            timeout_secs=TIMEOUT_SECONDS,
            post_finalization_callback=lambda: self._sum_up(None),
            before_barrier=lambda: self._sum_up(jax.process_index()),
        )
        self._orbax = ocp.training.Checkpointer(
            folder,
            context=ocp.Context(async_options=options),
            preservation_policy=kept.policy(),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if failure is None:
            self.wait()
        self._orbax.close()

    def _sum_up(self, process: int | None) -> None:
        """Write the checksums of the checkpoint that is being written, but is not visible yet.

        On a disk it becomes visible by a rename, in a bucket by one file more.
        """
        unseen = list(self._folder.glob(f"{self._saving}.orbax-checkpoint-tmp*"))
        write_checksums(unseen[0] if unseen else self._folder / str(self._saving), process)

    def check_room(self, state: State) -> None:
        """Whether the disk holds the checkpoints of a run: one more than are kept, while the oldest goes.

        Those that are kept ``every`` so many steps come on top.

        Raises:
            UserError: it does not.
        """
        if is_remote(self._folder):
            return
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(_parts(state)))
        most = self._kept.newest + self._kept.best + 1
        needed = size * max(most - len(self._orbax.checkpoints), 1)
        if needed > (free := shutil.disk_usage(self._folder).free):
            raise UserError(
                f"{self._folder} has {free / 1e9:.1f} GB free; {most} checkpoints of {size / 1e9:.1f} GB "
                f"need {needed / 1e9:.1f} GB more: free some, name another output, or lower checkpoints.max_to_keep"
            )

    def save(self, state: State, run: Mapping[str, Any], validation_loss: float | None = None) -> None:
        """Begin to write a checkpoint of ``state``; it may be donated once this returns.

        Args:
            state: of the run.
            run: what ``read_run`` gives back.
            validation_loss: of the state, where it is known.

        Raises:
            UserError: the one before could not be written, or this one cannot be begun.
        """
        self.wait()
        self._saving = int(state.step)
        parts = {**_parts(state), RUN: {JSON: json.dumps(run)}}
        known = validation_loss is not None and math.isfinite(validation_loss)
        metrics = {METRIC: validation_loss} if known else None
        with _named(self._folder):
            self._orbax.save_checkpointables_async(self._saving, parts, force=True, metrics=metrics)

    def wait(self) -> None:
        """Wait until what was begun is written.

        Raises:
            UserError: it cannot be: the disk is full, say.
        """
        with _named(self._folder):
            self._orbax.wait()

    def restore(self, step: int, like: State) -> State:
        """The state of a step, laid out as ``like`` says, with its frozen arrays.

        Raises:
            UserError: it is the checkpoint of another model.
        """
        parts = _parts(like)
        found = self._orbax.checkpointables_metadata(step).metadata[MODEL]
        _check_shapes(self._folder / str(step), found, parts[MODEL])
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), parts)
        loaded = self._orbax.load_checkpointables(step, abstract)
        return State(trained=loaded[MODEL], frozen=like.frozen, **loaded[PROGRESS])


def newest_whole(folder: Path, log: Callable[[str], None]) -> int | None:
    """The newest step in a folder whose files are what was written; None without any. Damaged ones are set aside.

    Every process of the run calls this; each reads its share of the files.

    Args:
        folder: of checkpoints.
        log: Function that shows the user which checkpoints are damaged.
    """
    for step in reversed(steps_in(folder)):
        place = folder / str(step)
        damage = first_said(find_damage(place, share=(jax.process_index(), jax.process_count())))
        if not damage:
            return step
        aside = _free(folder.parent / ASIDE, step)
        if jax.process_index() == 0:
            move(place, aside)
        multihost_utils.sync_global_devices("set aside")
        log(f"the checkpoint of step {step} is damaged: {damage}; moved to {aside}, and the one before is taken")
    return None


def _free(folder: Path, step: int) -> Path:
    """A name for what is set aside that is not taken."""
    names = (str(step) if i == 0 else f"{step}-{i + 1}" for i in itertools.count())
    return next(path for name in names if not (path := folder / name).exists())


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
    found: dict[str, Any] = json.loads(ocp.load_checkpointables(folder, {RUN: None})[RUN][JSON])
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
