"""Adapters and frozen parts belong to the weights that they were trained on, and to no others."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llava_cot_jax import cli
from llava_cot_jax.convert import main as convert
from llava_cot_jax.errors import UserError
from llava_cot_jax.train import _check_files
from llava_cot_jax.training.base import Base, check_same_base
from tests.training.stepless import stepless_place  # noqa: F401 - a fixture

LORA: dict[str, Any] = {"lora.rank": 2, "lora.targets": ["self_attn.q_proj"]}


def replace_weights(folder: Path) -> None:
    """Others of the same names, shapes, dtypes and size."""
    weights = load_file(folder / "model.safetensors")
    name = "vision_model.transformer.layers.0.mlp.fc1.bias"
    weights[name] = weights[name] + np.float32(1e-6)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.slow
def test_a_run_with_adapters_refuses_another_base(place, capsys, monkeypatch):
    place.run("lora", steps=1, **LORA)
    stored = place.stored("lora")["base"]
    assert stored["checkpoint"] == str(place / "base") and stored["commit"] is None
    replace_weights(place / "base")

    refusal = (
        rf"the run started from {place.folder}/base \(weights {stored['digest']}\).* no other weights, but now there is"
    )
    with pytest.raises(UserError, match=refusal + ".*or resume with these by --accept_changes"):
        place.run("lora", steps=1, **LORA)
    monkeypatch.setattr("sys.argv", ["convert", str(place / "lora"), str(place / "out")])
    with pytest.raises(SystemExit) as end:
        cli.run(convert)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: the run started from ") and error.count("\n") == 1
    assert "--base" in error and not (place / "out").exists()
    convert([str(place / "lora"), str(place / "out"), "--base", str(place / "small")])  # the same, elsewhere
    assert (place / "out/model.safetensors").exists()

    said = place.run("lora", accept_changes=True, steps=2, **LORA)
    assert any("resuming with other frozen weights" in line for line in said)
    assert place.stored("lora")["base"]["digest"] != stored["digest"]
    place.run("lora", steps=2, **LORA)


@pytest.mark.slow
def test_a_run_that_trains_everything_does_without_its_base(place):
    shutil.rmtree(place / "base", ignore_errors=True)
    shutil.copytree(place / "small", place / "base")
    place.run("whole", steps=1)
    stored = place.stored("whole")["base"]
    shutil.rmtree(place / "base")
    with pytest.raises(UserError, match="no such folder"):
        place.run("other", steps=1)
    _check_files(replace(place.settings("whole"), steps=2))
    said = place.run("whole", accept_changes=True, steps=2)
    assert any("resuming from step 1" in line for line in said) and not any("weights" in line for line in said)
    assert place.stored("whole")["base"] == stored
    assert (place / "whole/model/tokenizer.json").exists()


def test_a_commit_on_the_hub_is_named_and_how_to_fetch_it():
    folder = Path("/cache/models--meta--small/snapshots/0123abcd")
    before = Base.at("meta/small", folder, "aa")
    assert (before.commit, Base.at("small", Path("/models/small"), "aa").commit) == ("0123abcd", None)
    check_same_base(before, replace(before, checkpoint="elsewhere", commit=None), "")
    check_same_base(None, before, "")
    with pytest.raises(
        UserError, match=r"meta/small \(weights aa, commit 0123abcd\).*there is .*weights bb.*"
    ) as error:
        check_same_base(before, replace(before, digest="bb"), "name it")
    assert str(error.value).endswith("name it (`hf download meta/small --revision 0123abcd` fetches it)")
    with pytest.raises(UserError, match=r"name it$"):
        check_same_base(replace(before, checkpoint=str(folder)), replace(before, digest="bb"), "name it")
