"""LoRA adapters in PEFT's form, against plain torch on the model of transformers. PEFT itself is not installed."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import MllamaForConditionalGeneration

from llava_cot_jax.convert import main
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.checkpoint.adapter_settings import read_adapter_settings
from llava_cot_jax.model.checkpoint.folder import read_config
from llava_cot_jax.model.checkpoint.sharded_loading import load_params
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.model.parameters import parameters
from llava_cot_jax.model.sharding import make_mesh
from tests.parity.reference import apply_adapter, logits_of, under
from tests.parity.test_transformers import OFF

FIXTURE = Path(__file__).parents[2] / "fixtures/mllama_tiny"
CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "lora_alpha": 6,
    "bias": "all",
    "use_rslora": False,
    "rank_pattern": {"down_proj": 2},
    "alpha_pattern": {"down_proj": 3},
    "target_modules": ["q_proj", "down_proj", "fc1", "multi_modal_projector", "lm_head"],
    "modules_to_save": ["norm"],
}


def model() -> MllamaForConditionalGeneration:
    return MllamaForConditionalGeneration.from_pretrained(FIXTURE, attn_implementation="eager").eval()


def random_adapter(folder: Path, **changes: Any) -> Path:
    """An adapter as PEFT saves one that was trained on the model of transformers: on projections of every kind."""
    draw = np.random.default_rng(0)
    tensors = {}
    for name, module in model().named_modules():
        target = name.split(".")[-1]
        if isinstance(module, torch.nn.Linear) and target in CONFIG["target_modules"]:
            rank = CONFIG["rank_pattern"].get(target, CONFIG["r"])
            sizes = {"A": (rank, module.in_features), "B": (module.out_features, rank)}
            for letter, size in sizes.items():
                value = draw.normal(0, 0.2, size).astype(np.float32)
                tensors[f"base_model.model.{name}.lora_{letter}.weight"] = value
            if target == "fc1":
                bias = draw.normal(0, 0.2, module.out_features).astype(np.float32)
                tensors[f"base_model.model.{name}.base_layer.bias"] = bias
        if name == "model.language_model.norm":
            tensors[f"base_model.model.{name}.weight"] = draw.normal(1, 0.2, module.weight.shape).astype(np.float32)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
    return folder


@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_adapter_made_there_gives_the_same_logits_here(
    use_rslora: bool, tmp_path: Path, batch: Mapping[str, np.ndarray]
) -> None:
    adapter = random_adapter(tmp_path / "adapter", use_rslora=use_rslora)
    reference = model()
    with under("meta", reference):
        plain = logits_of(reference, dict(batch))
        apply_adapter(reference, adapter)
        expected = logits_of(reference, dict(batch))
    found = np.asarray(Mllama.from_pretrained(FIXTURE, adapter=adapter)(**batch))
    there = np.asarray(batch["attention_mask"]).astype(bool)
    largest = np.abs(expected[there]).max()
    assert np.abs(found - expected)[there].max() < OFF * largest < 0.1 * np.abs(plain - expected)[there].max()


def merged(adapter: Path) -> dict[str, np.ndarray]:
    """Every tensor of the checkpoint with the adapter, float64."""
    found = {name: value.astype(float) for name, value in load_file(FIXTURE / "model.safetensors").items()}
    tensors = load_file(adapter / "adapter_model.safetensors")
    for key, value in tensors.items():
        name = key.removeprefix("base_model.model.").replace("base_layer.", "")
        name = name.replace("model.language_model", "language_model.model").replace("lm_head", "language_model.lm_head")
        name = name.removeprefix("model.")
        if ".lora_A" in name:
            scale = 1.5  # 6 / 4, and 3 / 2 for down_proj
            b = tensors[key.replace("lora_A", "lora_B")].astype(float)
            found[name.replace("lora_A.", "")] += scale * b @ value.astype(float)
        elif ".lora_B" not in name:
            found[name] = value.astype(float)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_in_slices_and_in_a_new_checkpoint(dtype: str, tmp_path: Path) -> None:
    """On a mesh in the stacked layout, and by the command ``convert``, both rounded once."""
    adapter, config = random_adapter(tmp_path / "adapter"), read_config(FIXTURE)
    main([str(FIXTURE), str(tmp_path / "out"), "--adapter", str(adapter), "--dtype", dtype])
    written, expected = load_file(tmp_path / "out/model.safetensors"), merged(adapter)
    assert written.keys() == expected.keys()
    step = 2.0**-20 if dtype == "float32" else 2.0**-8
    for name, value in expected.items():
        np.testing.assert_allclose(written[name].astype(float), value, rtol=step, atol=2**-20, err_msg=name)
    settings = read_adapter_settings(adapter)
    arrays = load_params(FIXTURE, config, layout="stacked", dtype=dtype, mesh=make_mesh(2, 2, 2), adapter=settings)
    for path, parameter in parameters(config, "stacked").items():
        parts = jax.device_get(arrays[path]) if parameter.stacked else [jax.device_get(arrays[path])]
        for name, part in zip(parameter.tensors, parts, strict=True):
            np.testing.assert_allclose(part.astype(float), expected[name], rtol=step, atol=2**-20, err_msg=name)


def test_names_of_transformers_4(tmp_path: Path) -> None:
    """The same adapter, trained where the language model's path was another."""
    adapter = random_adapter(tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")

    def older(key: str) -> str:
        inner = key.removeprefix("base_model.model.")
        inner = inner.replace("lm_head", "language_model.lm_head").removeprefix("model.")
        key = "base_model.model." + inner.replace("language_model.layers", "language_model.model.layers").replace(
            "language_model.norm", "language_model.model.norm"
        )
        return key.replace(".weight", ".default.weight") if "lora_" in key else key

    save_file({older(key): value for key, value in tensors.items()}, adapter / "adapter_model.safetensors")
    assert set(load_file(adapter / "adapter_model.safetensors")).isdisjoint(tensors)
    arrays = load_params(FIXTURE, read_config(FIXTURE), layout="unrolled", adapter=read_adapter_settings(adapter))
    for name, value in merged(random_adapter(tmp_path / "same")).items():
        np.testing.assert_allclose(jax.device_get(arrays[name]), value, rtol=2**-20, atol=2**-20, err_msg=name)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def change(**settings: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / "adapter_config.json").write_text(json.dumps(CONFIG | settings))


def tensors_changed(edit: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return damage


KEY = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_"

REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no settings": (remove("adapter_config.json"), "holds no adapter_config.json; is it the folder of an adapter"),
    "no weights": (remove("adapter_model.safetensors"), "holds no adapter_model.safetensors: save it again"),
    "a pickle": (
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
        "adapter_model.bin is a PyTorch pickle, which is not read",
    ),
    "another method": (change(peft_type="IA3"), "peft_type is 'IA3'; only 'LORA' is supported"),
    "dora": (change(use_dora=True), "use_dora is True, which is not supported: merge the adapter in PEFT"),
    "biases of its own": (change(lora_bias=True), "lora_bias is True"),
    "pissa": (
        change(init_lora_weights="pissa_niter_4"),
        "init_lora_weights is 'pissa_niter_4', with which PEFT may change",
    ),
    "no alpha": (change(lora_alpha=None), "lora_alpha or alpha_pattern is missing or no number"),
    "half a pair": (tensors_changed(lambda t: t.pop(KEY + "B.weight")), "q_proj.lora_A.weight has no lora_B beside it"),
    "another size": (
        tensors_changed(lambda t: t.update({KEY + "A.weight": np.zeros((4, 3), np.float32)})),
        r"q_proj.lora_A.weight \[4, 3\] and its lora_B \[64, 4\] do not fit the model's weight \[64, 64\]",
    ),
    "a magnitude": (
        tensors_changed(lambda t: t.update({KEY + "magnitude_vector": np.zeros(4, np.float32)})),
        "lora_magnitude_vector is no matrix of a plain LoRA: merge",
    ),
    "another model's module": (
        tensors_changed(lambda t: t.update({"base_model.model.model.layers.0.norm.weight": np.zeros(4, np.float32)})),
        "belongs to no parameter of the model: it is another model's",
    ),
    "no tensors": (tensors_changed(dict.clear), "holds no tensors: save the adapter again"),
    "no pattern": (change(alpha_pattern={"(": 3}), "alpha_pattern holds no regular expression"),
    "numbers that are not finite": (
        tensors_changed(lambda t: t[KEY + "B.weight"].fill(np.nan)),
        r"self_attn.q_proj.weight with its adapter holds numbers that are not finite: fetch the checkpoint and the",
    ),
    "a whole tensor that is not finite": (
        tensors_changed(lambda t: t["base_model.model.model.language_model.norm.weight"].fill(np.inf)),
        r"language_model.model.norm.weight of the adapter holds numbers that are not finite: fetch",
    ),
    "an embedding": (
        tensors_changed(
            lambda t: t.update({"base_model.model.model.language_model.embed_tokens.lora_embedding_A": np.zeros(4)})
        ),
        "lora_embedding_A is no matrix of a plain LoRA",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_adapters_that_are_refused(name: str, tmp_path: Path) -> None:
    damage, said = REFUSED[name]
    damage(random_adapter(tmp_path / "adapter"))
    with pytest.raises(UserError, match=said) as caught:
        Mllama.from_pretrained(FIXTURE, adapter=tmp_path / "adapter")
    assert "\n" not in str(caught.value)


def test_a_run_as_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=f"is the folder of a training run: .*convert {tmp_path} FOLDER --for peft"):
        read_adapter_settings(tmp_path)
