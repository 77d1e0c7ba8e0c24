"""Weights with numbers that are not finite, and tensors of zeros: named while they are read, and never written."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llava_cot_jax.convert import main as convert
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.checkpoint.faulty_numbers import is_finite
from llava_cot_jax.model.checkpoint.folder import read_config
from llava_cot_jax.model.checkpoint.sharded_loading import load_params
from llava_cot_jax.model.checkpoint.sharded_saving import save_params
from llava_cot_jax.model.sharding import make_mesh

FIXTURE = Path(__file__).parents[2] / "fixtures/mllama_tiny"
CONFIG = read_config(FIXTURE)
EMBEDDING, LM_HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
NORM, O_PROJ = "language_model.model.norm.weight", "language_model.model.layers.2.self_attn.o_proj.weight"
UP, GATE = "language_model.model.layers.7.mlp.up_proj.weight", "language_model.model.layers.3.cross_attn_attn_gate"

Change = Callable[[dict[str, np.ndarray]], None]


def put(name: str, value: float) -> Change:
    """A change of one number, in the last row."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name][-1] = np.where(np.arange(tensors[name][-1].size) == 3, value, tensors[name][-1])

    return change


def zero(*names: str) -> Change:
    return lambda tensors: [tensors[name].fill(0) for name in names]  # type: ignore[return-value]


def write(folder: Path, *changes: Change) -> Path:
    """The tiny checkpoint with changes."""
    shutil.copytree(FIXTURE, folder, ignore=shutil.ignore_patterns("*.npz", "*.safetensors"))
    tensors = load_file(FIXTURE / "model.safetensors")
    for change in changes:
        change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def refusal(folder: Path, **settings: object) -> str:
    with pytest.raises(UserError) as caught:
        load_params(folder, CONFIG, **{"layout": "unrolled", **settings})
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("layout", ["unrolled", "stacked"])
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -np.nan])
def test_numbers_that_are_not_finite(tmp_path: Path, value: float, devices: int, layout: str) -> None:
    folder = write(tmp_path / "bad", put(UP, value), put(LM_HEAD, value))
    mesh = make_mesh(fsdp=devices) if devices > 1 else None
    message = refusal(folder, layout=layout, mesh=mesh)
    assert message.startswith(f"{folder} holds no sound weights: ")
    named = message.partition("weights: ")[2].rpartition(": fetch the checkpoint again")[0].split("; ")
    assert sorted(named) == [f"{name} holds numbers that are not finite" for name in (LM_HEAD, UP)]


def test_tensors_of_zeros(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "bad", zero(EMBEDDING, NORM)))
    assert f"{EMBEDDING} holds nothing but zeros; {NORM} holds nothing but zeros" in message


def test_zeros_that_a_model_may_have(tmp_path: Path) -> None:
    """Meta's gates are 0 at first, and a branch may be switched off. A shard of a sparse table may be zero."""

    def empty_half(tensors: dict[str, np.ndarray]) -> None:
        tensors[EMBEDDING][:, :32] = 0

    folder = write(tmp_path / "good", zero(GATE, O_PROJ, "multi_modal_projector.bias"), empty_half)
    for mesh in (None, make_mesh(fsdp=8)):
        assert load_params(folder, CONFIG, layout="unrolled", mesh=mesh).keys()


@pytest.mark.filterwarnings("error")
def test_an_overflow_of_the_dtype(tmp_path: Path) -> None:
    folder = write(tmp_path / "large", put(UP, 70000.0))
    assert load_params(folder, CONFIG, layout="unrolled", dtype="bfloat16")
    message = refusal(folder, dtype="float16")
    assert message.endswith(
        f"{UP} holds numbers that are not finite: choose another dtype than float16, or fetch the checkpoint again"
    )


@pytest.mark.parametrize(
    ("change", "dtype", "words"),
    [
        (put(UP, np.nan), "float32", "numbers that are not finite: fetch the checkpoint again"),
        (put(UP, 70000.0), "float16", "numbers that are not finite as float16: choose another dtype, or fetch"),
        (
            lambda tensors: tensors.update({UP: (tensors[UP] * 1e8).astype(ml_dtypes.bfloat16)}),
            "float16",
            "numbers that are not finite as float16: choose another dtype, or fetch",
        ),
        (zero(UP), "float32", "nothing but zeros: fetch the checkpoint again"),
    ],
)
def test_none_are_copied(tmp_path: Path, change: Change, dtype: str, words: str) -> None:
    folder = write(tmp_path / "bad", change)
    with pytest.raises(UserError, match=f"{folder}: {UP} holds {words}"):
        convert([str(folder), str(tmp_path / "out"), "--dtype", dtype])
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_none_are_saved(tmp_path: Path) -> None:
    arrays = load_params(FIXTURE, CONFIG, layout="unrolled")
    arrays[NORM] = arrays[NORM].at[5].set(np.inf)
    with pytest.raises(UserError, match=f"^{NORM} holds numbers that are not finite in float32: no checkpoint"):
        save_params(arrays, CONFIG, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    jax.block_until_ready(arrays)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_pattern_of_bits(dtype: type) -> None:
    """Against numpy: all numbers of 16 bits, and those of 32 whose lower half is 0 or 1."""
    high = np.arange(1 << 16, dtype=np.uint32)
    bits = [high.astype(np.uint16)] if np.dtype(dtype).itemsize == 2 else [high << 16, (high << 16) | 1]
    for each in bits:
        values = each.view(dtype)
        for value in values[::7].reshape(-1, 1):
            assert is_finite(value) == math.isfinite(float(value[0]))
    blocks = np.ones(300_000, dtype)
    assert is_finite(blocks)
    blocks[-1] = np.nan
    assert not is_finite(blocks)
