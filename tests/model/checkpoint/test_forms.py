"""Weights in other forms: each is named in one sentence with what to do, before anything is fetched or read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llava_cot_jax.errors import UserError
from llava_cot_jax.model.checkpoint.auxiliary_files import list_auxiliary_files
from llava_cot_jax.model.checkpoint.folder import read_config, resolve_checkpoint
from llava_cot_jax.model.checkpoint.reading import locate_tensors, read_slices

FIXTURE = Path(__file__).parents[2] / "fixtures/mllama_tiny"
CONFIG = json.loads((FIXTURE / "config.json").read_text())


def with_config(**changes: Any) -> str:
    return json.dumps(CONFIG | changes)


ADAPTER = {"adapter_config.json": "{}", "adapter_model.safetensors": ""}

FORMS: dict[str, tuple[dict[str, str], str, str]] = {
    "bitsandbytes": (
        {
            "config.json": with_config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
            "model.safetensors": "",
        },
        "quantized weights by bitsandbytes",
        "generate --quantize int8",
    ),
    "fp8 in the text's section": (
        {
            "config.json": with_config(text_config=CONFIG["text_config"] | {"quantization_config": {"x": 1}}),
            "model.safetensors": "",
        },
        "holds quantized weights (quantization_config",
        "give the checkpoint that it was made from",
    ),
    "mlx": (
        {"config.json": with_config(quantization={"bits": 4}), "model.safetensors": ""},
        "quantized weights (quantization in",
        "give the checkpoint",
    ),
    "an old GPTQ": (
        {"config.json": with_config(), "quantize_config.json": "{}", "model.safetensors": ""},
        "quantized weights (it has a quantize_config.json)",
        "give the checkpoint",
    ),
    "another model": (
        {"config.json": json.dumps({"model_type": "llava"}), "model.safetensors": ""},
        "is of a 'llava' model",
        "not of 'mllama'",
    ),
    "diffusers": ({"model_index.json": "{}"}, "a pipeline of the diffusers library", "give another"),
    "an adapter": (ADAPTER, "is an adapter, not a whole model", "--adapter"),
    "an adapter with the base's configuration": ({**ADAPTER, "config.json": with_config()}, "an adapter", "--adapter"),
    "pickles": (
        {"config.json": with_config(), "pytorch_model-00001-of-00002.bin": "", "pytorch_model.bin.index.json": "{}"},
        "pytorch_model-00001-of-00002.bin holds PyTorch pickles",
        "save_pretrained(NEW)",
    ),
    "an index of pickles": (
        {
            "config.json": with_config(),
            "model.safetensors.index.json": '{"weight_map": {"a": "model-1.pt"}}',
            "model-1.pt": "",
        },
        "holds PyTorch pickles",
        "save_pretrained(NEW)",
    ),
    "lightning": ({"epoch=3.ckpt": ""}, "epoch=3.ckpt holds PyTorch pickles", "save_pretrained(NEW)"),
    "meta": (
        {"consolidated.00.pth": "", "params.json": "{}"},
        "consolidated.00.pth is in Meta's own format",
        "convert_mllama_weights_to_hf.py",
    ),
    "gguf": ({"model-Q4_K_M.gguf": ""}, "model-Q4_K_M.gguf is a GGUF file", "that it was made from"),
    "flax": ({"config.json": with_config(), "flax_model.msgpack": ""}, "weights for Flax", "save_pretrained(NEW)"),
    "tensorflow": ({"config.json": with_config(), "tf_model.h5": ""}, "weights for TensorFlow", "save_pretrained"),
    "onnx": ({"model.onnx": ""}, "an ONNX program", "that it was made from"),
    "deepspeed": (
        {"global_step9/mp_rank_00_model_states.pt": "", "latest": "", "zero_to_fp32.py": ""},
        "of a DeepSpeed checkpoint",
        "zero_to_fp32.py",
    ),
    "fsdp": ({"pytorch_model_fsdp_0/__0_0.distcp": ""}, "sharded PyTorch (FSDP)", "accelerate merge-weights"),
    "deepspeed in a folder": (
        {"pytorch_model/mp_rank_00_model_states.pt": "", "latest": ""},
        "of a DeepSpeed checkpoint",
        "zero_to_fp32.py",
    ),
    "verl": ({"model_world_size_8_rank_0.pt": ""}, "sharded PyTorch (FSDP) checkpoint of verl", "verl.model_merger"),
    "orbax": ({"_CHECKPOINT_METADATA": "", "d/0": ""}, "of an Orbax checkpoint", "in Hugging Face form"),
    "orbax steps": ({"100/_CHECKPOINT_METADATA": "", "100/default/x": ""}, "of an Orbax checkpoint", "Hugging Face"),
    "maxtext": ({"items/manifest.ocdbt": "", "commit_success.txt": ""}, "of an Orbax checkpoint", "Hugging Face form"),
    "openvino": ({"openvino_model.xml": "", "openvino_model.bin": ""}, "an OpenVINO program", "that it was made from"),
    "a download": (
        {"config.json": with_config(), "model-00001-of-00005.safetensors.crdownload": ""},
        "of a download that has not ended",
        "fetch the checkpoint again",
    ),
    "a text-only model": ({"config.json": json.dumps({"model_type": "llama"})}, "of a 'llama' model", "of 'mllama'"),
    "no model": ({"config.json": "{}", "model.safetensors": ""}, "its config.json names no model_type", "is no Llama"),
    "torchao": (
        {"config.json": with_config(quantization_config={"quant_method": "torchao"}), "model.safetensors": ""},
        "quantized weights by torchao",
        "give the checkpoint",
    ),
    "a trainer's output": (
        {"checkpoint-500/model.safetensors": "", "checkpoint-1000/model.safetensors": "", "training_args.bin": ""},
        "the output folder of a trainer",
        "/checkpoint-1000",
    ),
    "a folder too high": ({"weights/model.safetensors": ""}, "safetensors files in weights", "give that folder"),
}


def lay(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_in_another_form(form: str, tmp_path: Path) -> None:
    files, what, remedy = FORMS[form]
    with pytest.raises(UserError) as caught:
        resolve_checkpoint(lay(tmp_path, files))
    message = str(caught.value)
    assert str(tmp_path) in message and what in message and remedy in message and "\n" not in message


@pytest.mark.parametrize("form", FORMS)
def test_a_repository_in_another_form_is_not_fetched(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, what, remedy = FORMS[form]
    lay(tmp_path, files)
    siblings = [SimpleNamespace(rfilename=name) for name in files]
    monkeypatch.setattr(huggingface_hub, "model_info", lambda name: SimpleNamespace(siblings=siblings))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: str(tmp_path / file))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("fetched"))
    with pytest.raises(UserError) as caught:
        resolve_checkpoint("org/model")
    assert str(caught.value).startswith("org/model ") and what in str(caught.value) and remedy in str(caught.value)


def test_a_repository_in_the_right_form_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    siblings = [SimpleNamespace(rfilename=name) for name in ("config.json", "model.safetensors", "original/a.pth")]
    monkeypatch.setattr(huggingface_hub, "model_info", lambda name: SimpleNamespace(siblings=siblings))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: str(FIXTURE / file))
    patterns: list[str] = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, allow_patterns: patterns.extend(allow_patterns) or str(FIXTURE),
    )
    assert resolve_checkpoint("org/model") == FIXTURE
    assert "*.safetensors" in patterns


@pytest.mark.parametrize("inside", ["", "model", "checkpoints", "checkpoints/100", "checkpoints/100/model"])
def test_a_training_run_and_what_lies_in_it(inside: str, tmp_path: Path) -> None:
    run = lay(tmp_path / "run", {"config.yaml": "", "model/config.json": with_config(), "checkpoints/100/model/x": ""})
    with pytest.raises(UserError, match=rf"the folder of a training run: .*llava_cot_jax\.convert {run} FOLDER"):
        resolve_checkpoint(run / inside)


def test_a_whole_model_beside_an_adapter_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lay(tmp_path, ADAPTER)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(FIXTURE / name, tmp_path)
    assert locate_tensors(resolve_checkpoint(tmp_path), read_config(tmp_path)).keys() == tensors().keys()
    assert "the adapter is not used; --adapter" in caplog.messages[0]
    assert list_auxiliary_files(tmp_path) == []


def test_files_of_a_training_beside_the_weights_are_left_alone(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(FIXTURE / name, tmp_path)
    lay(tmp_path, {"optimizer.pt": "", "training_args.bin": "", "global_step7/x.pt": "", "original/params.json": "{}"})
    assert resolve_checkpoint(tmp_path) == tmp_path


def test_a_folder_of_the_hubs_cache(tmp_path: Path) -> None:
    lay(
        tmp_path,
        {"refs/main": "abc", "snapshots/abc/config.json": with_config(), "snapshots/abc/model.safetensors": ""},
    )
    with pytest.raises(UserError, match=f"of the hub's cache: give the checkpoint in it, {tmp_path}/snapshots/abc$"):
        resolve_checkpoint(tmp_path)


@pytest.mark.parametrize("name", [3, None, ["model.safetensors"]])
def test_an_index_of_no_names(name: Any, tmp_path: Path) -> None:
    shutil.copy(FIXTURE / "model.safetensors", tmp_path)
    index = json.dumps({"weight_map": {"a": name}})
    lay(tmp_path, {"config.json": with_config(), "model.safetensors.index.json": index})
    with pytest.raises(UserError, match=r"index\.json is not the index of a checkpoint: fetch it again"):
        resolve_checkpoint(tmp_path)


def test_an_index_that_names_pickles_beside_safetensors(tmp_path: Path) -> None:
    shutil.copy(FIXTURE / "model.safetensors", tmp_path / "model-2.safetensors")
    index = '{"weight_map": {"a": "model-1.pt", "b": "model-2.safetensors"}}'
    lay(tmp_path, {"config.json": with_config(), "model.safetensors.index.json": index, "model-1.pt": ""})
    with pytest.raises(UserError, match=r"index\.json names model-1\.pt, which is no safetensors file: save"):
        resolve_checkpoint(tmp_path)


def tensors() -> dict[str, np.ndarray]:
    return load_file(FIXTURE / "model.safetensors")


def newer(name: str) -> str:
    """The name that transformers 5 gives a tensor in memory."""
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    return "model." + name.replace("language_model.model.", "language_model.")


WRAPPED: dict[str, Callable[[str], str]] = {
    "data parallel": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{newer(name)}",
    "a merged adapter": lambda name: f"base_model.model.{newer(name)}",
    "a merged adapter's own layers": lambda name: (
        f"base_model.model.{newer(name).replace('q_proj.', 'q_proj.base_layer.')}"
    ),
    "lightning": lambda name: f"model.{name}",
    "lightning around transformers 5": lambda name: f"model.{newer(name)}",
    "two wrappers": lambda name: f"module._orig_mod.{name}",
    "a compiled language model": lambda name: name.replace("language_model.", "language_model._orig_mod.", 1),
    "an average": lambda name: f"ema.shadow.{newer(name)}",
    "checkpointed layers": lambda name: name.replace("mlp.", "_checkpoint_wrapped_module.mlp."),
}


def save_under(names: Callable[[str], str], folder: Path, **more: np.ndarray) -> Path:
    shutil.copy(FIXTURE / "config.json", folder)
    save_file({names(name): tensor for name, tensor in tensors().items()} | more, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrapped_names(wrapper: str, tmp_path: Path) -> None:
    found = locate_tensors(save_under(WRAPPED[wrapper], tmp_path), read_config(tmp_path))
    for name, expected in tensors().items():
        value = np.empty_like(expected)
        read_slices(found[name], {tuple((0, size) for size in expected.shape): value})
        np.testing.assert_array_equal(value, expected)


def test_a_prefix_comes_off_where_the_model_is_whole(tmp_path: Path) -> None:
    """What else there is is named."""
    save_under(lambda name: f"module.{name}", tmp_path, **{"module.extra": np.zeros(3, np.float32)})
    with pytest.raises(UserError, match=r": unexpected extra$"):
        locate_tensors(tmp_path, read_config(tmp_path))


def test_a_file_that_git_lfs_has_not_fetched(tmp_path: Path) -> None:
    lay(
        tmp_path, {"config.json": with_config(), "model.safetensors": "version https://git-lfs.github.com/spec/v1\noid"}
    )
    with pytest.raises(UserError, match=r"is a pointer of Git LFS, not the weights: run `git lfs pull` there$"):
        locate_tensors(tmp_path, read_config(tmp_path))


def test_a_prefix_that_not_all_share_stays(tmp_path: Path) -> None:
    gate = "language_model.model.layers.3.cross_attn_attn_gate"
    save_under(lambda name: name if name == gate else f"module.{name}", tmp_path)
    with pytest.raises(UserError, match=r": missing vision_model\.class_embedding; "):
        locate_tensors(tmp_path, read_config(tmp_path))


@pytest.mark.parametrize(
    ("name", "dtype", "said"),
    [
        ("language_model.model.layers.0.self_attn.q_proj.weight.absmax", np.uint8, r"quantized \(U8\): give"),
        ("language_model.model.layers.0.self_attn.q_proj.weight_scale", np.float32, "quantized: give"),
        ("language_model.model.layers.0.self_attn.q_proj.input_scale", np.float32, "quantized: give"),
        ("language_model.model.layers.0.self_attn.q_proj.W_q", np.uint8, r"quantized \(U8\): give"),
        ("language_model.model.layers.0.self_attn.q_proj.weight:_data", np.float32, "quantized: give"),
        (
            "language_model.model.norm.other",
            np.float64,
            "there are weights in float64: save it in float32, float16 or bfloat16",
        ),
        ("model.language_model.layers.0.self_attn.q_proj.lora_A.weight", np.float32, "merge_and_unload"),
        ("layers.0.feed_forward.w1.weight", np.float32, "Meta's own format"),
    ],
)
def test_tensors_of_another_form(name: str, dtype: type, said: str, tmp_path: Path) -> None:
    """Where no file's name tells it."""
    save_under(str, tmp_path, **{name: np.zeros(3, dtype)})
    with pytest.raises(UserError, match=said):
        locate_tensors(tmp_path, read_config(tmp_path))


def test_tensors_of_another_model(tmp_path: Path) -> None:
    save_under(lambda name: f"{name}.x", tmp_path)
    with pytest.raises(
        UserError, match=r"none of its 216 tensors has a name of the model; the first is '.*\.x', where"
    ):
        locate_tensors(tmp_path, read_config(tmp_path))
