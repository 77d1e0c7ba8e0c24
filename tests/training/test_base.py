"""Adapters and frozen parts belong to the weights that they were trained on, and to no others."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llava_cot_jax import cli
from llava_cot_jax.convert import main as convert
from llava_cot_jax.data.rows import FirstRows
from llava_cot_jax.data.sources import open_rows
from llava_cot_jax.errors import UserError
from llava_cot_jax.train import _check_files, read_arguments
from llava_cot_jax.training import loop
from llava_cot_jax.training.base import Base, check_same_base
from llava_cot_jax.training.checkpoints import read_run, steps_in
from llava_cot_jax.training.layout import CHECKPOINTS
from llava_cot_jax.training.loop import TrainResult, _Loop, train
from llava_cot_jax.training.settings import TrainSettings
from llava_cot_jax.training.state import TrainState
from tests.training.small_run import arguments, write_small

LORA: dict[str, Any] = {"lora.rank": 2, "lora.targets": ["self_attn.q_proj"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Any:
    """Holds the small checkpoint, and the runs."""
    folder = tmp_path_factory.mktemp("base")
    write_small(folder / "small")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        patch.setattr(_Loop, "run_steps", pass_over_steps)
        patch.setattr(loop, "open_rows", lambda data, split: FirstRows(open_rows(data, split), 100))
        yield folder


def settings_of(place: Path, name: str, **settings: Any) -> TrainSettings:
    return read_arguments(arguments(place / "base", place / name, **{"eval_examples": 0, **settings}))[0]


def run(place: Path, name: str, accept_changes: bool = False, **settings: Any) -> list[str]:
    """What a run in this process says, whose steps compute nothing."""
    said: list[str] = []
    found = settings_of(place, name, **settings)
    log = lambda line: said.append(line if isinstance(line, str) else "")  # noqa: E731
    train(found, log=log, progress_bar=cli.no_progress_bar, accept_changes=accept_changes)
    return said


def pass_over_steps(steps: _Loop, state: TrainState, first: int, last: int) -> TrainResult:
    """Save the state after its last step, as if it had been changed."""
    if first < last:
        step = jax.device_put(np.int32(last), state.step.sharding)
        steps.checkpoints.save(replace(state, step=step), steps.description)
    return TrainResult(steps.run, state, complete=True)


def base_of(output: Path) -> dict[str, Any]:
    """The base that the newest checkpoint names."""
    step = steps_in(output / CHECKPOINTS)[-1]
    found: dict[str, Any] = read_run(output / CHECKPOINTS / str(step))["base"]
    return found


def replace_weights(folder: Path) -> None:
    """Others of the same names, shapes, dtypes and size."""
    weights = load_file(folder / "model.safetensors")
    name = "vision_model.transformer.layers.0.mlp.fc1.bias"
    weights[name] = weights[name] + np.float32(1e-6)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_run_with_adapters_refuses_another_base(place, capsys, monkeypatch):
    shutil.copytree(place / "small", place / "base")
    run(place, "lora", steps=1, **LORA)
    stored = base_of(place / "lora")
    assert stored["checkpoint"] == str(place / "base") and stored["commit"] is None
    replace_weights(place / "base")

    refusal = rf"the run started from {place}/base \(weights {stored['digest']}\).* no other weights, but now there is"
    with pytest.raises(UserError, match=refusal + ".*or resume with these by --accept_changes"):
        run(place, "lora", steps=1, **LORA)
    monkeypatch.setattr("sys.argv", ["convert", str(place / "lora"), str(place / "out")])
    with pytest.raises(SystemExit) as end:
        cli.run(convert)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: the run started from ") and error.count("\n") == 1
    assert "--base" in error and not (place / "out").exists()
    convert([str(place / "lora"), str(place / "out"), "--base", str(place / "small")])  # the same, elsewhere
    assert (place / "out/model.safetensors").exists()

    said = run(place, "lora", accept_changes=True, steps=2, **LORA)
    assert any("resuming with other frozen weights" in line for line in said)
    assert base_of(place / "lora")["digest"] != stored["digest"]
    run(place, "lora", steps=2, **LORA)


def test_a_run_that_trains_everything_does_without_its_base(place):
    shutil.rmtree(place / "base", ignore_errors=True)
    shutil.copytree(place / "small", place / "base")
    run(place, "whole", steps=1)
    stored = base_of(place / "whole")
    shutil.rmtree(place / "base")
    with pytest.raises(UserError, match="no such folder"):
        run(place, "other", steps=1)
    _check_files(replace(settings_of(place, "whole"), steps=2))
    said = run(place, "whole", accept_changes=True, steps=2)
    assert any("resuming from step 1" in line for line in said) and not any("weights" in line for line in said)
    assert base_of(place / "whole") == stored
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
