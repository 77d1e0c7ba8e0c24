"""Small random Llama-3.2-Vision models in transformers, under any of the three conventions, and inputs for them."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from transformers import MllamaConfig as HFConfig
from transformers import MllamaForConditionalGeneration
from transformers.models.mllama import modeling_mllama
from transformers.models.mllama.image_processing_pil_mllama import (
    MllamaImageProcessorPil,
    get_all_supported_aspect_ratios,
)
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from llava_cot_jax.model.config import CLIP_MEAN, CLIP_STD
from llava_cot_jax.model.convention import Convention

VOCABULARY = 128
BOS, EOS, PAD, IMAGE = 120, 121, 122, VOCABULARY


@dataclass(frozen=True)
class Sizes:
    """What a random configuration is drawn over."""

    layers: int
    cross: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    vision_layers: int
    global_layers: int
    vision_heads: int
    taps: tuple[int, ...]
    tiles: int
    image_size: int

    @classmethod
    def draw(cls, seed: int) -> "Sizes":
        """Odd seeds give a pattern of cross layers that repeats, even ones (all but surely) none that does."""
        rng = np.random.default_rng([seed, 11])
        if seed % 2:
            period, repeats = int(rng.integers(2, 6)), int(rng.integers(1, 4))
            place = int(rng.integers(1, period))  # transformers cannot cache a cross layer at index 0
            layers, cross = period * repeats, tuple(range(place, period * repeats, period))
        else:
            layers = int(rng.integers(4, 12))
            cross = tuple(
                sorted(rng.choice(np.arange(1, layers), size=int(rng.integers(1, layers // 2)), replace=False))
            )
        kv_heads, vision_layers = int(rng.integers(1, 4)), int(rng.integers(2, 7))
        taps = rng.choice(np.arange(1, vision_layers), size=int(rng.integers(1, vision_layers)), replace=False)
        return cls(
            layers=layers,
            cross=tuple(int(c) for c in cross),
            heads=kv_heads * int(rng.integers(1, 4)),
            kv_heads=kv_heads,
            head_dim=int(rng.choice([8, 16])),
            vision_layers=vision_layers,
            global_layers=int(rng.integers(1, 4)),
            vision_heads=int(rng.choice([1, 2, 4])),
            taps=tuple(sorted(int(t) for t in taps)),
            tiles=int(rng.integers(1, 6)),
            image_size=int(rng.choice([14, 28, 42])),
        )

    def hf_config(self) -> HFConfig:
        hidden, width = self.heads * self.head_dim, 16 * self.vision_heads
        return HFConfig(
            vision_config={
                "hidden_size": width,
                "intermediate_size": 2 * width,
                "num_hidden_layers": self.vision_layers,
                "num_global_layers": self.global_layers,
                "attention_heads": self.vision_heads,
                "image_size": self.image_size,
                "patch_size": 14,
                "max_num_tiles": self.tiles,
                "supported_aspect_ratios": [list(r) for r in get_all_supported_aspect_ratios(self.tiles)],
                "intermediate_layers_indices": list(self.taps),
                "vision_output_dim": width * (1 + len(self.taps)),
            },
            text_config={
                "vocab_size": VOCABULARY,
                "hidden_size": hidden,
                "intermediate_size": 2 * hidden,
                "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads,
                "num_key_value_heads": self.kv_heads,
                "cross_attention_layers": list(self.cross),
                "max_position_embeddings": 512,
                "bos_token_id": BOS,
                "eos_token_id": EOS,
                "pad_token_id": PAD,
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 10000.0,
                    "factor": 4.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                },
            },
            image_token_index=IMAGE,
        )


def random_model(config: HFConfig, seed: int) -> MllamaForConditionalGeneration:
    """float32, with every gate open: the default initialisation shuts the image path."""
    torch.manual_seed(seed)
    model = MllamaForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name.rsplit(".", 1)[-1]:
                parameter.uniform_(0.5, 0.9)
            elif parameter.ndim == 1 and name.endswith("norm.weight"):
                parameter.uniform_(0.8, 1.2)
            else:
                parameter.normal_(0.0, 0.12)
    return model


def batch_of_rows(config: HFConfig, seed: int, padding: str) -> dict[str, np.ndarray]:
    """Four rows as a transformers processor gives them: one image, two in a row, none, two apart.

    Args:
        config: Configuration of the model.
        seed: Seed of tokens and pixels.
        padding: "left" or "right", the side on which shorter sequences are padded.
    """
    rng, vision = np.random.default_rng(seed), config.vision_config

    def some(count: int) -> list[int]:
        return rng.integers(0, BOS, count).tolist()

    ids = [
        [BOS, *some(2), IMAGE, *some(7)],
        [BOS, IMAGE, IMAGE, *some(5)],
        [BOS, *some(9)],
        [BOS, IMAGE, *some(3), IMAGE, *some(7)],
    ]
    size = vision.image_size
    shapes = [[(size, size)], [(2 * size, size // 2), (size, 5 * size)], [], [(3 * size, 2 * size), (9, 11)]]
    images = [[Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in row] for row in shapes]
    processor = MllamaImageProcessorPil(
        size={"height": size, "width": size},
        max_image_tiles=vision.max_num_tiles,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
    )
    features = dict(processor(images, return_tensors="np"))
    tiles = features.pop("num_tiles")
    length = max(map(len, ids))
    sparse = [get_cross_attention_token_mask(row, IMAGE) for row in ids]
    dense = convert_sparse_cross_attention_mask_to_dense(sparse, tiles, vision.max_num_tiles, length)
    tokens, present = np.full((len(ids), length), PAD), np.zeros((len(ids), length), np.int64)
    for row, own in enumerate(ids):
        room = length - len(own)
        start = room if padding == "left" else 0
        tokens[row, start : start + len(own)] = own
        present[row, start : start + len(own)] = 1
        dense[row, len(own) :] = 0
        dense[row] = np.roll(dense[row], start, axis=0)
    return {**features, "input_ids": tokens, "attention_mask": present, "cross_attention_mask": dense}


@contextlib.contextmanager
def under(convention: Convention, model: MllamaForConditionalGeneration) -> Iterator[None]:
    """Make transformers 5 compute ``model`` by another convention, for a while.

    Without a cache: under what name a layer is given one differs between versions of transformers.
    """
    vision, layer = model.model.vision_model, modeling_mllama.MllamaCrossAttentionDecoderLayer
    taps, forward = vision.intermediate_layers_indices, layer.forward
    try:
        if convention != "transformers_5":
            vision.intermediate_layers_indices = [tap - 1 for tap in taps]
        if convention == "meta":
            layer.forward = _nothing_without_an_image
        yield
    finally:
        vision.intermediate_layers_indices = taps
        layer.forward = forward


def _nothing_without_an_image(  # the attention's output, like the MLP's, times whether the token sees an image
    self, hidden_states, cross_attention_states, cross_attention_mask, full_text_row_masked_out_mask, **others
):
    if any(others.get(name) is not None for name in ("cache", "past_key_values")):
        raise ValueError("the reference under another convention computes without a cache: pass use_cache=False")
    sees = full_text_row_masked_out_mask[:, 0]
    attended, _ = self.cross_attn(
        hidden_states=self.input_layernorm(hidden_states),
        attention_mask=cross_attention_mask,
        cross_attention_states=cross_attention_states,
    )
    hidden_states = hidden_states + self.cross_attn_attn_gate.tanh() * sees * attended
    mlp = self.mlp(self.post_attention_layernorm(hidden_states))
    return hidden_states + self.cross_attn_mlp_gate.tanh() * sees * mlp


@torch.no_grad()
def logits_of(model: MllamaForConditionalGeneration, batch: dict[str, np.ndarray]) -> np.ndarray:
    """float32 [batch, tokens, vocabulary], computed in one pass without a cache."""
    return model(**{name: torch.tensor(x) for name, x in batch.items()}, use_cache=False).logits.float().numpy()


def and_then(batch: dict[str, np.ndarray], tokens: np.ndarray) -> dict[str, np.ndarray]:
    """``batch``, of rows that end together, and then ``tokens`` [batch, new], which see what its last one sees."""
    added = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    if "cross_attention_mask" in batch:
        added["cross_attention_mask"] = np.repeat(batch["cross_attention_mask"][:, -1:], tokens.shape[1], axis=1)
    return batch | {name: np.concatenate([batch[name], more], axis=1) for name, more in added.items()}


def shortfall(model: MllamaForConditionalGeneration, batch: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """How far each of ``tokens`` [batch, new] is from the likeliest token there, over the largest logit, [batch, new].

    The logits are those of one pass over ``batch``, whose rows end together, and the tokens after it. All zeros are
    greedy tokens.
    """
    logits = logits_of(model, and_then(batch, tokens))
    given = logits[:, batch["input_ids"].shape[1] - 1 : -1]
    chosen = np.take_along_axis(given, tokens[:, :, None], axis=2)[:, :, 0]
    return (given.max(axis=2) - chosen) / np.abs(logits).max()


def published_weights(model: MllamaForConditionalGeneration) -> dict[str, np.ndarray]:
    """The weights by their published names, in float32."""
    renamed = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("model.language_model.", "language_model.model.").removeprefix("model.")
        name = name if name.startswith(("language_model.", "vision_model.", "multi_")) else f"language_model.{name}"
        renamed[name] = tensor.float().numpy()
    return renamed
