"""The training loop: from settings to a trained model, top to bottom."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from llava_cot_jax.data.loader import Loader
from llava_cot_jax.data.rows import FirstRows
from llava_cot_jax.data.sources import open_rows
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.sharding import check_mesh, partition_spec
from llava_cot_jax.paths import as_path
from llava_cot_jax.stages import STAGES
from llava_cot_jax.training.checkpoints import Checkpoints, Kept, newest_whole, read_run
from llava_cot_jax.training.initial_model import Origin
from llava_cot_jax.training.layout import CHECKPOINTS, relocated
from llava_cot_jax.training.metrics import Meter, Metrics, by_stage, check_wandb
from llava_cot_jax.training.program import Program, check_batch, make_program, run_mesh
from llava_cot_jax.training.report import ProgressBar, describe_loading, describe_run, describe_validation
from llava_cot_jax.training.run_folder import (
    describe,
    differences,
    make_run_folder,
    other_versions,
    write_run_folder,
)
from llava_cot_jax.training.run_lock import RunLock
from llava_cot_jax.training.settings import TrainSettings
from llava_cot_jax.training.state import State
from llava_cot_jax.training.stepper import Stepper

PROFILED = range(5, 8)
"""Of the steps since a start, those whose trace is written."""


@dataclass(frozen=True)
class Trained:
    """What a run leaves in memory.

    Attributes:
        origin: what it started from.
        mesh: that the state lies on.
        state: the last one.
        complete: whether no step is left; a SIGTERM ends a run before.
    """

    origin: Origin
    mesh: Mesh
    state: State
    complete: bool


def train(
    settings: TrainSettings, *, log: Callable[[Any], None], progress_bar: ProgressBar, accept_changes: bool = False
) -> Trained:
    """Run ``settings``: from the newest checkpoint in its folder on, where there is one.

    Every process of the run calls this.

    Args:
        settings: see there.
        log: Function that shows a line, or a table of rich, to the user.
        progress_bar: Context manager that shows a progress bar, such as ``cli.progress_bar``.
        accept_changes: go on from a checkpoint of other settings, or other data.

    Raises:
        UserError: anything in the settings, or in the files that they name, that cannot be used, or another
            run in the folder: before the first step; damaged data, a full disk, or several steps in a row
            whose loss or gradient is not finite: later.
    """
    settings = settings.with_absolute_paths()
    check_wandb(settings.wandb)
    mesh = run_mesh(settings.mesh)
    origin = Origin(settings.checkpoint, settings.convention, settings.random_init)
    check_batch(settings, mesh)
    check_mesh(origin.config, mesh)
    folder = as_path(settings.output)
    make_run_folder(folder)
    with RunLock(folder):
        return _train(settings, origin, mesh, folder, log, progress_bar, accept_changes)


def _train(
    settings: TrainSettings,
    origin: Origin,
    mesh: Mesh,
    folder: Path,
    log: Callable[[Any], None],
    progress_bar: ProgressBar,
    accept_changes: bool,
) -> Trained:
    newest = newest_whole(folder / CHECKPOINTS, log)
    training, validation = _loaders(settings, origin, mesh, progress_bar)
    description = describe(settings, training.fingerprint)
    if newest is not None:
        before = read_run(folder / CHECKPOINTS / str(newest))
        before["settings"] = relocated(before["settings"], folder)
        _check_unchanged(before, description, log, accept_changes)
    write_run_folder(folder, settings, origin)
    steps = settings.steps or settings.epochs * training.batches_per_epoch
    program = make_program(settings, origin.config, mesh, steps=steps, steps_per_epoch=training.batches_per_epoch)
    meter = Meter(origin.config, program.trained, program.adapted)
    kept = Kept(settings.checkpoints.max_to_keep, settings.checkpoints.keep_period, settings.checkpoints.best_n)
    with Checkpoints(folder / CHECKPOINTS, kept) as checkpoints:
        checkpoints.check_room(program.state)
        log(describe_run(settings, origin.config, mesh, program, training, meter, steps))
        state = _first_state(settings, origin, mesh, program, checkpoints, newest, log, progress_bar)
        first = int(state.step)
        if first:
            log(f"going on from step {first}, the newest checkpoint in {folder}")
        with (
            Metrics(folder, asdict(settings), settings.wandb, first) as metrics,
            progress_bar("training", "steps", settings.log_every) as bar,
        ):
            stepper = Stepper(program, training, range(first, steps), meter, metrics, bar, settings.max_nonfinite_steps)
            for done in range(first + 1, steps + 1):
                if settings.profile and done - first == PROFILED.start:
                    jax.profiler.start_trace(str(metrics.folder / "profile"))
                state = stepper.step(state)
                if settings.profile and done - first == PROFILED.stop:
                    stepper.finish()
                    jax.profiler.stop_trace()
                # One host that got a SIGTERM lets all of them stop after the same step.
                stopped = jax.distributed.is_initialized() and multihost_utils.reached_preemption_sync_point(done)
                found: dict[str, float] = {}
                due = settings.eval_every and done % settings.eval_every == 0
                if validation and (done == steps or (due and not stopped)):
                    with stepper.pause("validation_seconds"):
                        found = validate(program, state, validation)
                    metrics.write(done, found)
                    log(describe_validation(done, found))
                if done % settings.checkpoints.every == 0 or done == steps or stopped:
                    with stepper.pause("saving_seconds"):
                        checkpoints.save(state, description, found.get("validation_loss"))
                if stopped and done < steps:
                    checkpoints.wait()
                    log(f"stopped by a SIGTERM after step {done}: the same command goes on from there")
                    return Trained(origin, mesh, state, complete=False)
            stepper.finish()
    return Trained(origin, mesh, state, complete=True)


def _check_unchanged(
    before: Mapping[str, Any], now: Mapping[str, Any], log: Callable[[Any], None], accept_changes: bool
) -> None:
    """Whether a run goes on as it was begun.

    Raises:
        UserError: it does not, and nobody said that it may.
    """
    if versions := other_versions(before, now):
        log(f"the newest checkpoint was written with other versions: {'; '.join(versions)}")
    if changed := differences(before, now):
        if not accept_changes:
            raise UserError(
                f"the run was begun otherwise: {'; '.join(changed)}. Take that back, name another output, or go on "
                "with it by --accept_changes true"
            )
        log(f"going on with changes: {'; '.join(changed)}")


def validate(program: Program, state: State, loader: Loader) -> dict[str, float]:
    """The mean loss over all trained tokens of a loader's rows: ``validation_loss``, and that of each stage."""
    totals, tokens = np.zeros(1 + len(STAGES)), np.zeros(1 + len(STAGES))
    for batch in loader.batches(0, loader.batches_per_epoch):
        found = jax.device_get(program.evaluate(state.trained, state.frozen, batch))
        totals, tokens = totals + found.total, tokens + found.tokens
    whole = float(totals.sum() / tokens.sum())
    return {"validation_loss": whole, **by_stage("validation_loss", totals / np.maximum(tokens, 1), tokens)}


def _loaders(
    settings: TrainSettings, origin: Origin, mesh: Mesh, progress_bar: ProgressBar
) -> tuple[Loader, Loader | None]:
    """Of the rows to train on, and of those to validate with."""
    sharding = NamedSharding(mesh, partition_spec(("batch",)))

    def open_loader(split: str, count: int | None) -> Loader:
        rows = open_rows(settings.data, split)
        with progress_bar(f"counting the tokens of {split}", "rows") as on_progress:
            return Loader(
                rows if count is None else FirstRows(rows, count),
                origin.processor,
                settings.chat,
                settings.loader,
                sharding,
                shuffle=count is None,
                on_progress=on_progress,
            )

    training = open_loader("train", None)
    return training, open_loader("validation", settings.eval_examples) if settings.eval_examples else None


def _first_state(
    settings: TrainSettings,
    origin: Origin,
    mesh: Mesh,
    program: Program,
    checkpoints: Checkpoints,
    step: int | None,
    log: Callable[[Any], None],
    progress_bar: ProgressBar,
) -> State:
    """The state to go on from.

    1. The parameters of the checkpoint that the run starts from, or fresh ones.
    2. Where the run was cut off, in place of those that are trained, those that it saved after ``step``.
    """
    arrays: dict[str, jax.Array] = {}
    if step is None or program.state.frozen:
        read = 0

        def count(done: int, total: int) -> None:
            nonlocal read
            read = done
            move(done, total)

        with progress_bar("loading weights") as move:
            arrays = origin.arrays(mesh=mesh, dtype=settings.optimizer.dtype, seed=settings.seed, on_progress=count)
        log(describe_loading(settings.checkpoint, read))
    if step is None:
        return program.begin(arrays)
    return checkpoints.restore(step, replace(program.state, frozen=program.frozen(arrays)))
