"""Checkpoints of a run, which Orbax writes while training goes on, each in a folder named by its step.

A checkpoint has three parts, which can be read separately: ``model`` (the trained arrays by path, in the stacked
layout), ``progress`` (step, optimizer state, skipped) and ``run`` (settings, data, versions). Frozen parameters are
not in it: they are those of the checkpoint that the run started from. Before a checkpoint becomes visible, the first
process reads its files once more and writes their checksums. A checkpoint whose files do not match is set aside.
"""

import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from llava_cot_jax.errors import UserError, causes
from llava_cot_jax.hosts.broadcast import broadcast_string
from llava_cot_jax.memory_errors import describe_exhausted_memory
from llava_cot_jax.paths import is_remote, move, remove_folder
from llava_cot_jax.training.checksums import find_damage, write_checksums
from llava_cot_jax.training.settings import CheckpointSettings
from llava_cot_jax.training.state import TrainState

MODEL_PART, PROGRESS_PART, RUN_PART = "model", "progress", "run"
"""Names of the three parts of a checkpoint, which Orbax calls checkpointables."""

DAMAGED_FOLDER = "damaged"
"""Name of the folder in that of the run to which damaged checkpoints are moved."""

TIMEOUT_SECONDS = 2 * 3600
"""Time in which a checkpoint and its checksums must be written in the background."""

CLOSING_SECONDS = 60.0
"""Time that a process of several which has failed gives the last checkpoint: others may never write their part."""

_JSON = "json"
"""The only entry of the part ``run``: Orbax keeps neither an empty list nor None."""

_TRIAL_FOLDER = ".trial"
"""Name of the folder among the checkpoints to which one is written on trial."""

_METRIC = "validation_loss"
"""Metric by which the best checkpoints are chosen."""


def preservation_policy(settings: CheckpointSettings) -> ocp.training.preservation_policies.PreservationPolicy:
    """Return Orbax's policy for the checkpoints that ``settings`` keep."""
    policies = ocp.training.preservation_policies
    chosen: list[Any] = [policies.LatestN(settings.max_to_keep)]
    if settings.keep_period:
        chosen.append(policies.EveryNSteps(settings.keep_period))
    if settings.best_n:
        chosen.append(
            policies.BestN(
                get_metric_fn=lambda metrics: metrics[_METRIC],
                reverse=True,
                n=settings.best_n,
                keep_checkpoints_without_metrics=False,
            )
        )
    return policies.AnyPreservationPolicy(chosen)


class Checkpoints:
    """Checkpoints in a folder: a context manager that waits for the last one to be written.

    Args:
        folder: Folder of the checkpoints. It is made if there is none.
        settings: Settings of which checkpoints are kept.
    """

    def __init__(self, folder: Path, settings: CheckpointSettings) -> None:
        self._folder = folder
        self._settings = settings
        self._saving = 0
        self._unchecked = False  # whether a checkpoint was started, and nobody has asked yet how it ended
        options = ocp.options.AsyncOptions(
            timeout_secs=TIMEOUT_SECONDS,
            # A method would not do: Orbax copies its options deeply, and the method's object with them.
            post_finalization_callback=lambda: self._write_checksums(),
        )
        self._orbax = ocp.training.Checkpointer(
            folder,
            context=ocp.Context(async_options=options),
            preservation_policy=preservation_policy(settings),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if failure is None:
            self.wait()
            self._orbax.close()
            return
        closing = Thread(target=self._close_after_failure, daemon=True)
        closing.start()
        closing.join(CLOSING_SECONDS if jax.process_count() > 1 else None)

    def _close_after_failure(self) -> None:
        """Let the checkpoint that was started be written. Its own failure would hide the first one."""
        with suppress(Exception):
            self._orbax.close()

    def _write_checksums(self) -> None:
        """Write the checksums of the checkpoint that is written, but not yet visible. Orbax's first process calls this.

        On a disk, the checkpoint becomes visible by a rename afterwards; in a bucket, by one more file.
        """
        temporary = list(self._folder.glob(f"{self._saving}.orbax-checkpoint-tmp*"))
        write_checksums(temporary[0] if temporary else self._folder / str(self._saving))

    def check_disk_space(self, state: TrainState) -> None:
        """Check that the disk has space for the checkpoints of a run: one more than are kept.

        Those that are kept because of ``keep_period`` come on top and are not counted.

        Raises:
            UserError: It does not.
        """
        if is_remote(self._folder):
            return
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(_array_parts(state)))
        most = self._settings.max_to_keep + self._settings.best_n + 1
        needed = size * max(most - len(self._orbax.checkpoints), 1)
        if needed > (free := shutil.disk_usage(self._folder).free):
            raise UserError(
                f"{self._folder} has {free / 1e9:.1f} GB free; {most} checkpoints of {size / 1e9:.1f} GB "
                f"need {needed / 1e9:.1f} GB more: free some, name another output, or lower checkpoints.max_to_keep"
            )

    def save(self, state: TrainState, run: Mapping[str, Any], validation_loss: float | None = None) -> None:
        """Start to write a checkpoint of ``state``, which may be donated once this returns.

        Args:
            state: State of the run.
            run: Description of the run, which ``read_run`` returns.
            validation_loss: Validation loss of the state, if it is known.

        Raises:
            UserError: The checkpoint before could not be written, or this one cannot be started.
        """
        self.wait()
        self._saving, self._unchecked = int(state.step), True
        parts = {**_array_parts(state), RUN_PART: {_JSON: json.dumps(run)}}
        known = validation_loss is not None and math.isfinite(validation_loss)
        metrics = {_METRIC: validation_loss} if known else None
        with _saving_errors(self._folder):
            self._orbax.save_checkpointables_async(self._saving, parts, force=True, metrics=metrics)

    def wait(self) -> None:
        """Wait until the checkpoint that was started is written.

        Raises:
            UserError: It cannot be written: the disk is full, for example.
        """
        self._unchecked = False
        with _saving_errors(self._folder):
            self._orbax.wait()

    def check(self) -> None:
        """Check, without waiting, whether the checkpoint that was started has failed by now.

        Raises:
            UserError: It cannot be written.
        """
        if self._unchecked and not self._orbax.is_saving_in_progress():
            self.wait()

    def try_saving(self, mesh: Mesh) -> None:
        """Write a small checkpoint in the way of all others, with a share of every device, and remove it.

        What would keep a run from saving its work is found so before the work is done.

        Args:
            mesh: Mesh over the devices of all processes.

        Raises:
            UserError: A checkpoint cannot be written in this folder, read, or removed.
        """
        folder = self._folder / _TRIAL_FOLDER
        with _saving_errors(self._folder):
            _remove_together(folder)
            sharding, step = NamedSharding(mesh, PartitionSpec(mesh.axis_names)), NamedSharding(mesh, PartitionSpec())
            zeros = jax.jit(lambda: jnp.zeros(mesh.size), out_shardings=sharding)()
            zero = jax.jit(lambda: jnp.int32(0), out_shardings=step)()
            with Checkpoints(folder, CheckpointSettings()) as trial:
                trial.save(TrainState(zero, {"trial": zeros}, {}, {"trial": zeros}, zero), {})
            if damage := broadcast_string(find_damage(folder / "0", share=(jax.process_index(), jax.process_count()))):
                raise UserError(f"a checkpoint in {self._folder} is not what was written: {damage}")
            _remove_together(folder)

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Return the state of a step, with the shardings and the frozen arrays of ``like``.

        Raises:
            UserError: It is the checkpoint of another model.
        """
        parts = _array_parts(like)
        found = self._orbax.checkpointables_metadata(step).metadata[MODEL_PART]
        _check_shapes(self._folder / str(step), found, parts[MODEL_PART])
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), parts)
        loaded = self._orbax.load_checkpointables(step, abstract)
        return TrainState(trained=loaded[MODEL_PART], frozen=like.frozen, **loaded[PROGRESS_PART])


def latest_valid_step(folder: Path, log: Callable[[str], None]) -> int | None:
    """Return the latest step whose checkpoint is undamaged, or None if there is none. Damaged ones are set aside.

    All processes of the run must call this; each reads its share of the files.

    Args:
        folder: Folder of the checkpoints.
        log: Function that shows the user which checkpoints are damaged.
    """
    for step in reversed(steps_in(folder)):
        place = folder / str(step)
        damage = broadcast_string(find_damage(place, share=(jax.process_index(), jax.process_count())))
        if not damage:
            return step
        aside = _unused_path(folder.parent / DAMAGED_FOLDER, step)
        if jax.process_index() == 0:
            move(place, aside)
        multihost_utils.sync_global_devices("set aside")
        log(f"the checkpoint of step {step} is damaged: {damage}; moved to {aside}, and the one before is taken")
    return None


def _unused_path(folder: Path, step: int) -> Path:
    """Return a path in ``folder`` for a damaged checkpoint that is not in use."""
    names = (str(step) if i == 0 else f"{step}-{i + 1}" for i in itertools.count())
    return next(path for name in names if not (path := folder / name).exists())


def read_arrays(folder: Path, paths: list[str]) -> dict[str, np.ndarray]:
    """Read some trained arrays of a checkpoint whole, onto the host, whatever mesh they were written from.

    Args:
        folder: Folder of the checkpoint.
        paths: Paths of arrays that it holds.
    """
    held = stored_arrays(folder)
    wanted = {path: np.empty(0, held[path].dtype) for path in paths}
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        loaded: dict[str, np.ndarray] = ocp.load_checkpointables(folder, {MODEL_PART: wanted})[MODEL_PART]
    return loaded


def read_run(folder: Path) -> dict[str, Any]:
    """Read the description of the run from the folder of a checkpoint: the ``run`` of ``Checkpoints.save``."""
    found: dict[str, Any] = json.loads(ocp.load_checkpointables(folder, {RUN_PART: None})[RUN_PART][_JSON])
    return found


def stored_arrays(folder: Path) -> dict[str, Any]:
    """Return the shape and dtype of each array that ``read_arrays`` can read from a checkpoint's folder, by path."""
    held: dict[str, Any] = ocp.checkpointables_metadata(folder).metadata[MODEL_PART]
    return held


def steps_in(folder: Path) -> list[int]:
    """Return the steps in a folder whose checkpoints are complete, in increasing order."""
    if not folder.is_dir():
        return []
    with ocp.training.Checkpointer(folder) as orbax:
        return [checkpoint.step for checkpoint in orbax.checkpoints]


def _array_parts(state: TrainState) -> dict[str, Any]:
    progress = {"step": state.step, "optimizer": state.optimizer, "skipped": state.skipped}
    return {MODEL_PART: state.trained, PROGRESS_PART: progress}


def _check_shapes(place: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for path in sorted(found.keys() ^ wanted.keys()):
        where = "only in the checkpoint" if path in found else "missing in the checkpoint"
        raise UserError(f"{place} is of another model: {path} is {where}")
    for path, array in wanted.items():
        for name in ("shape", "dtype"):
            if (has := getattr(found[path], name)) != (needs := getattr(array, name)):
                raise UserError(f"{place} is of another model: {path} has {name} {has}, not {needs}")


def _remove_together(folder: Path) -> None:
    """Remove a folder of all processes, if there is one. All of them must call this."""
    if jax.process_index() == 0:
        remove_folder(folder)
    multihost_utils.sync_global_devices(f"removed {folder.name}")


@contextmanager
def _saving_errors(folder: Path) -> Iterator[None]:
    """Turn what Orbax, TensorStore and a disk or bucket raise in a save into a ``UserError`` that names ``folder``.

    Exhausted memory is raised as it is, since the folder is not at fault.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as fault:
        if describe_exhausted_memory(fault):
            raise
        led_here = list(causes(fault))
        if any("No space left" in str(cause) or "quota exceeded" in str(cause).lower() for cause in led_here):
            raise UserError(f"no room on the disk of {folder} for a checkpoint: free some and start again") from fault
        reasons = [cause.strerror for cause in led_here if isinstance(cause, OSError) and cause.strerror]
        # TensorStore's messages end with the places in its source.
        reason = (*reasons, str(led_here[-1]).partition(" [")[0].strip() or type(led_here[-1]).__name__)[0]
        raise UserError(
            f"a checkpoint cannot be written to {folder}: {' '.join(reason.split())}. Correct this and start again: "
            "the run goes on from its newest checkpoint"
        ) from fault
