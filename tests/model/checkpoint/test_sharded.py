"""Weights between files and sharded arrays: bit for bit, byte for byte."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import MllamaConfig as HFConfig
from transformers import MllamaForConditionalGeneration

from llava_cot_jax.errors import UserError
from llava_cot_jax.model.checkpoint import reading
from llava_cot_jax.model.checkpoint.folder import read_config
from llava_cot_jax.model.checkpoint.sharded_loading import load_params
from llava_cot_jax.model.checkpoint.sharded_saving import save_params
from llava_cot_jax.model.parameters import ParamLayout, parameters
from llava_cot_jax.model.sharding import make_mesh, parameter_sharding

FIXTURE = Path(__file__).parents[2] / "fixtures/mllama_tiny"
CONFIG = read_config(FIXTURE)
MESHES = [None, (1, 1, 1), (2, 2, 2), (8, 1, 1), (1, 8, 1)]
LAYOUTS: list[ParamLayout] = ["unrolled", "stacked"]
BYTES = 2_024_492  # of the fixture's tensors


def mesh_of(sizes: tuple[int, int, int] | None) -> Mesh | None:
    return None if sizes is None else make_mesh(*sizes)


@pytest.fixture(scope="module")
def stored() -> dict[str, np.ndarray]:
    return load_file(FIXTURE / "model.safetensors")


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the operating system was asked for, call by call."""
    counts: list[int] = []

    def counting(descriptor: int, buffers: list[memoryview], position: int) -> int:
        counts.append(preadv(descriptor, buffers, position))
        return counts[-1]

    preadv = os.preadv
    monkeypatch.setattr(reading.os, "preadv", counting)
    return counts


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
class TestLoad:
    def test_every_value_in_its_place(
        self, sizes: tuple[int, int, int] | None, layout: ParamLayout, stored: dict[str, np.ndarray]
    ) -> None:
        mesh = mesh_of(sizes)
        arrays = load_params(FIXTURE, CONFIG, layout=layout, mesh=mesh)
        table = parameters(CONFIG, layout)
        assert arrays.keys() == table.keys()
        for path, parameter in table.items():
            tensors = [stored[name] for name in parameter.tensors]
            np.testing.assert_array_equal(arrays[path], np.stack(tensors) if parameter.stacked else tensors[0])
            if mesh is not None:
                assert arrays[path].sharding == parameter_sharding(parameter, mesh)

    def test_one_process_reads_each_byte_once(
        self, sizes: tuple[int, int, int] | None, layout: ParamLayout, bytes_read: list[int]
    ) -> None:
        progress: list[tuple[int, int]] = []
        load_params(
            FIXTURE, CONFIG, layout=layout, mesh=mesh_of(sizes), on_progress=lambda *counts: progress.append(counts)
        )
        assert sum(bytes_read) == BYTES
        assert len(bytes_read) <= 4 * len(parameters(CONFIG, "unrolled"))  # shards cut along columns are read together
        assert progress[-1] == (BYTES, BYTES)
        assert [done for done, _ in progress] == sorted({done for done, _ in progress})


class TestDtypes:
    @pytest.mark.parametrize("held_as", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("file_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_any_to_any(self, tmp_path: Path, file_dtype: torch.dtype, held_as: str) -> None:
        model = random_model(file_dtype)
        model.save_pretrained(tmp_path)
        expected = model.state_dict()["lm_head.weight"].to(getattr(torch, held_as)).float().numpy()
        array = load_params(tmp_path, CONFIG, layout="stacked", dtype=held_as, mesh=make_mesh(2, 2, 2))
        assert {a.dtype.name for a in array.values()} == {held_as}
        np.testing.assert_array_equal(array["language_model.lm_head.weight"].astype(jnp.float32), expected)

    def test_default_is_that_of_lm_head(self, tmp_path: Path) -> None:
        random_model(torch.bfloat16).save_pretrained(tmp_path)
        assert {a.dtype for a in load_params(tmp_path, CONFIG, layout="stacked").values()} == {jnp.dtype("bfloat16")}

    def test_no_dtype_of_weights(self) -> None:
        with pytest.raises(UserError, match="dtype int8 are not supported; one of float32, float16, bfloat16"):
            load_params(FIXTURE, CONFIG, layout="stacked", dtype="int8")


def test_mesh_that_does_not_divide() -> None:
    with pytest.raises(UserError, match="does not divide"):
        load_params(FIXTURE, CONFIG, layout="stacked", mesh=make_mesh(tensor=8))


def test_donation_leaves_replicas_alone() -> None:
    """Replicas on CPU devices may share the buffer that was read into; a donated one must not be written to."""
    path = "language_model.model.norm.weight"
    arrays = load_params(FIXTURE, CONFIG, layout="stacked", mesh=make_mesh(data=8))
    kept = [shard.data for shard in arrays[path].addressable_shards][1:]
    before = np.array(kept[0])
    doubled = jax.jit(lambda x: 2 * x, donate_argnums=0)(arrays[path].addressable_shards[0].data)
    np.testing.assert_array_equal(doubled, 2 * before)
    for replica in kept:
        np.testing.assert_array_equal(replica, before)


def random_model(dtype: torch.dtype) -> MllamaForConditionalGeneration:
    torch.manual_seed(0)
    return MllamaForConditionalGeneration(HFConfig.from_pretrained(FIXTURE)).to(dtype)


def assert_same_model(folder: Path, model: MllamaForConditionalGeneration) -> None:
    """transformers finds in ``folder`` the weights of ``model``, no more, no less, bit for bit."""
    again, report = MllamaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    expected = model.state_dict()
    for name, tensor in again.state_dict().items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


class TestRoundTrip:
    @pytest.mark.slow
    @pytest.mark.parametrize("sizes", MESHES, ids=str)
    @pytest.mark.parametrize(("layout", "max_file_bytes"), [("unrolled", 5_000_000_000), ("stacked", 200_000)])
    def test_through_transformers(
        self, tmp_path: Path, sizes: tuple[int, int, int] | None, layout: ParamLayout, max_file_bytes: int
    ) -> None:
        model = random_model(torch.bfloat16)
        model.save_pretrained(tmp_path / "theirs", max_shard_size="300KB")
        arrays = load_params(tmp_path / "theirs", CONFIG, layout=layout, mesh=mesh_of(sizes))
        save_params(arrays, CONFIG, tmp_path / "ours", max_file_bytes=max_file_bytes)
        assert_same_model(tmp_path / "ours", model)
        assert read_config(tmp_path / "ours") == CONFIG

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_other_dtypes(self, tmp_path: Path, dtype: torch.dtype) -> None:
        model = random_model(dtype)
        model.save_pretrained(tmp_path / "theirs")
        save_params(load_params(tmp_path / "theirs", CONFIG, layout="stacked"), CONFIG, tmp_path / "ours")
        assert_same_model(tmp_path / "ours", model)

    def test_newer_names(self, tmp_path: Path, stored: dict[str, np.ndarray]) -> None:
        newer = {newer_name(name): tensor for name, tensor in stored.items()}
        save_file(newer, tmp_path / "model.safetensors")
        arrays = load_params(tmp_path, CONFIG, layout="unrolled")
        save_params(arrays, CONFIG, tmp_path / "ours")
        again = load_file(tmp_path / "ours/model.safetensors")
        assert again.keys() == stored.keys()
        assert all(np.array_equal(again[name], stored[name]) for name in stored)


def newer_name(name: str) -> str:
    """The name of a published tensor in the models of transformers 5."""
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    return "model." + name.replace("language_model.model.", "language_model.")


class TestSave:
    @pytest.fixture(scope="class")
    def arrays(self) -> dict[str, jax.Array]:
        return load_params(FIXTURE, CONFIG, layout="stacked", mesh=make_mesh(1, 8, 1))

    @pytest.mark.slow
    def test_files_and_index(self, tmp_path: Path, arrays: dict[str, jax.Array]) -> None:
        save_params(arrays, CONFIG, tmp_path / "out", max_file_bytes=200_000)
        index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        assert index["metadata"] == {"total_size": BYTES}
        files = sorted((tmp_path / "out").glob("*.safetensors"))
        assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
        assert {name: file.name for file in files for name in load_file(file)} == index["weight_map"]
        for file in files:  # transformers 4 refuses a file that does not say this
            with safe_open(file, "numpy") as opened:
                assert opened.metadata() == {"format": "pt"}
        assert all(sum(t.nbytes for t in load_file(file).values()) <= 200_000 for file in files)

    def test_a_tensor_beyond_the_limit_has_its_own_file(self, tmp_path: Path, arrays: dict[str, jax.Array]) -> None:
        save_params(arrays, CONFIG, tmp_path / "out", max_file_bytes=1)
        assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(parameters(CONFIG, "unrolled"))

    def test_leaves_no_copy_on_the_host(self, tmp_path: Path) -> None:
        arrays = load_params(FIXTURE, CONFIG, layout="unrolled", mesh=make_mesh(1, 8, 1))
        save_params(arrays, CONFIG, tmp_path / "out")
        assert all(array._npy_value is None for array in arrays.values())

    def test_onto_an_empty_folder(self, tmp_path: Path, arrays: dict[str, jax.Array]) -> None:
        (tmp_path / "out").mkdir()
        save_params(arrays, CONFIG, tmp_path / "out", extra_files=[FIXTURE / "generation_config.json"])
        assert names_in(tmp_path / "out") == {"config.json", "generation_config.json", "model.safetensors"}

    def test_what_is_there_stays(self, tmp_path: Path, arrays: dict[str, jax.Array]) -> None:
        (tmp_path / "notes").write_text("mine")
        with pytest.raises(UserError, match="exists and is not empty"):
            save_params(arrays, CONFIG, tmp_path)
        assert names_in(tmp_path) == {"notes"}

    def test_leftover_of_a_killed_run(self, tmp_path: Path, arrays: dict[str, jax.Array]) -> None:
        (tmp_path / ".out.partial").mkdir()
        with pytest.raises(UserError, match=r"\.out\.partial is being written, or is left from a run.*remove it"):
            save_params(arrays, CONFIG, tmp_path / "out")

    @pytest.mark.parametrize("failing_write", [1, 2, 3])
    def test_full_disk(
        self, tmp_path: Path, arrays: dict[str, jax.Array], failing_write: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "fsync", failing_at(failing_write, os.fsync))
        with pytest.raises(UserError, match=rf"no space left on the disk of {tmp_path}/out: free some"):
            save_params(arrays, CONFIG, tmp_path / "out", max_file_bytes=1_100_000)
        assert not names_in(tmp_path)

    def test_too_little_space(
        self, tmp_path: Path, arrays: dict[str, jax.Array], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
        with pytest.raises(UserError, match=r"needs 0\.0 GB; its disk has 0\.0 GB free"):
            save_params(arrays, CONFIG, tmp_path / "out")
        assert not names_in(tmp_path)

    def test_arrays_of_another_model(self, tmp_path: Path, arrays: dict[str, jax.Array]) -> None:
        with pytest.raises(ValueError, match="do not match this configuration"):
            save_params(dict(list(arrays.items())[1:]), CONFIG, tmp_path / "out")


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def failing_at(count: int, call: Callable[[int], None]) -> Callable[[int], None]:
    """``call``, out of space the ``count``-th time."""
    calls = 0

    def failing(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        call(descriptor)

    return failing
