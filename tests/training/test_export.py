"""Checkpoints of a run and the models exported from them, for every way to train."""

import json
import shutil
import warnings
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peft
import pytest
from safetensors.numpy import load_file
from transformers import MllamaForConditionalGeneration

from llava_cot_jax.convert import main as convert
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.training.checkpoints import Checkpoints, steps_in, stored_arrays
from llava_cot_jax.training.export import RunExport
from llava_cot_jax.training.initial_model import InitialModel
from llava_cot_jax.training.layout import CHECKPOINTS, is_run
from llava_cot_jax.training.program import TrainProgram, make_program, make_run_mesh
from llava_cot_jax.training.run_folder import make_run_folder, run_description, write_run_folder
from llava_cot_jax.training.settings import (
    CheckpointSettings,
    LoraSettings,
    MeshSettings,
    OptimizerSettings,
    TrainSettings,
)
from llava_cot_jax.training.state import TrainState
from tests.parity.reference import logits_of, under
from tests.parity.test_transformers import OFF
from tests.training.small_run import write_small

Run = namedtuple("Run", "settings initial_model program state")


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("export") / "small")


KEPT = CheckpointSettings(max_to_keep=2)


def begin(checkpoint: Path | str, output: Path, **settings: Any) -> Run:
    """A run on eight devices before its first step, its trained arrays moved at random as if by some."""
    given = TrainSettings(str(output), str(checkpoint), "shapes", dtype="float32", **settings)
    given = replace(given, mesh=MeshSettings(data=2, fsdp=2, tensor=2))
    initial_model = InitialModel(given.checkpoint, given.convention, given.random_init)
    mesh = make_run_mesh(given.mesh)
    program = make_program(given, initial_model.config, mesh, steps=4, steps_per_epoch=4)
    arrays = initial_model.load_arrays(
        mesh=mesh, dtype=given.optimizer.dtype, seed=given.seed, on_progress=lambda d, t: None
    )
    state = program.init_state(arrays)
    draw = np.random.default_rng(0)

    def move(x: jax.Array) -> jax.Array:
        return jax.device_put((np.asarray(x, np.float32) + draw.normal(0, 0.1, x.shape)).astype(x.dtype), x.sharding)

    return Run(given, initial_model, program, replace(state, trained=jax.tree.map(move, state.trained)))


def save(run: Run, output: Path, steps: tuple[int, ...] = (3,)) -> None:
    make_run_folder(output)
    write_run_folder(output, run.settings, run.initial_model)
    with Checkpoints(output / CHECKPOINTS, KEPT) as checkpoints:
        for step in steps:
            state = replace(run.state, step=jax.device_put(np.int32(step), run.state.step.sharding))
            checkpoints.save(state, run_description(run.settings, "data"))


def exported(output: Path, folder: Path, **more: Any) -> dict[str, np.ndarray]:
    run = RunExport(output)
    run.write(folder, run.config, **more)
    tensors: dict[str, np.ndarray] = load_file(folder / "model.safetensors")
    return tensors


def tensors_of(program: TrainProgram, state: TrainState) -> dict[str, np.ndarray]:
    """Every published tensor of a state, by its name."""
    found: dict[str, np.ndarray] = {}
    for path, array in {**state.trained, **state.frozen}.items():
        parameter = program.table[path]
        parts = np.asarray(array) if parameter.stacked else [np.asarray(array)]
        found |= dict(zip(parameter.tensors, parts, strict=True))
    return found


@pytest.fixture(scope="module")
def saved(small_folder: Path) -> tuple[Run, Path]:
    """A run that trains all of the model, and its folder, with checkpoints of steps 3 and 4."""
    output = small_folder.parent / "run"
    run = begin(small_folder, output)
    save(run, output, steps=(1, 3, 4))
    return run, output


@pytest.mark.slow
def test_a_whole_model_is_exported_as_it_was_trained(saved, small_folder, tmp_path):
    run, output = saved
    assert is_run(output) and not is_run(small_folder)
    wanted, got = tensors_of(run.program, run.state), exported(output, tmp_path / "out")
    assert wanted.keys() == got.keys()
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(got[name], tensor, err_msg=name)
    assert {path.name for path in small_folder.iterdir()} == {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.slow
def test_frozen_tensors_are_in_no_checkpoint_and_in_the_export(small_folder, tmp_path):
    shutil.copytree(small_folder, tmp_path / "base")
    run = begin(tmp_path / "base", tmp_path / "run", frozen_params=["^vision_model", "embed_tokens"])
    save(run, tmp_path / "run")
    held = stored_arrays(tmp_path / "run" / CHECKPOINTS / "3")
    assert held.keys() == run.state.trained.keys() and len(held) < len(run.program.table)
    wanted, got = tensors_of(run.program, run.state), exported(tmp_path / "run", tmp_path / "out")
    assert wanted.keys() == got.keys()
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(got[name], tensor, err_msg=name)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(UserError, match=r"no such folder: .*base"):
        exported(tmp_path / "run", tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["checkpoint", "shapes"])
def test_adapters_are_alone_in_their_checkpoint_and_merged_in_the_export(small_folder, tmp_path, checkpoint):
    lora = LoraSettings(rank=3, alpha=6.0, targets=["q_proj", r"mlp\.(fc1|up_proj)"])
    source = small_folder if checkpoint == "checkpoint" else "shapes"
    run = begin(source, tmp_path / "run", lora=lora, seed=4)
    save(run, tmp_path / "run")
    held = stored_arrays(tmp_path / "run" / CHECKPOINTS / "3")
    assert held.keys() == run.state.trained.keys()
    assert all(path.endswith((".lora_a", ".lora_b")) for path in held)
    wanted, got = tensors_of(run.program, run.state), exported(tmp_path / "run", tmp_path / "out")
    assert got.keys() == {name for name in wanted if ".lora_" not in name}
    adapted = 0
    for name, tensor in got.items():
        expected = wanted[name].astype(np.float64)
        projection = name.removesuffix("weight")
        if projection + "lora_a" in wanted:
            adapted += 1
            expected += 2.0 * wanted[projection + "lora_b"].astype(float) @ wanted[projection + "lora_a"].astype(float)
        # Sums of a handful of products, in float32 where ``expected`` is in float64.
        np.testing.assert_allclose(tensor, expected, rtol=0, atol=2**-20 * np.abs(expected).max(), err_msg=name)
    assert adapted == sum(len(run.program.table[path].tensors) for path in held) // 2


@pytest.fixture(scope="module")
def adapted(small_folder: Path) -> tuple[Run, Path]:
    """A run with adapters, and its folder."""
    output = small_folder.parent / "adapted"
    lora = LoraSettings(rank=3, alpha=6.0, targets=["language_model.*q_proj", r"mlp\.(fc1|up_proj)", "projector"])
    run = begin(small_folder, output, lora=lora)
    save(run, output)
    return run, output


@pytest.mark.slow
@pytest.mark.parametrize("merged", [False, True])
def test_adapters_in_the_form_of_peft_give_the_same_logits_there(merged, adapted, small_folder, tmp_path, capsys):
    run, output = adapted
    convert([str(output), str(tmp_path / "adapter"), "--for", "peft"])
    assert f"a LoRA adapter for {small_folder}, convention 'meta'\n" in capsys.readouterr().out
    convert([str(output), str(tmp_path / "merged")])
    draw, vision = np.random.default_rng(0), run.initial_model.config.vision
    ids = draw.integers(5, 200, (2, 12)).astype(np.int32)
    used = (np.arange(vision.max_num_tiles) == 0).astype(np.int32)
    inputs = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "pixel_values": draw.normal(size=(2, 1, len(used), 3, vision.image_size, vision.image_size)).astype(np.float32),
        "aspect_ratio_ids": np.ones((2, 1), np.int32),
        "aspect_ratio_mask": np.tile(used, (2, 1, 1)),
        "cross_attention_mask": np.tile(used, (2, 12, 1, 1)),
    }
    reference = MllamaForConditionalGeneration.from_pretrained(small_folder, attn_implementation="eager").eval()
    with under("meta", reference), warnings.catch_warnings(action="error", category=UserWarning):
        plain = logits_of(reference, inputs)
        there = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter")
        expected = logits_of(there.merge_and_unload() if merged else there, inputs)
    largest = np.abs(expected).max()
    assert np.abs(plain - expected).max() > 0.1 * largest
    for loaded in (
        Mllama.from_pretrained(tmp_path / "merged"),
        Mllama.from_pretrained(small_folder, adapter=tmp_path / "adapter"),
    ):
        assert np.abs(np.asarray(loaded(**inputs)) - expected).max() < OFF * largest


@pytest.mark.slow
def test_adapters_in_the_form_of_peft_in_another_dtype(adapted, tmp_path):
    _, output = adapted
    convert([str(output), str(tmp_path / "adapter"), "--for", "peft", "--dtype", "bfloat16", "--base", str(output)])
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"bfloat16"}
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(output)


@pytest.mark.slow
def test_no_adapters_to_write_for_peft(saved, adapted, small_folder, tmp_path):
    with pytest.raises(UserError, match=r"a run with adapters \(lora\.rank\), and this one trained whole parameters"):
        convert([str(saved[1]), str(tmp_path / "out"), "--for", "peft"])
    with pytest.raises(UserError, match=r"--for peft is for the folder of a training run, which .*small is not"):
        convert([str(small_folder), str(tmp_path / "out"), "--for", "peft"])
    with pytest.raises(UserError, match="a run has adapters of its own: convert the run first"):
        (tmp_path / "adapter").mkdir()
        convert([str(adapted[1]), str(tmp_path / "adapter"), "--for", "peft"])
        convert([str(adapted[1]), str(tmp_path / "out"), "--adapter", str(tmp_path / "adapter")])


@pytest.mark.slow
def test_another_dtype_and_an_earlier_step(saved, tmp_path):
    run, output = saved
    assert steps_in(output / CHECKPOINTS) == [3, 4]
    assert RunExport(output).step == 4 and RunExport(output, 3).step == 3
    with pytest.raises(UserError, match=r"no checkpoint of step 1, only of 3, 4"):
        RunExport(output, 1)
    got = exported(output, tmp_path / "out", dtype=np.dtype("bfloat16"))
    wanted = tensors_of(run.program, run.state)
    assert all(np.array_equal(got[name], wanted[name].astype("bfloat16")) for name in wanted)


class TestRestoring:
    def test_onto_another_mesh(self, saved):
        run, output = saved
        mesh = make_run_mesh(MeshSettings(fsdp=4, tensor=2))
        program = make_program(run.settings, run.initial_model.config, mesh, steps=4, steps_per_epoch=4)
        with Checkpoints(output / CHECKPOINTS, KEPT) as checkpoints:
            state = checkpoints.restore(3, program.state)
        assert int(state.step) == 3
        for name in ("trained", "optimizer", "skipped"):
            held, like = getattr(state, name), getattr(program.state, name)
            jax.tree.map(np.testing.assert_array_equal, held, getattr(run.state, name))
            assert jax.tree.all(jax.tree.map(lambda x, y: x.sharding == y.sharding, held, like))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"optimizer": OptimizerSettings(precision="bfloat16_nearest")}, "has dtype float32, not bfloat16"),
            ({"frozen_params": ["vision_model"]}, r"of another model: vision_model\.\S+ is only in the checkpoint"),
        ],
    )
    def test_of_other_arrays(self, saved, changes, message):
        run, output = saved
        settings = replace(run.settings, **changes)
        program = make_program(
            settings, run.initial_model.config, make_run_mesh(settings.mesh), steps=4, steps_per_epoch=4
        )
        with Checkpoints(output / CHECKPOINTS, KEPT) as checkpoints, pytest.raises(UserError, match=message):
            checkpoints.restore(3, program.state)

    def test_of_another_model(self, saved):
        run, output = saved
        config = replace(run.initial_model.config, text=replace(run.initial_model.config.text, intermediate_size=128))
        program = make_program(run.settings, config, make_run_mesh(run.settings.mesh), steps=4, steps_per_epoch=4)
        message = r"of another model: \S+mlp\S+ has shape .*240.*, not .*128"
        with Checkpoints(output / CHECKPOINTS, KEPT) as checkpoints, pytest.raises(UserError, match=message):
            checkpoints.restore(3, program.state)


@pytest.mark.slow
def test_no_room(saved, tmp_path, monkeypatch):
    """Before the start: the free bytes are made up; they are counted exactly."""
    run, _ = saved
    size = sum(x.nbytes for x in jax.tree.leaves((run.state.trained, run.state.optimizer))) + 8
    disk = namedtuple("disk", "total used free")
    with Checkpoints(tmp_path / "run", KEPT) as checkpoints:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: disk(0, 0, 3 * size))
        checkpoints.check_disk_space(run.program.state)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: disk(0, 0, 3 * size - 1))
        with pytest.raises(UserError, match=r"3 checkpoints of 0\.0 GB need 0\.0 GB more"):
            checkpoints.check_disk_space(run.program.state)


@pytest.mark.slow
def test_a_disk_that_fills_up_during_a_save(saved, tmp_path, monkeypatch):
    """Whatever orbax makes of it: the fault is at the end of a chain."""
    run, _ = saved

    def refuse(*_: object, **__: object) -> None:
        try:
            raise OSError(28, "No space left on device")
        except OSError as fault:
            raise ValueError("NOT_FOUND: Error opening kvstore") from fault

    with Checkpoints(tmp_path / "run", KEPT) as checkpoints:
        monkeypatch.setattr(checkpoints._orbax, "save_checkpointables_async", refuse)
        with pytest.raises(UserError, match=r"^no room on the disk of .*run for a checkpoint"):
            checkpoints.save(run.state, {})
