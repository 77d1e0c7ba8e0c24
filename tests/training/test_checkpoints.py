"""Which checkpoints are kept, and what happens to one that a disk has spoilt."""

import os
import re
import time
from dataclasses import asdict, replace
from pathlib import Path
from threading import Event
from typing import Any

import jax
import numpy as np
import pytest

from llava_cot_jax.errors import UserError
from llava_cot_jax.memory_errors import describe_exhausted_memory
from llava_cot_jax.training import checkpoints as checkpoints_module
from llava_cot_jax.training.checkpoints import Checkpoints, latest_valid_step, read_run, steps_in
from llava_cot_jax.training.checksums import CHECKSUMS_FILE, find_damage
from llava_cot_jax.training.export import RunExport
from llava_cot_jax.training.layout import CHECKPOINTS
from llava_cot_jax.training.run_folder import (
    CHANGEABLE_SETTINGS,
    changed_settings,
    changed_versions,
    run_description,
)
from llava_cot_jax.training.settings import CheckpointSettings, TrainSettings
from tests.tiers import EXHAUSTIVE
from tests.training.small_run import write_small
from tests.training.stepless import stepless_place  # noqa: F401 - a fixture
from tests.training.test_export import Run, begin, save
from tests.training.test_settings import BASE, COMPUTED, HELD_OUT, LOADED, READ_AHEAD, RUN, STARTED, changed

MESH = {"mesh.data", "mesh.fsdp", "mesh.tensor"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    return begin(write_small(folder / "small"), folder / "out", frozen_params=["vision_model"])


@pytest.fixture
def output(run: Run, tmp_path: Path) -> Path:
    """A run that saved steps 3 and 4."""
    save(run, tmp_path / "run", steps=(3, 4))
    return tmp_path / "run"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kept", "steps"),
    [
        pytest.param(CheckpointSettings(max_to_keep=1), [6], marks=EXHAUSTIVE),
        pytest.param(CheckpointSettings(max_to_keep=2), [5, 6], marks=EXHAUSTIVE),
        pytest.param(CheckpointSettings(max_to_keep=1, keep_period=2), [2, 4, 6], marks=EXHAUSTIVE),
        pytest.param(CheckpointSettings(max_to_keep=1, best_n=1), [3, 6], marks=EXHAUSTIVE),
        (CheckpointSettings(max_to_keep=1, best_n=2), [1, 3, 6]),  # step 2 was not validated
        (CheckpointSettings(max_to_keep=1, keep_period=5, best_n=1), [3, 5, 6]),
    ],
)
def test_what_is_kept(run, tmp_path, kept, steps):
    losses = {1: 2.0, 3: 1.0, 5: 3.0}
    with Checkpoints(tmp_path / "run", kept) as checkpoints:
        for step in range(1, 7):
            state = replace(run.state, step=jax.device_put(np.int32(step), run.state.step.sharding))
            checkpoints.save(state, {}, losses.get(step))
    assert steps_in(tmp_path / "run") == steps


class TestSavingFails:
    """In the background, while steps are made."""

    def test_it_is_told_at_the_next_step(self, run, tmp_path, monkeypatch):
        """Once it is known; before, a step does not wait for it."""
        ended = Event()

        def write(folder: Path) -> None:
            ended.wait()
            raise PermissionError(13, "Permission denied", str(folder))

        monkeypatch.setattr(checkpoints_module, "write_checksums", write)
        with (
            pytest.raises(UserError, match=r"^a checkpoint cannot be written to .*run: Permission denied"),
            Checkpoints(tmp_path / "run", CheckpointSettings()) as checkpoints,
        ):
            checkpoints.check()
            checkpoints.save(run.state, {})
            for _ in range(3):
                checkpoints.check()
            ended.set()
            for _ in range(1000):
                checkpoints.check()
                time.sleep(0.01)

    def test_exhausted_memory_is_no_fault_of_the_folder(self, run, tmp_path, monkeypatch):
        def write(folder: Path) -> None:
            raise MemoryError

        monkeypatch.setattr(checkpoints_module, "write_checksums", write)
        with Checkpoints(tmp_path / "run", CheckpointSettings()) as checkpoints:
            checkpoints.save(run.state, {})
            with pytest.raises(Exception) as told:
                checkpoints.wait()
        assert not isinstance(told.value, UserError) and describe_exhausted_memory(told.value) == "out of memory"

    def test_a_trial_tells_it_before_the_first_step(self, run, tmp_path, monkeypatch):
        (tmp_path / "run").mkdir()
        mesh = run.program.mesh
        with Checkpoints(tmp_path / "run", CheckpointSettings()) as checkpoints:
            (tmp_path / "run/.trial/0").mkdir(parents=True)  # as a run leaves it that was killed
            checkpoints.try_saving(mesh)
            assert list((tmp_path / "run").iterdir()) == [] and steps_in(tmp_path / "run") == []
            assert latest_valid_step(tmp_path / "run", print) is None
            (tmp_path / "run/.trial").write_text("a file in place of the folder")
            with pytest.raises(UserError, match=r"^a checkpoint cannot be written to .*run: Not a directory"):
                checkpoints.try_saving(mesh)
            (tmp_path / "run/.trial").unlink()
            monkeypatch.setattr(checkpoints_module, "write_checksums", lambda folder: None)
            with pytest.raises(UserError, match=r"is not what was written: checksums\.json is missing"):
                checkpoints.try_saving(mesh)

    def test_a_run_is_not_begun(self, place, monkeypatch):
        def refuse(folder: Path) -> None:
            raise OSError(30, "Read-only file system", str(folder))

        monkeypatch.setattr(checkpoints_module, "write_checksums", refuse)
        with pytest.raises(UserError, match="Read-only file system"):
            place.run("refused", steps=1)
        assert place.rows == ()


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(step: Path) -> str:
    path = largest(step / "model")
    os.truncate(path, path.stat().st_size // 2)
    return f"{path.name} has .* bytes instead of"


def delete(step: Path) -> str:
    path = largest(step / "progress")
    path.unlink()
    return f"{path.name} is missing"


def flip(step: Path) -> str:
    """64 bytes in the middle of an array: orbax alone reads them without a word."""
    path = largest(step / "model")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(byte ^ 0xFF for byte in content[middle : middle + 64])
    path.write_bytes(content)
    return f"{path.name} is not what was written"


def delete_checksums(step: Path) -> str:
    (step / CHECKSUMS_FILE).unlink()
    return f"{CHECKSUMS_FILE} is missing"


def truncate_checksums(step: Path) -> str:
    os.truncate(step / CHECKSUMS_FILE, 100)
    return f"{CHECKSUMS_FILE} is damaged"


SPOILING = [truncate, delete, flip, delete_checksums, truncate_checksums]


class TestDamage:
    @pytest.mark.slow
    @pytest.mark.parametrize("spoil", SPOILING)
    def test_it_is_named_and_the_one_before_is_taken(self, run, output, spoil):
        folder, told = output / CHECKPOINTS, []
        whole = {path.name: path.read_bytes() for path in (folder / "3").rglob("*") if path.is_file()}
        named = spoil(folder / "4")
        spoilt = {path.name for path in (folder / "4").rglob("*")}
        assert latest_valid_step(folder, told.append) == 3
        (line,) = told
        assert line.startswith("the checkpoint of step 4 is damaged: ")
        assert re.search(named, line)
        assert {path.name for path in (output / "damaged/4").rglob("*")} == spoilt  # nothing of it is lost
        assert {path.name: path.read_bytes() for path in (folder / "3").rglob("*") if path.is_file()} == whole
        with Checkpoints(folder, CheckpointSettings(max_to_keep=2)) as checkpoints:
            state = checkpoints.restore(3, replace(run.program.state, frozen=run.state.frozen))
            jax.tree.map(np.testing.assert_array_equal, state.trained, run.state.trained)
            checkpoints.save(replace(state, step=state.step + 1), {})  # step 4 again
        assert latest_valid_step(folder, told.append) == 4

    @pytest.mark.slow
    def test_all_are_damaged(self, output):
        told: list[str] = []
        for step in ("3", "4"):
            flip(output / CHECKPOINTS / step)
        assert latest_valid_step(output / CHECKPOINTS, told.append) is None
        assert len(told) == 2 and steps_in(output / CHECKPOINTS) == []

    def test_each_process_reads_its_share(self, output):
        """Every file is in exactly one of three shares."""
        step = output / CHECKPOINTS / "4"
        files = [path for path in step.rglob("*") if path.is_file() and path.stat().st_size]
        found = []
        for path in files:
            content = path.read_bytes()
            path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
            found.append([bool(find_damage(step, share=(i, 3))) for i in range(3)])
            path.write_bytes(content)
        known = [shares for path, shares in zip(files, found, strict=True) if path.name not in unverified(path)]
        assert len(known) > 15 and {sum(shares) for shares in known} == {1}

    @pytest.mark.slow
    def test_parameters_are_exported_without_the_rest(self, output, tmp_path):
        """Not a byte of the optimizer is read; the parameters are, and must be whole."""
        step = output / CHECKPOINTS / "4"
        for path in sorted((step / "progress").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        export = RunExport(output)
        export.write(tmp_path / "model", export.config)
        flip(step)
        with pytest.raises(UserError, match=r"4 is damaged: model/\S+ is not what was written.*--step: 3$"):
            RunExport(output)
        assert RunExport(output, 3).step == 3


def unverified(path: Path) -> set[str]:
    """The checksums themselves, and what orbax changes once more after they are taken."""
    outer = {"commit_success.txt"} if path.parent.name.isdigit() else set()
    return {CHECKSUMS_FILE, "_CHECKPOINT_METADATA", *outer}


class TestDescription:
    def test_a_checkpoint_holds_it(self, run, output):
        held = read_run(output / CHECKPOINTS / "4")
        now = run_description(run.settings, "data")
        assert changed_settings(held, now) == [] and changed_versions(held, now) == []
        assert held["settings"]["frozen_params"] == ["vision_model"] and held["settings"]["convention"] is None
        assert {"jax", "orbax-checkpoint", "python"} <= held["versions"].keys()

    @pytest.mark.parametrize("name", sorted({*COMPUTED, *LOADED, *STARTED} - MESH))
    def test_what_changes_the_outcome_is_told(self, name):
        value = {**COMPUTED, **LOADED, **STARTED}[name]
        found = changed_settings(run_description(BASE, "data"), run_description(changed(BASE, name, value), "data"))
        # Rounding aside; and data is told by the fingerprint of its batches, wherever it lies.
        if name in ("grad_accum_steps", "remat", "data"):
            assert found == []
        else:
            (told,) = (line for line in found if line.startswith(f"{name} was "))
            assert told.endswith(f", now {value}")

    def test_what_does_not_is_free(self):
        other: dict[str, Any] = {
            "output": "x",
            "data": {"x": 2.0, "y": 0.5},
            "validation_data": "x",
            "checkpoints.every": 7,
            "checkpoints.max_to_keep": 7,
            "checkpoints.keep_period": 7,
            "checkpoints.best_n": 7,
            "max_nonfinite_steps": 7,
            "eval_every": 7,
            "eval_examples": 7,
            "log_every": 7,
            "eval_generations": 7,
            "profile": True,
            "wandb": "x",
            "mesh.data": 2,
            "mesh.fsdp": 8,
            "mesh.tensor": 2,
            "loader.num_workers": 7,
            "loader.num_threads": 7,
            "verifier.judge_prompts": "x",
        }
        names = {*RUN, *READ_AHEAD, *MESH, *HELD_OUT, "data", "verifier.judge_prompts"}
        assert names == other.keys() == CHANGEABLE_SETTINGS - {"grad_accum_steps", "remat"}
        settings: TrainSettings = BASE
        for name, value in other.items():
            settings = changed(settings, name, value)
        assert asdict(settings) != asdict(BASE)
        assert changed_settings(run_description(BASE, "data"), run_description(settings, "data")) == []

    @pytest.mark.parametrize("name", ["output_dtype", "mesh_order", "profiles", "loader.threads_order"])
    def test_a_name_that_begins_like_one_of_those_is_told(self, name):
        before, now = run_description(BASE, "data"), run_description(BASE, "data")
        now["settings"][name] = 1
        assert changed_settings(before, now) == [f"{name} was not known, now 1"]

    def test_a_run_of_an_earlier_version_goes_on(self):
        """Its description lacks the settings of the verifier, which it trained without."""
        before, now = run_description(BASE, "data"), run_description(BASE, "data")
        del before["settings"]["verifier"], before["settings"]["lora"]["tokens"]
        assert changed_settings(before, now) == []
        settings = changed(BASE, "lora.tokens", "probe")
        for name, value in {"verifier.targets": "hard", "verifier.stage_weights": {"CAPTION": 2.0}}.items():
            settings = changed(settings, name, value)
        assert changed_settings(before, run_description(settings, "data")) == [
            "lora.rank was 0, now 4",
            "lora.tokens was all, now probe",
            "verifier.stage_weights.CAPTION was not known, now 2.0",
            "verifier.targets was soft, now hard",
        ]

    def test_other_data_and_versions_are_told(self):
        before, now = run_description(BASE, "some"), run_description(BASE, "other")
        assert changed_settings(before, now) == ["the data's batches was some, now other"]
        before["versions"]["jax"] = "0.1"
        assert changed_versions(before, now) == [f"jax was 0.1, now {jax.__version__}"]
