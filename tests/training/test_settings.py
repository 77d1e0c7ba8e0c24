"""Every configuration builds; every field of one changes something; mistakes are named."""

import re
import shutil
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from safetensors.numpy import load_file

from llava_cot_jax.cli import progress_bar
from llava_cot_jax.data.loader import Loader
from llava_cot_jax.data.shapes.rows import ShapesRows
from llava_cot_jax.data.shapes.tokenizer import shapes_config
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.choices import MESH_AXES
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.sharding import make_mesh, partition_spec
from llava_cot_jax.paths import BUNDLED_MODEL_FOLDER
from llava_cot_jax.planning.model_sizes import model_config_for
from llava_cot_jax.planning.programs import abstract_batch
from llava_cot_jax.planning.slices import parse_topology
from llava_cot_jax.train import read_arguments
from llava_cot_jax.training.initial_model import InitialModel
from llava_cot_jax.training.loop import _open_loaders
from llava_cot_jax.training.program import check_batch_size, make_program, make_run_mesh
from llava_cot_jax.training.run import Run
from llava_cot_jax.training.settings import RENAMED_SETTINGS, MeshSettings, TrainSettings, check_setting_names
from tests.training.small_run import small_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
RUNS = [path for path in CONFIGS if re.search("^data:", path.read_text(), re.MULTILINE)]


@pytest.mark.slow
@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_configuration_builds_its_model_mesh_and_optimizer(path):
    settings = read_arguments(["--config", str(path)])[0]
    config = model_config_for(settings.checkpoint)
    slice_ = re.search(r"(v\d[ep])_(\d+)$", path.stem)
    chips = parse_topology(f"{slice_[1]}-{slice_[2]}").chips if slice_ else 1
    sizes = settings.mesh.data, settings.mesh.fsdp or chips, settings.mesh.tensor
    assert np.prod(sizes) == chips
    mesh = AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    program = make_program(settings, config, mesh, steps=100, steps_per_epoch=10)
    batch = abstract_batch(config, settings.loader.batch_size, 256, mesh, probes="verifier" in path.stem)
    state, measures = jax.eval_shape(program.step, program.state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), program.state
    )
    assert measures["loss"].dtype == jnp.float32
    losses = jax.eval_shape(program.evaluate, program.state.trained, program.state.frozen, batch)
    assert losses.total.shape == (5,)


BASE = TrainSettings("runs/none", "shapes", "shapes", dtype="float32", mesh=MeshSettings(fsdp=1))
COMPUTED: dict[str, Any] = {
    "dtype": "bfloat16",
    "remat": "dots",
    "grad_accum_steps": 2,
    "frozen_params": ["^vision_model"],
    "steps": 50,
    "epochs": 2,
    "mesh.data": 2,
    "mesh.fsdp": 2,
    "mesh.tensor": 2,
    "optimizer.learning_rate": 1e-3,
    "optimizer.schedule": "cosine",
    "optimizer.epoch_decay": 0.5,
    "optimizer.final_lr_ratio": 0.5,
    "optimizer.warmup_steps": 3,
    "optimizer.b1": 0.5,
    "optimizer.b2": 0.5,
    "optimizer.eps": 1e-3,
    "optimizer.weight_decay": 0.1,
    "optimizer.max_grad_norm": 1.0,
    "optimizer.precision": "bfloat16_nearest",
    "lora.rank": 4,
    "lora.alpha": 5.0,
    "lora.targets": ["q_proj"],
    "lora.tokens": "probe",
    "verifier.weight": 0.5,
}
LOADED: dict[str, Any] = {
    "data": "elsewhere",
    "chat.variant": "conclusion",
    "chat.max_length": 80,
    "chat.max_images": 1,
    "chat.text_only": False,
    "chat.upstream_quirks": True,
    "loader.batch_size": 16,
    "loader.num_buckets": 1,
    "loader.pad_to_multiple_of": 64,
    "loader.seed": 1,
}
STARTED: dict[str, Any] = {"checkpoint": "elsewhere", "random_init": True, "convention": "transformers_5", "seed": 1}
RUN = {
    "output",
    "checkpoints.every",
    "checkpoints.max_to_keep",
    "checkpoints.keep_period",
    "checkpoints.best_n",
    "max_nonfinite_steps",
    "eval_every",
    "eval_examples",
    "log_every",
    "eval_generations",
    "profile",
    "wandb",
}
"""Those that ``test_train.py`` changes in a run."""

READ_AHEAD = {"loader.num_workers", "loader.num_threads"}
"""Those that change no batch. ``data/test_loader.py`` shows it of workers."""

SEVERAL_IMAGES = {"loader.num_image_buckets"}
"""Those that change batches of rows with several images, as ``test_loader.py`` shows."""

VALUES = {"verifier.targets", "verifier.stage_weights", "verifier.judge_prompts"}
"""Those that change rows of values, as ``test_values.py`` shows."""

HELD_OUT = {"validation_data"}
"""Those that change what a run validates on, as ``TestSeveralDataSets`` shows."""


def names(settings: Any, prefix: str = "") -> set[str]:
    """The dotted names of all fields."""
    found: set[str] = set()
    for field in fields(settings):
        value = getattr(settings, field.name)
        inner = is_dataclass(value)
        found |= names(value, f"{prefix}{field.name}.") if inner else {f"{prefix}{field.name}"}
    return found


def changed(settings: TrainSettings, name: str, value: Any) -> TrainSettings:
    """``settings`` with one field changed; fields that count only with another are given that too."""
    if name in ("optimizer.final_lr_ratio",):
        settings = replace(settings, optimizer=replace(settings.optimizer, schedule="linear"))
    if name in ("lora.alpha", "lora.targets", "lora.tokens"):
        settings = replace(settings, lora=replace(settings.lora, rank=4))
    group, _, field = name.rpartition(".")
    if not group:
        return replace(settings, **{field: value})
    return replace(settings, **{group: replace(getattr(settings, group), **{field: value})})


def test_no_field_is_forgotten():
    elsewhere = RUN | READ_AHEAD | SEVERAL_IMAGES | VALUES | HELD_OUT
    assert names(BASE) == set(COMPUTED) | set(LOADED) | set(STARTED) | elsewhere


def observe(settings: TrainSettings) -> tuple[Any, ...]:
    """What a run computes: the traced step and its rates, and how the state lies."""
    mesh = AbstractMesh(
        (settings.mesh.data, settings.mesh.fsdp or 1, settings.mesh.tensor), MESH_AXES, axis_types=(AxisType.Auto,) * 3
    )
    config = small_config()
    steps = settings.steps or settings.epochs * 10
    program = make_program(settings, config, mesh, steps=steps, steps_per_epoch=10)
    batch = abstract_batch(config, settings.loader.batch_size, 64, mesh, probes=True)
    traced = re.sub(r"0x[0-9a-f]+", "", str(jax.make_jaxpr(program.step)(program.state, batch)))
    layout = jax.tree.map(lambda x: str((x.shape, x.dtype, x.sharding)), program.state)
    return traced, [float(program.learning_rate(step)) for step in range(steps)], str(layout)


@pytest.mark.slow
def test_each_field_of_the_computation_changes_it():
    seen: dict[str, tuple[Any, ...]] = {}
    for name, value in COMPUTED.items():
        after = changed(BASE, name, value)
        before = changed(after, name, _get(BASE, name))
        key = repr(before)
        if key not in seen:
            seen[key] = observe(before)
        assert observe(after) != seen[key], name


def _get(settings: Any, name: str) -> Any:
    for part in name.split("."):
        settings = getattr(settings, part)
    return settings


def test_each_field_of_the_data_changes_it(tmp_path):
    """And the fingerprint that a run goes on with."""
    initial_model = InitialModel("shapes", None)
    sharding = NamedSharding(make_mesh(devices=jax.devices()[:1]), partition_spec(("batch",)))

    def fingerprint(settings: TrainSettings) -> str:
        rows = ShapesRows("train", size=200)
        return Loader(
            rows, initial_model.processor, settings.chat, settings.loader, sharding, cache=tmp_path
        ).fingerprint

    before = fingerprint(BASE)
    for name, value in LOADED.items():
        if name != "data":
            assert fingerprint(changed(BASE, name, value)) != before, name


class TestSeveralDataSets:
    ARGUMENTS = ("--output", "o", "--checkpoint", "shapes")

    @pytest.mark.parametrize("form", ["command line", "block", "flow"])
    def test_they_are_given_with_weights(self, tmp_path, monkeypatch, form):
        monkeypatch.chdir(tmp_path)
        texts = {"block": "data:\n  a/b: 2\n  shapes: 0.5\n", "flow": 'data: {a/b: 2, "shapes": 0.5}\n'}
        (tmp_path / "run.yaml").write_text(texts.get(form, ""))
        given = ["--data", '{"a/b": 2, "shapes": 0.5}'] if form not in texts else ["--config", "run.yaml"]
        settings, _ = read_arguments([*self.ARGUMENTS, *given, "--validation_data", "held/out"])
        assert settings.data == {"a/b": 2.0, "shapes": 0.5} and settings.validation_data == "held/out"
        absolute = settings.with_absolute_paths()
        assert absolute.data == {f"{tmp_path}/a/b": 2.0, "shapes": 0.5}
        assert absolute.validation_data == f"{tmp_path}/held/out"

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ({}, "data names no data set"),
            ({"a": 0.0}, "the weight of data a is 0.0; it must be above 0"),
            ({"a": 1.0, "b": -1.0}, "the weight of data b is -1.0"),
            ({"a": float("nan")}, "the weight of data a is nan"),
            ('["a", "b"]', "several data sets are given with a number each"),
            ('{"a": "one"}', "several data sets are given with a number each"),
            ({"a": 1.0, "./a": 2.0}, "data names .*/a twice"),
        ],
    )
    def test_weights_that_mean_nothing(self, data, message):
        with pytest.raises(UserError, match=message):
            replace(BASE, data=data).with_absolute_paths()

    def test_a_run_opens_them(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr("llava_cot_jax.data.shapes.rows.SIZES", {"train": 40, "validation": 24, "test": 8})
        settings = replace(
            BASE, output=str(tmp_path), data={"shapes": 1.5}, mesh=MeshSettings(), validation_data="shapes"
        )
        run = Run.open(replace(settings, eval_examples=16), lambda line: None, progress_bar)
        training, validation = _open_loaders(run)
        assert (training.sets, training.batches_per_epoch) == ([(40, 1.5)], 1)
        assert validation.sets == [(16, 1.0)]
        assert _open_loaders(replace(run, settings=replace(settings, eval_examples=0)))[1] is None


def test_random_weights_need_none_on_the_disk(tmp_path):
    for path in BUNDLED_MODEL_FOLDER.glob("*.json"):
        shutil.copy(path, tmp_path)
    assert InitialModel(str(tmp_path), None, random_init=True).config == shapes_config()
    with pytest.raises(UserError, match=r"holds no \*\.safetensors files"):
        InitialModel(str(tmp_path), None)


@pytest.mark.slow
def test_each_field_of_the_start_changes_it():
    mesh = make_mesh(devices=jax.devices()[:1])

    def start(convention: Any, seed: int, random_init: bool = True) -> tuple[MllamaConfig, np.ndarray]:
        initial_model = InitialModel("shapes", convention, random_init)
        arrays = initial_model.load_arrays(
            mesh=mesh, dtype=jnp.float32, seed=seed, on_progress=lambda done, total: None
        )
        return initial_model.config, np.asarray(arrays["language_model.lm_head.weight"])

    config, weights = start(None, 0)
    assert start(STARTED["convention"], 0)[0] != config
    assert not np.array_equal(start(None, STARTED["seed"])[1], weights)
    trained = load_file(BUNDLED_MODEL_FOLDER / "model.safetensors")["language_model.lm_head.weight"]
    np.testing.assert_array_equal(start(None, 0, random_init=False)[1], trained)
    with pytest.raises(UserError, match="elsewhere"):
        InitialModel(STARTED["checkpoint"], None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "epochs is 0; it must be at least 1"),
        (["--steps", "0"], "steps is 0"),
        (["--seed", "-1"], "seed is -1"),
        (["--grad_accum_steps", "3"], "grad_accum_steps is 3; it must divide loader.batch_size, 32"),
        (["--lora.rank", "4", "--frozen_params", '["vision"]'], "leave one of them out"),
        (["--mesh.fsdp", "0"], "mesh.fsdp is 0"),
        (["--optimizer.schedule", "exponential"], "schedule"),
        (["--dtype", "float16"], "dtype"),
        (["--remat", "some"], "remat"),
    ],
)
def test_a_value_that_means_nothing(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        read_arguments(["--output", "o", "--checkpoint", "shapes", "--data", "shapes", *arguments])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("optimizer: {lerning_rate: 0.1}", "optimizer.learning_rate"),
        ("epoch: 3", "epochs"),
        ("optimiser: {learning_rate: 0.1}", "optimizer.learning_rate"),
    ],
)
def test_an_unknown_key_is_told_with_the_nearest_known_one(tmp_path, content, message):
    (tmp_path / "run.yaml").write_text(f"output: o\ncheckpoint: shapes\ndata: shapes\n{content}\n")
    with pytest.raises(UserError, match=rf"did you mean {re.escape(message)}\?$"):
        read_arguments(["--config", str(tmp_path / "run.yaml")])


def test_the_nearest_name_of_an_unknown_argument():
    with pytest.raises(UserError, match=r"did you mean mesh\.tensor\?$"):
        read_arguments(["--output", "o", "--checkpoint", "shapes", "--data", "shapes", "--mesh.tensors", "2"])


@pytest.mark.parametrize(("former", "present"), RENAMED_SETTINGS.items())
class TestFormerNames:
    """A former name of a setting is refused with the present one, wherever it stands."""

    def test_as_an_argument(self, former, present):
        with pytest.raises(UserError, match=f"{re.escape(former)} .*it is called {re.escape(present)} now$"):
            read_arguments(["--output", "o", "--checkpoint", "shapes", "--data", "shapes", f"--{former}", "1"])

    def test_in_a_configuration(self, tmp_path, former, present):
        content: Any = 1
        for key in reversed(former.split(".")):
            content = {key: content}
        stored = {"output": "o", "checkpoint": "shapes", "data": "shapes", **content}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(stored))
        with pytest.raises(UserError, match=f"it is called {re.escape(present)} now$"):
            read_arguments(["--config", str(tmp_path / "run.yaml")])
        with pytest.raises(UserError, match=f"{re.escape(former)} is {re.escape(present)} now$"):
            check_setting_names(stored, tmp_path)

    def test_the_present_name_is_one(self, former, present):
        value: Any = BASE
        for key in present.split("."):
            value = getattr(value, key)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshSettings(tensor=16), "takes 16 devices"),
        (MeshSettings(fsdp=2, tensor=2), "leaves 4 of 8 devices idle"),
    ],
)
def test_a_mesh_that_is_not_all_devices(mesh, message):
    with pytest.raises(UserError, match=message):
        make_run_mesh(mesh)


def check(**more: Any) -> None:
    settings = replace(BASE, mesh=MeshSettings(), **more)
    check_batch_size(settings, make_run_mesh(settings.mesh))


def test_a_batch_that_the_mesh_does_not_divide():
    check()
    with pytest.raises(UserError, match=r"loader\.batch_size is 12: the mesh does not divide it .* multiple of 8"):
        check(loader=replace(BASE.loader, batch_size=12))
    with pytest.raises(UserError, match=r"8 devices, 8 micro-batches on each\); take a multiple of 64"):
        check(grad_accum_steps=8)
