"""The command that trains, in processes of its own: what it leaves, goes on from, exports, and refuses."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MllamaForConditionalGeneration

from llava_cot_jax import cli
from llava_cot_jax.data.chat import Chat
from llava_cot_jax.data.settings import ChatSettings
from llava_cot_jax.data.shapes.rows import ShapesRows
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.paths import as_path
from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.train import main
from llava_cot_jax.training.checkpoints import steps_in
from llava_cot_jax.training.run_lock import RunLock
from tests.parity.reference import under
from tests.training.small_run import arguments, command, environment, losses, metrics, validation_loss, write_small


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the small checkpoint, and the runs."""
    folder = tmp_path_factory.mktemp("train")
    write_small(folder / "small")
    return folder


def train(place: Path, cache: Path, name: str, checkpoint: str = "small", **settings: Any) -> str:
    """What a run prints."""
    done = command("train", *arguments(place / checkpoint, place / name, **settings), cache=cache)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def whole(place: Path, cache: Path) -> str:
    """What a run with every one of its habits changed prints; its folder is ``whole``."""
    return train(
        place,
        cache,
        "whole",
        steps=9,
        checkpoints__every=2,
        checkpoints__max_to_keep=2,
        checkpoints__keep_period=4,
        checkpoints__best_n=1,
        eval_every=4,
        log_every=3,
        eval_generations=3,
        profile=True,
        optimizer__max_grad_norm=1.0,
    )


@pytest.mark.slow
class TestRun:
    def test_what_a_person_sees(self, whole):
        for name in ("devices", "mesh", "parameters", "bytes per device", "tokens per step", "steps", "FLOPs per step"):
            assert re.search(rf"│ {name} +│", whole), name
        assert re.findall(r"training (\d)/9 steps: loss \d", whole) == ["3", "6", "9"]
        assert re.findall(r"step (\d): validation loss", whole) == ["4", "8", "9"]
        assert re.search(r"conclusions that are the row's own: .*% of 3 \(standard error", whole)
        assert re.search(r"small: weights read by each host, GB: 0\.0024", whole)

    def test_what_is_measured(self, place, whole):
        lines = metrics(place / "whole")
        steps = [line for line in lines if "loss" in line]
        assert [line["step"] for line in steps] == list(range(1, 10))
        for line in steps:
            assert {"learning_rate", "gradient_norm", "skipped", "waiting_seconds", "peak_memory_bytes"} <= line.keys()
            assert ("compiling_seconds" in line) == (line["step"] == 1)
            rates = {"seconds", "samples_per_second", "tokens_per_second", "tflops_per_second_per_device"}
            assert rates <= line.keys() or line["step"] == 1
        assert steps[0]["learning_rate"] == pytest.approx(0.003)
        assert steps[-1]["learning_rate"] < 2e-4  # the cosine's end
        assert {line["step"] for line in lines if "saving_seconds" in line} == {2, 4, 6, 8, 9}
        validations = [line for line in lines if "validation_loss" in line]
        assert [line["step"] for line in validations] == [4, 8, 9]
        for stage in ("summary", "caption", "reasoning", "conclusion"):
            assert validations[0][f"validation_loss_{stage}"] > 0

    def test_what_is_kept(self, place, cache, whole):
        folder = place / "whole"
        assert steps_in(as_path(folder / "checkpoints")) == [4, 8, 9]
        board = b"".join(path.read_bytes() for path in (folder / "tensorboard").iterdir())
        assert b"gradient_norm" in board and b"validation_loss_caption" in board
        assert list((folder / "profile").rglob("*.xplane.pb"))
        again = command("train", "--config", str(folder / "config.yaml"), "--steps", "0", cache=cache)
        assert again.stderr == "error: steps is 0; it must be at least 1, or left out\n"

    def test_what_was_cut_off_goes_on(self, place, cache, whole):
        """Its losses are, bit for bit, those of the run that was not."""
        shutil.copytree(place / "whole", place / "cut")
        for step in (8, 9):
            shutil.rmtree(place / "cut/checkpoints" / str(step))
        assert "resuming from step 4" in train(place, cache, "cut", steps=9, optimizer__max_grad_norm=1.0)
        assert losses(place / "cut") == losses(place / "whole")
        assert validation_loss(place / "cut") == validation_loss(place / "whole")

    def test_the_last_one_exported_is_the_run(self, place, cache, whole):
        """Its logits in transformers, under the run's convention, and the loss that a new run starts with."""
        exported = place / "exported"
        done = command("convert", str(place / "whole"), str(exported), cache=cache)
        assert done.returncode == 0 and "step 9 of" in done.stdout, done.stderr
        train(place, cache, "again", "exported", steps=1, optimizer__learning_rate=0.0)  # which moves nothing
        assert validation_loss(place / "again") == pytest.approx(validation_loss(place / "whole"), rel=1e-6)
        processor = Processor.from_pretrained(exported)
        row = ShapesRows("validation")[0]
        conversation = Chat(processor, ChatSettings()).encode(row.turns)
        inputs = processor.collate([conversation.ids], [row.images])
        ours = np.asarray(Mllama.from_pretrained(exported)(**inputs))
        size = processor.config.vision
        pixels = (inputs["pixel_values"] / 255 - np.reshape(size.image_mean, (3, 1, 1))) / np.reshape(
            size.image_std, (3, 1, 1)
        )
        there = MllamaForConditionalGeneration.from_pretrained(exported, attn_implementation="eager").eval()
        with torch.no_grad(), under("meta", there):
            tensors = {name: torch.tensor(x) for name, x in inputs.items()}
            tensors["pixel_values"] = torch.tensor(pixels, dtype=torch.float32)
            theirs = there(**tensors, use_cache=False).logits.numpy()
        np.testing.assert_allclose(ours, theirs, atol=2e-4 * np.abs(theirs).max())


@pytest.mark.slow
def test_a_disk_that_fills_up_during_a_save(place, cache):
    """A real one, of 4 MB: that it is too small from the start is kept from the command."""
    script = f"""
import shutil, sys
usage = shutil.disk_usage
shutil.disk_usage = lambda path: usage(path)._replace(free=10**12)
from llava_cot_jax import cli
from llava_cot_jax.train import main
sys.argv[1:] = {arguments(place / "small", place / "full/run", steps=2, eval_examples=0)}
cli.run(main)
"""
    (place / "full").mkdir()
    mounted = f'mount -t tmpfs -o size=4m tmpfs {place / "full"} && exec "$0" -c "$1"'
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", mounted, sys.executable, script],
        env=environment(cache),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: no room on the disk of {place / 'full/run/checkpoints'}")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (["--data", "nowhere"], "nowhere is no prepared data set"),
        (["--checkpoint", "nowhere"], f"no such folder: {Path.cwd() / 'nowhere'}"),
        (["--output", "/proc/none"], "/proc/none cannot be written"),
        (["--loader.batch_size", "12"], "the mesh does not divide it"),
        (["--mesh.tensor", "3"], "devices idle"),
        (["--frozen_params", '["vision"]', "--lora.rank", "2"], "leave one of them out"),
        (["--wandb", "project"], "wandb is set, but not installed"),
    ],
)
def test_a_mistake_ends_in_one_line_and_code_2(place, cache, monkeypatch, capsys, mistake, message):
    monkeypatch.setattr("llava_cot_jax.train.join_hosts", lambda hosts: None)  # this process has done it
    monkeypatch.setattr("sys.argv", ["train", *arguments(place / "small", place / "wrong"), *mistake])
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error


def test_a_second_run_in_the_same_folder_is_refused(place, cache, monkeypatch):
    """Before it reads or writes anything there."""
    monkeypatch.setattr("llava_cot_jax.train.join_hosts", lambda hosts: None)  # this process has done it
    (place / "both").mkdir()
    with RunLock(place / "both"), pytest.raises(UserError, match=r"both: a run is under way there \(process \d+ on"):
        main(arguments(place / "small", place / "both"))
    assert [path.name for path in (place / "both").iterdir()] == [".running"]


def test_hosts_are_given_whole_or_not_at_all():
    with pytest.raises(UserError, match=r"give --hosts\.coordinator and --hosts\.index too"):
        main([*arguments("shapes", "out"), "--hosts.count", "2"])
