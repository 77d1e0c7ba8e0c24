"""LoRA adapters of the PEFT library: trained and saved there on the model of transformers, and read here."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig
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
from tests.conftest import INPUTS
from tests.parity.reference import logits_of, published_weights, under
from tests.parity.test_transformers import OFF

FIXTURE = Path(__file__).parents[2] / "fixtures/mllama_tiny"


class Trained(NamedTuple):
    """An adapter that PEFT has trained and saved, and what comes of it there."""

    folder: Path
    logits: np.ndarray
    """On ``batch``, by the convention ``meta``."""
    weights: dict[str, np.ndarray]
    """Every published tensor, merged in float64 by PEFT and rounded to float32."""


def base() -> MllamaForConditionalGeneration:
    return MllamaForConditionalGeneration.from_pretrained(FIXTURE, attn_implementation="eager").eval()


def train(batch: Mapping[str, np.ndarray], folder: Path, name: str = "default", **settings: Any) -> Trained:
    """Three steps of Adam on all rows of ``batch``, two of which have images."""
    torch.manual_seed(0)
    reference, inputs = base(), {key: torch.tensor(value) for key, value in batch.items()}
    answers = inputs["input_ids"][:, 1:].clone()
    answers[(inputs["attention_mask"][:, 1:] == 0) | (answers == reference.config.image_token_index)] = -100
    with under("meta", reference):
        adapted = peft.get_peft_model(reference, LoraConfig(**{"r": 4, "lora_alpha": 6} | settings), adapter_name=name)
        optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
        for _ in range(3):
            logits = adapted(**inputs, use_cache=False).logits[:, :-1]
            torch.nn.functional.cross_entropy(logits.transpose(1, 2), answers).backward()
            optimizer.step()
            optimizer.zero_grad()
        adapted.save_pretrained(folder)
        logits = logits_of(adapted.eval(), dict(batch))
        return Trained(folder, logits, published_weights(adapted.double().merge_and_unload()))


def assert_same_logits(adapter: Path, expected: np.ndarray, batch: Mapping[str, np.ndarray]) -> None:
    found = np.asarray(Mllama.from_pretrained(FIXTURE, adapter=adapter)(**batch))
    there = np.asarray(batch["attention_mask"]).astype(bool)
    assert np.abs(found - expected)[there].max() < OFF * np.abs(expected[there]).max()


@pytest.fixture(scope="module")
def plain(reference: Mapping[str, np.ndarray]) -> np.ndarray:
    """The logits of the base model on ``batch``."""
    model = base()
    with under("meta", model):
        return logits_of(model, {name: reference[name] for name in INPUTS})


VARIANTS: dict[str, dict[str, Any]] = {
    "last names": {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1},
    "rslora": {"target_modules": ["q_proj", "up_proj"], "use_rslora": True},
    "ranks and scales of modules": {
        "target_modules": ["q_proj", "down_proj", "fc1"],
        "rank_pattern": {"down_proj": 2, r"^model\.language_model\.layers\.0\.self_attn\.q_proj": 3},
        "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 30, "q_proj|down_proj": 3},
    },
    "whole modules": {"target_modules": ["k_proj"], "modules_to_save": ["lm_head", "norm", "multi_modal_projector"]},
    "whole embeddings": {"target_modules": ["k_proj"], "modules_to_save": ["embed_tokens", "layers.3"]},
    "modules of the tower": {
        "target_modules": ["fc2"],
        "modules_to_save": ["layernorm_pre", "gated_positional_embedding", "patch_embedding"],
    },
    "all biases": {"target_modules": ["fc1", "q_proj"], "bias": "all"},
    "all biases, and those of whole modules": {"target_modules": ["fc1"], "bias": "all", "modules_to_save": ["norm"]},
    "biases of the targets": {"target_modules": ["fc1", "multi_modal_projector"], "bias": "lora_only"},
    "a regular expression": {"target_modules": r"model\.language_model\.layers\.\d+\.cross_attn\.[qo]_proj"},
    "all linear": {"target_modules": "all-linear"},
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [1, 4], "layers_pattern": "layers"},
    "all but the tower": {"target_modules": ["o_proj"], "exclude_modules": r".*vision_model.*"},
    "the last projection": {"target_modules": ["lm_head"]},
    "another start": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_trained_there_gives_the_same_logits_here(
    variant: str, tmp_path: Path, batch: Mapping[str, np.ndarray], plain: np.ndarray
) -> None:
    trained = train(batch, tmp_path, **VARIANTS[variant])
    there = np.asarray(batch["attention_mask"]).astype(bool)
    largest = np.abs(trained.logits[there]).max()
    assert np.abs(trained.logits - plain)[there].max() > 0.02 * largest
    assert_same_logits(tmp_path, trained.logits, batch)


def test_pissa_that_was_saved_against_its_start(tmp_path: Path, batch: Mapping[str, np.ndarray]) -> None:
    """PEFT then writes an adapter of twice the rank for the base as it was."""
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"]}
    torch.manual_seed(0)
    model = base()
    with under("meta", model):
        adapted = peft.get_peft_model(model, LoraConfig(**settings, init_lora_weights="pissa"))
        adapted.peft_config["default"].init_lora_weights = True
        adapted.save_pretrained(tmp_path / "start")
        adapted.peft_config["default"].init_lora_weights = "pissa"
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if ".lora_" in name:
                    parameter.mul_(1.5)
        adapted.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
        expected = logits_of(adapted, dict(batch))
    assert_same_logits(tmp_path / "end", expected, batch)


def test_an_adapter_with_a_name_lies_in_a_folder(tmp_path: Path, batch: Mapping[str, np.ndarray]) -> None:
    trained = train(batch, tmp_path, "mine", target_modules=["q_proj"])
    with pytest.raises(UserError, match=f"{tmp_path} holds its adapters in folders: give one, such as {tmp_path}/mine"):
        read_adapter_settings(tmp_path)
    assert_same_logits(tmp_path / "mine", trained.logits, batch)


@pytest.fixture(scope="module")
def trained(reference: Mapping[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """An adapter with projections of every kind, and with parameters that were trained whole."""
    return train(
        {name: reference[name] for name in INPUTS},
        tmp_path_factory.mktemp("adapter"),
        target_modules=["q_proj", "down_proj", "fc1", "multi_modal_projector", "lm_head"],
        modules_to_save=["norm"],
        bias="all",
        rank_pattern={"down_proj": 2},
        alpha_pattern={"down_proj": 3},
    )


def copied(trained: Trained, folder: Path) -> Path:
    shutil.copytree(trained.folder, folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_in_slices_and_in_a_new_checkpoint(dtype: str, trained: Trained, tmp_path: Path) -> None:
    """On a mesh in the stacked layout, and by the command ``convert``, both rounded once."""
    config, expected = read_config(FIXTURE), trained.weights
    main([str(FIXTURE), str(tmp_path / "out"), "--adapter", str(trained.folder), "--dtype", dtype])
    written = load_file(tmp_path / "out/model.safetensors")
    assert written.keys() == expected.keys()
    step = 2.0**-20 if dtype == "float32" else 2.0**-8
    for name, value in expected.items():
        np.testing.assert_allclose(written[name].astype(float), value, rtol=step, atol=2**-20, err_msg=name)
    settings = read_adapter_settings(trained.folder)
    arrays = load_params(FIXTURE, config, layout="stacked", dtype=dtype, mesh=make_mesh(2, 2, 2), adapter=settings)
    for path, parameter in parameters(config, "stacked").items():
        parts = jax.device_get(arrays[path]) if parameter.stacked else [jax.device_get(arrays[path])]
        for name, part in zip(parameter.tensors, parts, strict=True):
            np.testing.assert_allclose(part.astype(float), expected[name], rtol=step, atol=2**-20, err_msg=name)


def test_names_of_transformers_4(trained: Trained, tmp_path: Path) -> None:
    """The same adapter, trained where the language model's path was another."""
    adapter = copied(trained, tmp_path / "adapter")
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
    for name, value in trained.weights.items():
        np.testing.assert_allclose(jax.device_get(arrays[name]), value, rtol=2**-20, atol=2**-20, err_msg=name)


def test_what_peft_trained_is_not_taken_for_metas(
    trained: Trained, tmp_path: Path, warnings_of: pytest.LogCaptureFixture
) -> None:
    adapter = copied(trained, tmp_path / "adapter")
    Mllama.from_pretrained(FIXTURE, adapter=adapter)
    assert [message for message in warnings_of.messages if f"{adapter} was saved by PEFT, and transformers" in message]
    warnings_of.clear()
    Mllama.from_pretrained(FIXTURE, adapter=adapter, convention="transformers_5")
    assert not warnings_of.messages


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def change(**settings: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | settings))

    return edit


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
    "no alpha": (change(lora_alpha=None), "lora_alpha or alpha_pattern is missing or no number"),
    "half a pair": (tensors_changed(lambda t: t.pop(KEY + "B.weight")), "q_proj.lora_A.weight has no lora_B beside it"),
    "another size": (
        tensors_changed(lambda t: t.update({KEY + "A.weight": np.zeros((4, 3), np.float32)})),
        "q_proj.lora_A.weight [4, 3] and its lora_B [64, 4] do not fit the model's weight [64, 64]",
    ),
    "a magnitude": (
        tensors_changed(lambda t: t.update({KEY + "magnitude_vector": np.zeros(4, np.float32)})),
        "lora_magnitude_vector is no matrix of a plain LoRA: merge it in PEFT with merge_and_unload(), and give",
    ),
    "another model's module": (
        tensors_changed(lambda t: t.update({"base_model.model.model.layers.0.norm.weight": np.zeros(4, np.float32)})),
        "belongs to no parameter of the model: it is another model's",
    ),
    "no tensors": (tensors_changed(dict.clear), "holds no tensors: save the adapter again"),
    "no pattern": (change(alpha_pattern={"(": 3}), "alpha_pattern holds no regular expression"),
    "numbers that are not finite": (
        tensors_changed(lambda t: t[KEY + "B.weight"].fill(np.nan)),
        "self_attn.q_proj.weight with its adapter holds numbers that are not finite: fetch the checkpoint and the",
    ),
    "a whole tensor that is not finite": (
        tensors_changed(lambda t: t["base_model.model.model.language_model.norm.weight"].fill(np.inf)),
        r"language_model.model.norm.weight of the adapter holds numbers that are not finite: fetch",
    ),
    "no finite scale": (change(lora_alpha=np.nan), "lora_alpha or alpha_pattern is missing or no number (it is nan)"),
    "a scale for none": (change(alpha_pattern=[3]), "lora_alpha or alpha_pattern is missing or no number"),
    "settings cut short": (
        lambda folder: (folder / "adapter_config.json").write_text("{"),
        "adapter_config.json is not JSON",
    ),
    "weights cut short": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(
            (folder / "adapter_model.safetensors").read_bytes()[:-9]
        ),
        "adapter_model.safetensors is damaged or cut short",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_adapters_that_are_refused(name: str, trained: Trained, tmp_path: Path) -> None:
    damage, said = REFUSED[name]
    damage(copied(trained, tmp_path / "adapter"))
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        Mllama.from_pretrained(FIXTURE, adapter=tmp_path / "adapter")
    assert "\n" not in str(caught.value)


OF_OTHER_KINDS: dict[str, tuple[Any, str]] = {
    "ia3": (
        lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "peft_type is 'IA3'; only 'LORA' is supported",
    ),
    "loha": (lambda: peft.LoHaConfig(target_modules=["k_proj"]), "peft_type is 'LOHA'; only 'LORA' is supported"),
    "dora": (lambda: LoraConfig(target_modules=["k_proj"], use_dora=True), "use_dora is True, which is not supported"),
    "kasa": (
        lambda: LoraConfig(target_modules=["k_proj"], kasa_config=peft.KasaConfig()),
        "k_proj.lora_diag is no matrix of a plain LoRA",
    ),
    "biases of its own": (lambda: LoraConfig(target_modules=["fc1"], lora_bias=True), "lora_bias is True, which is"),
    "tokens": (
        lambda: LoraConfig(target_modules=["k_proj"], trainable_token_indices=[3, 5]),
        "trainable_token_indices is [3, 5], which is not supported",
    ),
    "parameters": (
        lambda: LoraConfig(target_modules=["k_proj"], target_parameters=["up_proj.weight"]),
        "target_parameters is ['up_proj.weight'], which is not supported",
    ),
    "an embedding": (
        lambda: LoraConfig(target_modules=["embed_tokens"]),
        "embed_tokens.lora_embedding_A is no matrix of a plain LoRA",
    ),
    "a convolution": (
        lambda: LoraConfig(target_modules=["patch_embedding"]),
        "patch_embedding.lora_A.weight adapts a convolution or a vector, which is not supported",
    ),
    "pissa": (
        lambda: LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa_niter_4"),
        "init_lora_weights is 'pissa_niter_4', with which PEFT may change the base model's weights",
    ),
    "olora": (
        lambda: LoraConfig(target_modules=["q_proj"], init_lora_weights="olora"),
        "init_lora_weights is 'olora', with which PEFT may change the base model's weights",
    ),
}


@pytest.mark.parametrize("kind", OF_OTHER_KINDS)
def test_adapters_of_other_kinds_are_refused(kind: str, tmp_path: Path) -> None:
    make, said = OF_OTHER_KINDS[kind]
    peft.get_peft_model(base(), make()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        Mllama.from_pretrained(FIXTURE, adapter=tmp_path)
    remedy = "merge it in PEFT with merge_and_unload(), and give the model that this makes as the checkpoint"
    assert remedy in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_as_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=f"is the folder of a training run: .*convert {tmp_path} FOLDER --for peft"):
        read_adapter_settings(tmp_path)
