"""The configuration: read, written, validated, and every field of it alive."""

import dataclasses
import json
from dataclasses import replace

import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from transformers import MllamaConfig as HFConfig

from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.generator import Generator
from llava_cot_jax.model.config import MllamaConfig, RopeScaling, TextConfig, VisionConfig
from llava_cot_jax.model.convention import find_convention
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.model.parameters import parameters
from tests.conftest import INPUTS


def test_either_spelling_of_rope_reads_the_same(tiny):
    published = json.loads((tiny / "config.json").read_text())
    new = MllamaConfig.from_dict(published)
    rope = published["text_config"].pop("rope_parameters")
    published["text_config"]["rope_theta"] = rope.pop("rope_theta")
    published["text_config"]["rope_scaling"] = rope
    assert MllamaConfig.from_dict(published) == new
    assert new.text.rope_scaling.original_max_position_embeddings == 64


@pytest.mark.parametrize("config", [MllamaConfig.llama32_11b(), MllamaConfig.llama32_90b()])
def test_what_is_written_reads_the_same_here_and_in_transformers(config):
    config = replace(config, convention="transformers_4")
    written = json.loads(json.dumps(config.to_dict("bfloat16")))
    assert MllamaConfig.from_dict(written) == config
    there = HFConfig.from_dict(written).to_dict()
    assert MllamaConfig.from_dict({**there, "convention": "transformers_4"}) == config


def test_the_published_sizes():
    small, large = MllamaConfig.llama32_11b(), MllamaConfig.llama32_90b()
    assert small.text.cross_attention_layers == (3, 8, 13, 18, 23, 28, 33, 38)
    assert large.text.cross_attention_layers == tuple(range(3, 99, 5))
    assert (small.text.layers_per_block, large.text.layers_per_block) == (5, 5)
    assert (small.vision.tile_tokens, small.vision.image_tokens, small.vision.output_size) == (1601, 6404, 7680)


@pytest.mark.parametrize(
    ("layers", "cross", "period"),
    [(10, (3, 8), 5), (6, (1, 3, 5), 2), (7, (1, 3, 5), 7), (4, (), 1), (3, (0, 1, 2), 1), (12, (3, 8), 12)],
)
def test_period(layers, cross, period):
    assert TextConfig(num_hidden_layers=layers, cross_attention_layers=cross).layers_per_block == period


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: replace(c.vision, attention_heads=3), "attention_heads"),
        (lambda c: replace(c.vision, patch_size=13), "patch_size"),
        (lambda c: replace(c.vision, intermediate_layers_indices=(0, 6)), "tap 6"),
        (lambda c: replace(c.vision, intermediate_layers_indices=(-1,)), "tap -1"),
        (lambda c: replace(c.vision, supported_aspect_ratios=((1, 1), (2, 3))), "2 x 3"),
        (lambda c: replace(c.vision, supported_aspect_ratios=()), "supported_aspect_ratios"),
        (lambda c: replace(c.vision, image_std=(1.0, 0.0, 1.0)), "image_std"),
        (lambda c: replace(c.vision, image_mean=(0.5,)), "image_mean"),
        (lambda c: replace(c.vision, num_hidden_layers=0), "num_hidden_layers"),
        (lambda c: replace(c.vision, num_global_layers=-1), "num_global_layers"),
        (lambda c: replace(c.text, num_attention_heads=5), "num_attention_heads"),
        (lambda c: replace(c.text, num_key_value_heads=3), "num_key_value_heads"),
        (lambda c: replace(c.text, num_attention_heads=64, num_key_value_heads=64), "head_dim"),
        (lambda c: replace(c.text, cross_attention_layers=(3, 10)), "cross_attention_layers"),
        (lambda c: replace(c.text, cross_attention_layers=(8, 3)), "ascend"),
        (lambda c: replace(c.text.rope_scaling, low_freq_factor=4.0), "low_freq_factor"),
        (lambda c: replace(c, convention="meta_2"), "meta_2"),
        (lambda c: replace(c, image_token_index=300), "image_token_index"),
        (
            lambda c: replace(c, vision=replace(c.vision, intermediate_layers_indices=(0,))).for_transformers(),
            "block 0",
        ),
    ],
)
def test_a_contradiction_is_named(tiny, change, named):
    with pytest.raises(UserError, match=named):
        change(MllamaConfig.from_pretrained(tiny))


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        (None, "model_type", "llama"),
        (None, "vision_config", None),
        ("vision_config", "hidden_act", "relu"),
        ("vision_config", "vision_output_dim", 7),
        ("text_config", "hidden_act", "gelu"),
        ("text_config", "tie_word_embeddings", True),
        ("text_config", "dropout", 0.1),
        ("text_config", "rope_parameters", {"rope_type": "yarn"}),
        ("text_config", "rope_parameters", {"rope_type": "llama3"}),
    ],
)
def test_a_setting_that_is_not_supported_is_refused(tiny, section, name, value):
    published = json.loads((tiny / "config.json").read_text())
    (published[section] if section else published)[name] = value
    with pytest.raises(UserError, match=str(value) if isinstance(value, str) else "config"):
        MllamaConfig.from_dict(published)


def test_a_config_file_that_is_missing_or_broken(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        MllamaConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        MllamaConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("found", "convention", "doubt"),
    [
        ({"convention": "transformers_4"}, "transformers_4", ""),
        ({"convention": "transformers_5", "transformers_version": "5.23.0"}, "transformers_5", ""),
        ({"convention": "transformers_4", "transformers_version": "4.46.1"}, "transformers_4", ""),
        ({"convention": "meta", "transformers_version": "4.45.0.dev0"}, "meta", ""),
        ({}, "meta", "states none"),
        ({"transformers_version": "4.45.0.dev0"}, "meta", "has the version of Meta's released files"),
        ({"transformers_version": "main"}, "meta", "has an unknown version, main, and nothing"),
        ({"transformers_version": "main"}, "meta", "nothing tells of another training"),
        (
            {"transformers_version": "4.45.0.dev0", "_name_or_path": "meta-llama/Llama-3.2-11B-Vision-Instruct"},
            "transformers_4",
            "states none, but transformers 4.45.0.dev0 saved it",
        ),
        ({"transformers_version": "4.54.1"}, "transformers_4", "states none, but transformers 4.54.1 saved it"),
        ({"transformers_version": "4.56.0.dev0"}, "transformers_5", "states none, but transformers 4.56.0.dev0"),
        ({"transformers_version": "5.0.0rc1"}, "transformers_5", "states none, but transformers 5.0.0rc1 saved it"),
        ({"convention": "meta", "transformers_version": "5.23.0"}, "transformers_5", "states 'meta', but transformers"),
        (
            {"convention": "transformers_5", "transformers_version": "4.50.0"},
            "transformers_4",
            "states 'transformers_5'",
        ),
    ],
)
def test_a_convention_that_is_not_stated_is_that_of_the_saver(tiny, tmp_path, found, convention, doubt):
    published = json.loads((tiny / "config.json").read_text())
    del published["convention"]
    (tmp_path / "config.json").write_text(json.dumps(published | found))
    assert MllamaConfig.from_pretrained(tmp_path).convention == convention
    reason = find_convention(published | found)[1]
    assert doubt in reason and bool(reason) == bool(doubt)


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_pixel_statistics_come_from_the_processor(tmp_path, tiny, file):
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    settings = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    nested = settings if file == "preprocessor_config.json" else {"image_processor": settings}
    (tmp_path / file).write_text(json.dumps(nested))
    vision = MllamaConfig.from_pretrained(tmp_path).vision
    assert (vision.image_mean, vision.image_std) == ((0.5,) * 3, (0.25,) * 3)


OTHER_VALUES = {
    ("vision", "num_channels"): {"num_channels": 1, "image_mean": (0.5,), "image_std": (0.5,)},
    ("vision", "supported_aspect_ratios"): {"supported_aspect_ratios": ((2, 1), (1, 1), (1, 2), (2, 2), (4, 1))},
    ("vision", "image_mean"): {"image_mean": (0.4, 0.4, 0.4)},
    ("vision", "image_std"): {"image_std": (0.2, 0.2, 0.2)},
    ("vision", "max_num_tiles"): {"max_num_tiles": 5},
    ("vision", "image_size"): {"image_size": 42},
    ("vision", "patch_size"): {"patch_size": 7},
    ("vision", "intermediate_layers_indices"): {"intermediate_layers_indices": (2,)},
    ("vision", "attention_heads"): {"attention_heads": 2},
    ("vision", "hidden_size"): {"hidden_size": 64},
    ("text", "hidden_size"): {"hidden_size": 128},
    ("text", "num_attention_heads"): {"num_attention_heads": 8},
    ("text", "num_key_value_heads"): {"num_key_value_heads": 4},
    ("text", "cross_attention_layers"): {"cross_attention_layers": (2,)},
    ("text", "eos_token_ids"): {"eos_token_ids": (130,)},
    ("text", "max_position_embeddings"): {"max_position_embeddings": 20},
    ("text", "rope_scaling"): {"rope_scaling": None},
    ("rope", "original_max_position_embeddings"): {"original_max_position_embeddings": 8},
    ("rope", "low_freq_factor"): {"low_freq_factor": 3.5},
    ("model", "convention"): {"convention": "transformers_4"},
}
"""Values for the fields that adding 1 (or a hundredth) to would make invalid."""
READ_ELSEWHERE = {
    ("text", "bos_token_id"): "the processor: tests/data/test_processor.py",
    ("model", "image_token_index"): "the processor: tests/data/test_processor.py",
    ("model", "vision"): "its own fields",
    ("model", "text"): "its own fields",
}
FIELDS = [
    (kind, field.name)
    for kind, section in (
        ("vision", VisionConfig),
        ("text", TextConfig),
        ("rope", RopeScaling),
        ("model", MllamaConfig),
    )
    for field in dataclasses.fields(section)
    if (kind, field.name) not in READ_ELSEWHERE
]


def perturbed(config: MllamaConfig, kind: str, name: str) -> MllamaConfig:
    section = {"vision": config.vision, "text": config.text, "rope": config.text.rope_scaling, "model": config}[kind]
    value = getattr(section, name)
    if (kind, name) in OTHER_VALUES:
        changes = OTHER_VALUES[kind, name]
    else:
        changes = {name: value + (1 if isinstance(value, int) else max(value, 0.01))}
    section = replace(section, **changes)
    if kind == "model":
        return section
    if kind == "rope":
        return replace(config, text=replace(config.text, rope_scaling=section))
    return replace(config, **{kind: section})


class Observed:
    """What a configuration makes of fixed weights and inputs."""

    def __init__(self, config, batch):
        self.arrays = flatten_dict(Mllama(config, rngs=nnx.Rngs(0)).params, sep=".")
        raw = np.random.default_rng(0).integers(0, 256, batch["pixel_values"].shape, dtype=np.uint8)
        # Long enough for a rotation of few turns to show.
        repeats = {n: np.tile(batch[n], (1, 4) + (1,) * (batch[n].ndim - 2)) for n in ("input_ids", "attention_mask")}
        visible = np.concatenate([batch["cross_attention_mask"], *[batch["cross_attention_mask"][:, -1:]] * 30], axis=1)
        self.batch = {**batch, **repeats, "cross_attention_mask": visible, "pixel_values": raw}

    def logits(self, config: MllamaConfig) -> np.ndarray:
        return np.asarray(Mllama.from_arrays(config, self.arrays, layout="unrolled")(**self.batch))

    def answers(self, config: MllamaConfig) -> np.ndarray:
        model = Mllama.from_arrays(config, self.arrays, layout="unrolled")
        return Generator(model).generate(self.batch, max_new_tokens=8)


@pytest.fixture(scope="module")
def observed(small, reference):
    config = small
    observe = Observed(config, {name: reference[name] for name in INPUTS})
    # The first answer ends at once, so that what ends an answer and what fills it up show.
    first = observe.logits(config)[0, -1].argmax()
    config = replace(config, text=replace(config.text, eos_token_ids=(int(first),)))
    return observe, config, observe.logits(config), observe.answers(config)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_every_field_changes_something(observed, kind, name):
    observe, config, logits, answers = observed
    other = perturbed(config, kind, name)
    if parameters(other, "unrolled") != parameters(config, "unrolled"):
        return  # other tensors, or other values of fresh ones
    try:
        if np.array_equal(observe.logits(other), logits):
            assert not np.array_equal(observe.answers(other), answers)
    except UserError:
        assert name in ("max_position_embeddings", "max_num_tiles", "image_size")
