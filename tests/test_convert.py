"""The convert command: what it writes, what it carries along, and what it leaves behind when it dies."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import MllamaForConditionalGeneration
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from llava_cot_jax.convert import main
from llava_cot_jax.errors import UserError
from llava_cot_jax.evaluation.convention_change import QUESTION, gradient_picture
from llava_cot_jax.model.checkpoint.folder import read_config, resolve_checkpoint
from llava_cot_jax.model.checkpoint.generation_settings import GENERATION_FILE
from llava_cot_jax.model.parameters import parameters
from llava_cot_jax.processing.messages import user_turn
from llava_cot_jax.processing.processor import Processor
from tests.parity.reference import logits_of, under
from tests.training.small_run import write_small

FIXTURE = Path(__file__).parent / "fixtures/mllama_tiny"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The tiny checkpoint among everything that may lie in a published folder."""
    folder = tmp_path / "source"
    shutil.copytree(FIXTURE, folder, ignore=shutil.ignore_patterns("*.npz"))
    for name in ("tokenizer.json", "tokenizer.model", "preprocessor_config.json", "chat_template.jinja", "LICENSE.txt"):
        (folder / name).write_text("{}")
    (folder / "README.md").write_text("of the source, not of the result")
    return folder


def run(*arguments: str | Path, before: str = "") -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which first runs the Python code ``before``."""
    code = f"{before}\nimport runpy; runpy.run_module('llava_cot_jax.convert', run_name='__main__')"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])


class TestResult:
    def test_same_weights_and_everything_that_belongs_to_them(self, source: Path, tmp_path: Path) -> None:
        main([str(source), str(tmp_path / "out")])
        carried = {path.name for path in source.iterdir()} - {"README.md"}
        assert {path.name for path in (tmp_path / "out").iterdir()} == carried
        assert read_config(tmp_path / "out") == read_config(source)
        ours, theirs = load_file(tmp_path / "out/model.safetensors"), load_file(source / "model.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)

    def test_end_tokens_of_all_files_stand_in_both(self, source: Path, tmp_path: Path) -> None:
        stated = {"eos_token_id": [251, 7], "repetition_penalty": 1.3}
        (source / "generation_config.json").write_text(json.dumps(stated))
        main([str(source), str(tmp_path / "out")])
        written = {name: json.loads((tmp_path / "out" / name).read_text()) for name in ("config.json", GENERATION_FILE)}
        assert written["config.json"]["text_config"]["eos_token_id"] == [251, 7]
        assert written[GENERATION_FILE] == stated

        (source / "generation_config.json").write_text('{"eos_token_id": 7}')
        main([str(source), str(tmp_path / "again")])
        assert json.loads((tmp_path / "again" / GENERATION_FILE).read_text()) == {"eos_token_id": [7, 251]}

    def test_dtype(self, source: Path, tmp_path: Path) -> None:
        main([str(source), str(tmp_path / "out"), "--dtype", "float16"])
        assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "float16"
        theirs = load_file(source / "model.safetensors")
        for name, tensor in load_file(tmp_path / "out/model.safetensors").items():
            np.testing.assert_array_equal(tensor, theirs[name].astype(np.float16))

    @pytest.mark.parametrize("convention", ["meta", "transformers_4"])
    def test_for_transformers(
        self, source: Path, tmp_path: Path, convention: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        main([str(source), str(tmp_path / "out"), "--for", "transformers", "--convention", convention])
        said = capsys.readouterr().out
        assert ("One difference stays" in said) == (convention == "meta")
        # It has no tokenizer, and is written all the same.
        assert ("was not measured" in said and "lacks tokenizer_config.json" in said) == (convention == "meta")
        reference = np.load(FIXTURE / "reference.npz")
        model, report = MllamaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not any(report.values()), report
        images = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
        with torch.no_grad():
            features = model.model.vision_model(*(torch.tensor(reference[name]) for name in images)).last_hidden_state
        expected = reference[f"{convention}_vision"]
        np.testing.assert_allclose(features.numpy(), expected, rtol=0, atol=1e-4 * np.abs(expected).max())

    def test_how_far_logits_move_in_transformers(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """The command's figures against logits that transformers itself computes, unchanged and made to follow Meta."""
        source, out = write_small(tmp_path / "small"), tmp_path / "out"
        main([str(source), str(out), "--for", "transformers"])
        said = re.search(
            r"logits move by up to ([\d.]+)% of the largest, and .* stays the same after (\d+) of (\d+) tokens\.",
            capsys.readouterr().out,
        )
        assert said
        processor = Processor.from_pretrained(out)
        picture = gradient_picture(processor.config.vision.image_size)
        inputs = processor([processor.prompt(user_turn(QUESTION, images=1))], [[picture]])
        pixels = MllamaImageProcessorPil.from_pretrained(out)(picture, return_tensors="np")["pixel_values"]
        inputs["pixel_values"] = pixels
        new, model = (
            MllamaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
            for folder in (out, source)
        )
        with under("meta", model):
            old = logits_of(model, inputs)[0]
        there = logits_of(new, inputs)[0]
        sees = inputs["cross_attention_mask"][0].any(axis=(1, 2))
        share = np.abs(there - old)[sees].max() / np.abs(old[sees]).max()
        same = int((there.argmax(axis=1) == old.argmax(axis=1))[sees].sum())
        assert share > 0.02 and abs(float(said[1]) / 100 - share) < 0.0006
        assert (int(said[2]), int(said[3])) == (same, int(sees.sum()))

    def test_the_source_of_another_convention_is_as_it_says(self, source: Path, tmp_path: Path) -> None:
        main([str(source), str(tmp_path / "a"), "--convention", "transformers_4"])
        assert read_config(tmp_path / "a").convention == "transformers_4"
        main([str(tmp_path / "a"), str(tmp_path / "b"), "--convention", "meta"])
        assert read_config(tmp_path / "b").convention == "meta"

    @pytest.mark.slow
    def test_holds_one_tensor_at_a_time(self, tmp_path: Path) -> None:
        """In a process that may allocate little more than the largest tensor."""
        config = json.loads((FIXTURE / "config.json").read_text())
        config["text_config"] |= {"hidden_size": 1024, "intermediate_size": 4096}
        source = tmp_path / "wide"
        source.mkdir()
        (source / "config.json").write_text(json.dumps(config))
        shapes = {name: p.shape for name, p in parameters(read_config(source), "unrolled").items()}
        save_file({name: np.ones(s, np.float32) for name, s in shapes.items()}, source / "model.safetensors")
        largest = 4 * max(math.prod(shape) for shape in shapes.values())
        allowed = largest + (24 << 20)
        assert (source / "model.safetensors").stat().st_size > 5 * allowed
        limit = (
            "import resource, llava_cot_jax.convert, llava_cot_jax.model.checkpoint.conversion\n"  # what it imports
            "status = dict(line.split(':') for line in open('/proc/self/status'))\n"
            "used = int(status['VmData'].split()[0]) * 1024\n"
            f"resource.setrlimit(resource.RLIMIT_DATA, (used + {allowed},) * 2)"
        )
        result = run(source, tmp_path / "out", before=limit)
        assert result.returncode == 0, result.stderr


class TestRefusal:
    def test_onto_itself(self, source: Path) -> None:
        with pytest.raises(UserError, match="is the checkpoint to be converted"):
            main([str(source), str(source)])
        assert load_file(source / "model.safetensors")

    def test_onto_something(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/notes").write_text("mine")
        with pytest.raises(UserError, match="exists and is not empty"):
            main([str(source), str(tmp_path / "out")])
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes"]

    def test_one_line_and_code_2(self, tmp_path: Path) -> None:
        result = run(tmp_path / "nowhere", tmp_path / "out")
        assert result.returncode == 2
        assert result.stderr == f"error: no such folder: {tmp_path / 'nowhere'}\n"


@pytest.mark.slow
class TestDeath:
    @pytest.mark.parametrize("file", [1, 2])
    def test_kill_leaves_nothing_that_loads(self, source: Path, tmp_path: Path, file: int) -> None:
        """Killed when the weights, or also config.json, are on the disk."""
        killing = (
            "import os, signal, itertools\n"
            "calls, fsync = itertools.count(1), os.fsync\n"
            f"os.fsync = lambda d: os.kill(os.getpid(), signal.SIGKILL) if next(calls) == {file} else fsync(d)"
        )
        out = tmp_path / "out"
        assert run(source, out, before=killing).returncode == -signal.SIGKILL
        assert not out.exists()
        partial = tmp_path / ".out.partial"
        assert (partial / "model.safetensors").exists()
        if file == 1:
            with pytest.raises(UserError, match=r"holds no config\.json"):
                resolve_checkpoint(partial)
        with pytest.raises(UserError, match=f"{partial} is being written, or is left from a run that was killed"):
            main([str(source), str(out)])
        shutil.rmtree(partial)
        main([str(source), str(out)])
        assert resolve_checkpoint(out)

    def test_full_disk(self, source: Path, tmp_path: Path) -> None:
        """A limit on the size of files stands for the disk's."""
        limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000,) * 2)"
        before = set(tmp_path.iterdir())
        result = run(source, tmp_path / "out", before=limit)
        assert result.returncode == 2
        assert result.stderr.strip() == f"error: {tmp_path / 'out'} cannot be written: File too large"
        assert set(tmp_path.iterdir()) == before
