"""Training loop: from settings to a trained model."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from llava_cot_jax.data.loader import Loader
from llava_cot_jax.data.rows import Rows, asks_verifier, data_sets_of
from llava_cot_jax.data.sources import open_training_rows, open_validation_rows
from llava_cot_jax.data.values import ValueRows
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.sharding import partition_spec
from llava_cot_jax.progress import ProgressBar
from llava_cot_jax.training.checkpoints import Checkpoints, latest_valid_step, read_run, steps_in
from llava_cot_jax.training.fingerprints import data_fields, model_fields
from llava_cot_jax.training.metrics import MetricsWriter, Throughput, check_wandb, losses_by_stage
from llava_cot_jax.training.program import TrainProgram, make_program
from llava_cot_jax.training.report import loading_line, nothing_left_line, run_table, validation_line
from llava_cot_jax.training.resume import base_description, check_unchanged, place_description, resume_data
from llava_cot_jax.training.run import Run
from llava_cot_jax.training.run_folder import make_run_folder, run_description, write_run_folder
from llava_cot_jax.training.run_lock import RunLock
from llava_cot_jax.training.settings import TrainSettings
from llava_cot_jax.training.state import TrainState
from llava_cot_jax.training.stepper import Stepper
from llava_cot_jax.training.stopping import stop_on_interrupt

Agree = Callable[[Callable[[], Mapping[str, str]]], None]

PROFILED_STEPS = range(5, 8)
"""Steps since the start whose profiler trace is written."""


@dataclass(frozen=True)
class TrainResult:
    """Result of a run, in memory.

    Attributes:
        run: The run.
        state: State after its last step.
        complete: Whether all steps are done; a SIGTERM or Ctrl-C ends a run earlier.
        interrupted: Whether Ctrl-C ended it earlier.
    """

    run: Run
    state: TrainState
    complete: bool
    interrupted: bool = False


def train(
    settings: TrainSettings,
    *,
    log: Callable[[Any], None],
    progress_bar: ProgressBar,
    agree: Agree = lambda read: None,
    accept_changes: bool = False,
) -> TrainResult:
    """Train a model, from the latest checkpoint in the run's folder on, if there is one.

    All processes of the run must call this.

    Args:
        settings: Settings of the run.
        log: Function that shows a line, or a table of rich, to the user.
        progress_bar: Function that opens a progress bar, such as ``cli.progress_bar``.
        agree: Function that raises a ``UserError`` in all processes of the run if the named values that its argument
            returns are not the same in all of them, such as ``Lifeline.agree``.
        accept_changes: Whether to resume from a checkpoint of other settings, or other data.

    Raises:
        UserError: Before the first step: a setting, or a file that it names, cannot be used, or another run works in
            the folder. Later: data is damaged, the disk is full, or too many consecutive steps had a loss or gradient
            that is not finite.
    """
    check_wandb(settings.wandb)
    run = Run.open(settings, log, progress_bar)
    agree(lambda: model_fields(run.initial_model, steps_in(run.checkpoints_folder)))
    make_run_folder(run.folder)
    with RunLock(run.folder):
        return _train(run, agree, accept_changes)


def _train(run: Run, agree: Agree, accept_changes: bool) -> TrainResult:
    settings = run.settings
    latest = latest_valid_step(run.checkpoints_folder, run.log)
    training, validation = _open_loaders(run)
    agree(lambda: data_fields({"train": training, "validation": validation}))
    description = run_description(settings, training.fingerprint)
    before = None if latest is None else read_run(run.checkpoints_folder / str(latest))
    if before:
        check_unchanged(run, before, description, accept_changes)
        resume_data(run, before, description, training)
    write_run_folder(run.folder, settings, run.initial_model)
    steps = settings.steps or training.batches_until(settings.epochs)
    config, per_epoch, start = run.initial_model.config, training.batches_per_epoch, training.start.batches
    # The schedule goes on at the share of the data that was seen, if the first batches were of another size.
    shift = round(training.epochs_before(start) * per_epoch) - start
    program = make_program(settings, config, run.mesh, steps=steps, steps_per_epoch=per_epoch, schedule_shift=shift)
    throughput = Throughput(config, program.trained_parts, program.adapted_parts)
    with ExitStack() as after_saving, Checkpoints(run.checkpoints_folder, settings.checkpoints) as checkpoints:
        checkpoints.check_disk_space(program.state)
        checkpoints.try_saving(run.mesh)
        run.log(run_table(run, program, training, throughput, steps))
        after_saving.callback(run.initial_model.close)
        state = _first_state(run, program, checkpoints, latest)
        first = int(state.step)  # the state is there, and its base has had the time that this took
        description["base"] = base_description(run, before, accept_changes)
        if first:
            run.log(f"resuming from step {first}, the newest checkpoint in {run.folder}")
        if first >= steps:
            run.log(nothing_left_line(settings, first))
        with (
            MetricsWriter(run.folder, asdict(settings), settings.wandb, first) as metrics,
            run.progress_bar("training", "steps", settings.log_every) as update_bar,
        ):
            update_bar(first, steps)
            stepper = Stepper(program, training, range(first, steps), metrics, throughput, update_bar)
            loop = _Loop(run, program, stepper, metrics, checkpoints, training, validation, description)
            interruption = after_saving.enter_context(stop_on_interrupt())
            result = loop.run_steps(state, first, steps)
            if result.complete:
                return result
            signal = "Ctrl-C" if interruption.heard else "a SIGTERM"
            run.log(f"stopped by {signal} after step {int(result.state.step)}: the same command resumes from there")
            return replace(result, interrupted=interruption.heard)


@dataclass(frozen=True)
class _Loop:
    """Steps of a run, and the work between them."""

    run: Run
    program: TrainProgram
    stepper: Stepper
    metrics: MetricsWriter
    checkpoints: Checkpoints
    training: Loader
    validation: Loader | None
    description: Mapping[str, Any]

    def run_steps(self, state: TrainState, first: int, last: int) -> TrainResult:
        """Run the steps after ``first`` up to ``last``, or to that in which a SIGTERM arrives, and save its state."""
        settings = self.run.settings
        with ExitStack() as profile:
            for done in range(first + 1, last + 1):
                if settings.profile and done - first == PROFILED_STEPS[0]:
                    self.checkpoints.wait()  # jax's profiler may crash where it starts while threads of a save end
                    profile.enter_context(jax.profiler.trace(str(self.metrics.folder / "profile")))
                self.checkpoints.check()
                state = self.stepper.step(state)
                if settings.profile and done - first == PROFILED_STEPS[-1]:
                    self.stepper.finish()
                    profile.close()
                # One host that got a SIGTERM lets all of them stop after the same step.
                stopped = jax.distributed.is_initialized() and multihost_utils.reached_preemption_sync_point(done)
                losses: dict[str, float] = {}
                due = settings.eval_every and done % settings.eval_every == 0
                if self.validation and (done == last or (due and not stopped)):
                    losses = self._validate(state, done)
                if done % settings.checkpoints.every == 0 or done == last or stopped:
                    with self.stepper.pause("saving_seconds"):
                        description = {**self.description, "place": place_description(self.training, done)}
                        self.checkpoints.save(state, description, losses.get("validation_loss"))
                if stopped and done < last:
                    self.checkpoints.wait()
                    return TrainResult(self.run, state, complete=False)
            self.stepper.finish()
        return TrainResult(self.run, state, complete=True)

    def _validate(self, state: TrainState, step: int) -> dict[str, float]:
        """Compute, write and show the validation losses."""
        assert self.validation is not None
        with self.stepper.pause("validation_seconds"):
            losses = validate(self.program, state, self.validation)
        self.metrics.write(step, losses)
        self.run.log(validation_line(step, losses))
        return losses


def validate(program: TrainProgram, state: TrainState, loader: Loader) -> dict[str, float]:
    """Return the mean loss over a loader's rows, ``validation_loss``, and what it is made of.

    That is the loss of each stage and, where there are rows that train the verifier, the means over its replies.
    """
    by_batch = [
        jax.device_get(program.evaluate(state.trained, state.frozen, batch))
        for batch in loader.batches(0, loader.batches_per_epoch)
    ]
    # Of the structure of ``LossSums``, with arrays of NumPy.
    sums: Any = jax.tree.map(lambda *each: np.sum(np.asarray(each, np.float64), axis=0), *by_batch)
    mean = float(sums.total.sum() / max(sums.tokens.sum(), 1.0))
    losses = losses_by_stage("validation_loss", sums.total / np.maximum(sums.tokens, 1), sums.tokens)
    if sums.probes:
        losses |= {f"validation_{name}": float(value) for name, value in sums.probes.means().items()}
        mean += program.settings.verifier.weight * losses["validation_verifier_loss"]
    return {"validation_loss": mean, **losses}


def _open_loaders(run: Run) -> tuple[Loader, Loader | None]:
    """Return the loader of the rows to train on, and that of the rows to validate on, if there are any."""
    settings = run.settings
    sharding = NamedSharding(run.mesh, partition_spec(("batch",)))

    def open_loader(rows: Rows, split: str, shuffle: bool) -> Loader:
        with run.progress_bar(f"counting the tokens of {split}", "rows") as on_progress:
            return Loader(
                rows,
                run.initial_model.processor,
                settings.chat,
                settings.loader,
                sharding,
                shuffle=shuffle,
                on_progress=on_progress,
            )

    rows, held_out = open_training_rows(settings.data, settings.verifier), None
    if settings.eval_examples:
        held_out = open_validation_rows(
            settings.data, settings.validation_data, settings.eval_examples, settings.verifier
        )
    for part in data_sets_of(rows):
        if isinstance(part, ValueRows):
            run.log(part.summary)
    if settings.lora.tokens == "probe" and not all(map(asks_verifier, data_sets_of(rows, held_out))):
        raise UserError(
            "lora.tokens is probe, so that answers teach the adapter nothing: give folders of values alone as data and "
            "validation_data"
        )
    training = open_loader(rows, "train", shuffle=True)
    return training, open_loader(held_out, "validation", shuffle=False) if held_out else None


def _first_state(run: Run, program: TrainProgram, checkpoints: Checkpoints, step: int | None) -> TrainState:
    """Return the state to start from.

    It has the parameters of the initial model. If the run is resumed, those that are trained are replaced by those of
    the checkpoint of ``step``.
    """
    settings = run.settings
    arrays: dict[str, jax.Array] = {}
    if step is None or program.state.frozen:
        read = 0

        def count(done: int, total: int) -> None:
            nonlocal read
            read = done
            update_bar(done, total)

        with run.progress_bar("loading weights") as update_bar:
            arrays = run.initial_model.load_arrays(
                mesh=run.mesh, dtype=settings.optimizer.dtype, seed=settings.seed, on_progress=count
            )
        run.log(loading_line(settings.checkpoint, read))
    if step is None:
        return program.init_state(arrays)
    return checkpoints.restore(step, replace(program.state, frozen=program.frozen_arrays(arrays)))
