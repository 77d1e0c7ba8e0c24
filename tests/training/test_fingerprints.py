"""What each process of a run tells the others that it has read."""

from dataclasses import replace

import pytest
from safetensors.numpy import load_file, save_file

from llava_cot_jax.hosts import surroundings
from llava_cot_jax.training.fingerprints import model_fields, start_fields
from llava_cot_jax.training.initial_model import InitialModel
from llava_cot_jax.training.settings import LoraSettings, OptimizerSettings, TrainSettings
from tests.training.small_run import write_small

SETTINGS = TrainSettings("out", "small", "shapes")


def changed(first: dict[str, str], second: dict[str, str]) -> set[str]:
    """The names of the fields in which two processes differ."""
    return {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)}


@pytest.mark.parametrize(
    ("other", "names"),
    [
        (replace(SETTINGS, optimizer=OptimizerSettings(b2=0.98)), {"optimizer.b2"}),
        (replace(SETTINGS, lora=LoraSettings(rank=4, alpha=8)), {"lora.rank", "lora.alpha"}),
        (replace(SETTINGS, frozen_params=["vision"]), {"frozen_params"}),
        (replace(SETTINGS, loader=replace(SETTINGS.loader, seed=1)), {"loader.seed"}),
        (replace(SETTINGS, output="elsewhere"), {"output"}),
        (replace(SETTINGS, loader=replace(SETTINGS.loader, num_threads=99, num_workers=3)), set()),
        (replace(SETTINGS, data="elsewhere", checkpoint="/elsewhere"), set()),  # their contents are compared
    ],
)
def test_settings_that_must_be_the_same(other, names):
    assert changed(start_fields(SETTINGS, False), start_fields(other, False)) == names


def test_what_is_outside_the_settings(monkeypatch, tmp_path):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_dump_to=/tmp/a --xla_b")
    first = start_fields(SETTINGS, False)
    assert first["the digest of llava_cot_jax/training/step.py"] and "the digest of llava_cot_jax/train.py" in first
    monkeypatch.setenv("XLA_FLAGS", "--xla_b --xla_a=2 --xla_dump_to=/tmp/b")
    monkeypatch.setattr(surroundings, "version", lambda name: "9")
    second = start_fields(SETTINGS, True)
    versions = {name for name in first if name.startswith("the version of") and name != "the version of python"}
    assert changed(first, second) == {"accept_changes", "--xla_a in XLA_FLAGS", *versions}
    assert {"the version of jaxlib", "the version of transformers"} <= versions


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("JAX_ENABLE_X64", True),
        ("JAX_THREEFRY_PARTITIONABLE", True),
        ("JAX_NUMPY_DTYPE_PROMOTION", True),
        ("JAX_COMPILATION_CACHE_DIR", False),
        ("JAX_COORDINATOR_ADDRESS", False),
        ("JAX_PROCESS_ID", False),
        ("JAX_SLICE_INDEX", False),
        ("JAX_PARTITION_INDEX", False),
        ("JAX_LOGGING_LEVEL", False),
    ],
)
def test_variables_of_jax_that_must_be_the_same(monkeypatch, name, counts):
    monkeypatch.delenv(name, raising=False)
    first = start_fields(SETTINGS, False)
    monkeypatch.setenv(name, "1")
    assert changed(first, start_fields(SETTINGS, False)) == ({name} if counts else set())


def test_the_model(tmp_path):
    def fields(name: str, random_init: bool = False) -> dict[str, str]:
        return model_fields(InitialModel(str(tmp_path / name), None, random_init), [2, 4])

    for name in ("small", "weights", "template"):
        write_small(tmp_path / name)
    weights = tmp_path / "weights/model.safetensors"
    arrays = load_file(weights)
    arrays["language_model.lm_head.weight"] = arrays["language_model.lm_head.weight"] * 1.5
    save_file(arrays, weights, metadata={"format": "pt"})
    with (tmp_path / "template/tokenizer_config.json").open("a") as file:
        file.write(" ")
    assert changed(fields("small"), fields("small")) == set()
    assert changed(fields("small"), fields("weights")) == {"the digest of the weights"}
    assert changed(fields("small", True), fields("weights", True)) == set()
    assert changed(fields("small"), fields("template")) == {"the digest of the model's tokenizer_config.json"}
    assert fields("small")["the checkpoints in the output"] == "2, 4"
    assert fields("small")["the number of devices of a process"] == "8"
