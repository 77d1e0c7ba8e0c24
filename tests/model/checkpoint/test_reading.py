"""Finding a checkpoint, and what is said of one that is not whole."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import get_args

import huggingface_hub
import numpy as np
import pytest
import transformers
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.numpy import load_file, save_file
from transformers import MllamaConfig

from llava_cot_jax.errors import UserError
from llava_cot_jax.model.checkpoint import reading
from llava_cot_jax.model.checkpoint.folder import read_config, read_max_new_tokens, resolve_checkpoint
from llava_cot_jax.model.checkpoint.reading import StoredTensor, locate_tensors, read_slices
from llava_cot_jax.model.convention import Convention
from llava_cot_jax.paths import BUNDLED_MODEL_FOLDER, as_path

FIXTURE = Path(__file__).parents[2] / "fixtures/mllama_tiny"
GATE = "language_model.model.layers.3.cross_attn_attn_gate"
LM_HEAD, NORM = "language_model.lm_head.weight", "language_model.model.norm.weight"
Tensors = dict[str, np.ndarray]


@pytest.fixture
def tensors() -> Tensors:
    return load_file(FIXTURE / "model.safetensors")


def write(folder: Path, *files: Tensors) -> Path:
    """A checkpoint of these files' tensors, without an index."""
    folder.mkdir(exist_ok=True)
    shutil.copy(FIXTURE / "config.json", folder)
    for i, file in enumerate(files):
        save_file(file, folder / ("model.safetensors" if len(files) == 1 else f"part-{i}.safetensors"))
    return folder


def refusal(folder: Path) -> str:
    """The one line with which the checkpoint is refused."""
    with pytest.raises(UserError) as caught:
        locate_tensors(folder, read_config(FIXTURE))
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestVerification:
    def test_a_whole_checkpoint_passes(self) -> None:
        assert len(locate_tensors(FIXTURE, read_config(FIXTURE))) == 216

    def test_missing(self, tmp_path: Path, tensors: Tensors) -> None:
        del tensors[GATE]
        assert refusal(write(tmp_path, tensors)).endswith(f": missing {GATE}")

    def test_unexpected(self, tmp_path: Path, tensors: Tensors) -> None:
        tensors["language_model.model.layers.10.mlp.up_proj.weight"] = tensors[GATE]
        message = refusal(write(tmp_path, tensors))
        assert message.endswith(": unexpected language_model.model.layers.10.mlp.up_proj.weight")

    def test_doubled_in_two_files(self, tmp_path: Path, tensors: Tensors) -> None:
        message = refusal(write(tmp_path, tensors, {GATE: tensors[GATE]}))
        assert message.endswith(f": {GATE} is stored 2 times (in part-0.safetensors, part-1.safetensors)")

    def test_doubled_under_old_and_new_name(self, tmp_path: Path, tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors[LM_HEAD]
        assert refusal(write(tmp_path, tensors)).endswith(f": {LM_HEAD} is stored 2 times (in model.safetensors)")

    def test_wrong_shape(self, tmp_path: Path, tensors: Tensors) -> None:
        tensors[LM_HEAD] = tensors[LM_HEAD].T.copy()
        assert refusal(write(tmp_path, tensors)).endswith(f": {LM_HEAD} has shape [64, 256], should have [256, 64]")

    @pytest.mark.parametrize("dtype", [np.int8, np.float64])
    def test_wrong_dtype(self, tmp_path: Path, tensors: Tensors, dtype: type) -> None:
        tensors[NORM] = tensors[NORM].astype(dtype)
        said = "quantized (I8)" if dtype is np.int8 else "there are weights in float64: save it in float32"
        assert said in refusal(write(tmp_path, tensors))

    def test_all_faults_in_one_line(self, tmp_path: Path, tensors: Tensors) -> None:
        del tensors[GATE]
        tensors["stray"] = tensors[NORM] = tensors[NORM][:3].copy()
        message = refusal(write(tmp_path, tensors, {LM_HEAD: tensors[LM_HEAD]}))
        for culprit in (
            f"missing {GATE}",
            "unexpected stray",
            f"{LM_HEAD} is stored 2",
            f"{NORM} has shape [3], should have [64]",
        ):
            assert culprit in message

    def test_many_faults_are_counted(self, tmp_path: Path, tensors: Tensors) -> None:
        message = refusal(write(tmp_path, {LM_HEAD: tensors[LM_HEAD]}))
        assert message.count("missing") == 20 and message.endswith("; and 195 more")


class TestFiles:
    @pytest.mark.parametrize("kept", [4, 1000, 2_000_000])
    def test_truncated(self, tmp_path: Path, tensors: Tensors, kept: int) -> None:
        file = write(tmp_path, tensors) / "model.safetensors"
        os.truncate(file, kept)
        assert f"{file} is damaged or cut short" in refusal(tmp_path)

    def test_header_is_no_json(self, tmp_path: Path, tensors: Tensors) -> None:
        file = write(tmp_path, tensors) / "model.safetensors"
        with file.open("r+b") as raw:
            raw.seek(8)
            raw.write(b"?")
        assert f"{file} is damaged" in refusal(tmp_path)

    def test_cut_short_after_the_check(self, tmp_path: Path, tensors: Tensors) -> None:
        stored = locate_tensors(write(tmp_path, tensors), read_config(FIXTURE))[LM_HEAD]
        os.truncate(stored.file, stored.offset + 100)
        with pytest.raises(UserError, match=r"model\.safetensors ended early"):
            read_slices(stored, {((0, 256), (0, 64)): np.empty((256, 64), np.float32)})

    def test_file_of_the_index_is_missing(self, tmp_path: Path, tensors: Tensors) -> None:
        write(tmp_path, tensors, {})
        names = {name: "part-0.safetensors" for name in tensors} | {GATE: "part-7.safetensors"}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        assert f"{tmp_path / 'part-7.safetensors'} does not exist" in refusal(tmp_path)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "is not JSON"),
            ("[]", "holds no JSON object"),
            ("{}", "is not the index of a checkpoint: fetch it again"),
            ('{"weight_map": 3}', "is not the index of a checkpoint: fetch it again"),
        ],
    )
    def test_index_is_damaged(self, tmp_path: Path, tensors: Tensors, text: str, message: str) -> None:
        write(tmp_path, tensors, {})
        (tmp_path / "model.safetensors.index.json").write_text(text)
        assert f"model.safetensors.index.json {message}" in refusal(tmp_path)

    def test_two_checkpoints_in_a_folder(self, tmp_path: Path, tensors: Tensors) -> None:
        write(tmp_path, tensors)
        save_file({}, tmp_path / "other.safetensors")
        assert "keep only one" in refusal(tmp_path)

    def test_files_outside_the_index_are_left_alone(self, tmp_path: Path, tensors: Tensors) -> None:
        write(tmp_path, tensors, {"stray": tensors[GATE]})
        names = dict.fromkeys(tensors, "part-0.safetensors")
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        assert len(locate_tensors(tmp_path, read_config(tmp_path))) == 216


class TestReading:
    """Boxes of a tensor of three axes against numpy's slices."""

    SHAPE = (6, 8, 10)

    @pytest.fixture
    def stored(self, tmp_path: Path) -> StoredTensor:
        self.values = np.arange(480, dtype=np.float32).reshape(self.SHAPE)
        file = tmp_path / "raw"
        file.write_bytes(b"head" + self.values.tobytes())
        return StoredTensor("x", file, 4, self.SHAPE, "F32")

    @pytest.mark.parametrize(
        "boxes",
        [
            [((0, 6), (0, 8), (0, 10))],
            [((2, 5), (0, 8), (0, 10))],
            [((3, 4), (1, 3), (0, 10))],
            [((1, 3), (2, 4), (5, 9))],
            [((0, 6), (0, 4), (0, 10)), ((0, 6), (4, 8), (0, 10))],
            [((0, 3), (0, 8), (0, 5)), ((0, 3), (0, 8), (5, 10)), ((3, 6), (0, 8), (0, 5)), ((3, 6), (0, 8), (5, 10))],
            [((0, 6), (0, 2), (0, 10)), ((0, 6), (6, 8), (0, 10))],
        ],
    )
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("block_bytes", [1, 700, 1 << 20])
    def test_boxes(
        self,
        stored: StoredTensor,
        boxes: list[reading.TensorSlice],
        dtype: str,
        block_bytes: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(reading, "_BLOCK_BYTES", block_bytes)
        shards = {box: np.empty(reading.slice_shape(box), dtype) for box in boxes}
        count = read_slices(stored, shards)
        assert count == 4 * sum(reading.slice_size(box) for box in boxes)
        for box, shard in shards.items():
            np.testing.assert_array_equal(shard, self.values[tuple(slice(*span) for span in box)].astype(dtype))


class TestResolve:
    def test_a_folder(self) -> None:
        assert resolve_checkpoint(FIXTURE) == resolve_checkpoint(str(FIXTURE)) == FIXTURE

    @pytest.mark.parametrize(
        "name", ["/nowhere/model", "./nowhere", "~/nowhere/x", "a/b/c", "nowhere", "tests/nowhere"]
    )
    def test_no_such_folder(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(Path(__file__).parents[3])
        with pytest.raises(UserError, match=f"^no such folder: {re.escape(str(as_path(name)))}$"):
            resolve_checkpoint(name)

    def test_a_path_is_never_a_hub_id(self) -> None:
        with pytest.raises(UserError, match=r"^no such folder: /.*/some/model$"):
            resolve_checkpoint(Path("some/model"))

    def test_a_file(self) -> None:
        with pytest.raises(UserError, match="is a file; give the folder"):
            resolve_checkpoint(FIXTURE / "config.json")

    def test_no_config(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"holds no config\.json"):
            resolve_checkpoint(tmp_path)

    def test_no_weights(self, tmp_path: Path) -> None:
        shutil.copy(FIXTURE / "config.json", tmp_path)
        with pytest.raises(UserError, match=r"holds no \*\.safetensors"):
            resolve_checkpoint(tmp_path)

    def test_hub_id_without_network(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(UserError, match=r"^there is no folder /.*/org/model, .* org/model is not in the local"):
            resolve_checkpoint("org/model")

    def test_hub_cache_without_network(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        repository = tmp_path / "models--org--model"
        shutil.copytree(FIXTURE, repository / "snapshots/abc")
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text("abc")
        assert resolve_checkpoint("org/model") == repository / "snapshots/abc"

    @pytest.mark.parametrize(
        ("error", "remedy"), [(GatedRepoError, "accept its licence"), (RepositoryNotFoundError, "check the name")]
    )
    def test_refused_by_the_hub(
        self, error: type[RepositoryNotFoundError], remedy: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise error.__new__(error)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
        with pytest.raises(UserError, match=f"org/model.*{remedy}.*hf auth login"):
            resolve_checkpoint("org/model")

    def test_not_a_name_of_the_hub(self) -> None:
        with pytest.raises(UserError, match="not a valid id on the hub: org/a--b"):
            resolve_checkpoint("org/a--b")


class TestConvention:
    def test_stated_by_the_reader(self) -> None:
        assert read_config(FIXTURE).convention == "meta"
        assert read_config(FIXTURE, "transformers_4").convention == "transformers_4"

    def test_contradicting_the_file(self, tmp_path: Path) -> None:
        stated = json.loads((FIXTURE / "config.json").read_text()) | {"convention": "transformers_5"}
        (tmp_path / "config.json").write_text(json.dumps(stated))
        assert read_config(tmp_path).convention == "transformers_5"
        assert read_config(tmp_path, "transformers_5").convention == "transformers_5"
        assert read_config(tmp_path, "meta").convention == "meta"

    def test_one_that_is_assumed_is_said(self, tmp_path: Path, warnings_of: pytest.LogCaptureFixture) -> None:
        """transformers keeps what it does not know when it saves a model again."""
        MllamaConfig.from_pretrained(FIXTURE).save_pretrained(tmp_path)
        assert read_config(tmp_path).convention == "transformers_5"
        (line,) = warnings_of.messages
        assert line == (
            f"the convention 'transformers_5' is assumed, because config.json in {tmp_path} states 'meta', but "
            f"transformers {transformers.__version__} saved it and may have tuned the weights: name the right one by "
            "--convention, or convention= in Python (see configs/README.md)"
        )
        read_config(tmp_path, "transformers_5")
        assert len(warnings_of.messages) == 1

    def test_what_this_package_writes_is_believed(self, tmp_path: Path, warnings_of: pytest.LogCaptureFixture) -> None:
        for convention in get_args(Convention):
            config = read_config(FIXTURE, convention)
            (tmp_path / "config.json").write_text(json.dumps(config.to_dict("float32")))
            assert read_config(tmp_path) == config
        read_config(BUNDLED_MODEL_FOLDER)
        assert not warnings_of.messages


class TestStatedLength:
    def test_the_package_s_own_model(self) -> None:
        assert read_max_new_tokens(resolve_checkpoint("shapes")) == 128

    @pytest.mark.parametrize("content", [None, "{}"])
    def test_none(self, tmp_path: Path, content: str | None) -> None:
        if content:
            (tmp_path / "generation_config.json").write_text(content)
        assert read_max_new_tokens(tmp_path) is None

    @pytest.mark.parametrize("value", ["0", "true", '"many"', "1.5"])
    def test_no_count(self, tmp_path: Path, value: str) -> None:
        (tmp_path / "generation_config.json").write_text(f'{{"max_new_tokens": {value}}}')
        with pytest.raises(UserError, match=r"generation_config\.json: max_new_tokens is .*; it must be"):
            read_max_new_tokens(tmp_path)


def test_the_folder_of_a_run_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"is the folder of a training run: .*llava_cot_jax\.convert"):
        resolve_checkpoint(tmp_path)
