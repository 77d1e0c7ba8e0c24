"""Compare the model at its published sizes with transformers, in float32 on a CPU.

    python tests/evidence/published_sizes.py | tee tests/evidence/published_sizes.txt

Weights are random, and there is one image of 2 x 2 tiles. The vision tower is whole (32 + 8 blocks, 560 pixels, 6432
tokens). The language model has five of the 11B's 40 layers, one of them a cross layer, and a vocabulary of 1024, which
is what 24 GB of memory hold. The script takes about ten minutes.
"""

import argparse
import datetime
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).parents[2]))

import jax.numpy as jnp
import numpy as np
import torch
from PIL import Image
from transformers import MllamaConfig as HFConfig
from transformers import MllamaForConditionalGeneration
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from llava_cot_jax.model.config import MllamaConfig, TextConfig
from llava_cot_jax.model.mllama import Mllama
from tests.parity.reference import published_weights

TOKENS = 24
IMAGES = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "transformers", "torch"))
    print(f"{datetime.date.today()}; {versions}; {platform.machine()}, {os.cpu_count()} cores, float32", flush=True)
    text = TextConfig(
        vocab_size=1024,
        num_hidden_layers=5,
        cross_attention_layers=(3,),
        bos_token_id=1000,
        eos_token_ids=(1001,),
        pad_token_id=1002,
    )
    config = MllamaConfig(text=text, image_token_index=1024, convention="transformers_5")
    reference = random_model(config)
    batch = one_question(config)
    images = {name: batch[name] for name in IMAGES}
    features, logits = by_transformers(reference, batch)
    arrays = {name: jnp.asarray(x) for name, x in published_weights(reference).items()}
    del reference
    model = Mllama.from_arrays(config, arrays, layout="unrolled")
    compare("vision features", timed("here: tower", lambda: np.asarray(model.vision_features(**images))), features)
    compare("logits", timed("here: whole", lambda: np.asarray(model(**batch))), logits)


@torch.no_grad()
def by_transformers(model: MllamaForConditionalGeneration, batch: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    """Return the vision features and logits of transformers."""
    there = {name: torch.tensor(x) for name, x in batch.items()}
    images, tower = {name: there[name] for name in IMAGES}, model.model.vision_model
    features = timed("transformers: tower", lambda: tower(**images).last_hidden_state.numpy())
    return features, timed("transformers: whole", lambda: model(**there).logits.numpy())


def random_model(config: MllamaConfig) -> MllamaForConditionalGeneration:
    """Return a model of random weights that keep the scale of activations, with every gate half open."""
    torch.manual_seed(0)
    hf_config = HFConfig.from_dict(config.to_dict("float32"))
    model = MllamaForConditionalGeneration._from_config(hf_config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name.rsplit(".", 1)[-1]:
                parameter.fill_(0.5)
            elif parameter.ndim > 1:
                table = "embedding" in name or "embed_tokens" in name
                parameter.normal_(0, 0.5 if table else parameter[0].numel() ** -0.5)
    return model


def one_question(config: MllamaConfig) -> dict[str, np.ndarray]:
    """Return the inputs of an image of random blocks, and of a prompt whose second token is the image."""
    rng, vision = np.random.default_rng(0), config.vision
    coarse = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8).repeat(25, axis=0).repeat(25, axis=1)
    processor = MllamaImageProcessorPil(
        size={"height": vision.image_size, "width": vision.image_size},
        max_image_tiles=vision.max_num_tiles,
        image_mean=vision.image_mean,
        image_std=vision.image_std,
    )
    batch = dict(processor([[Image.fromarray(coarse)]], return_tensors="np"))
    tiles = batch.pop("num_tiles")[0][0]
    ids = rng.integers(0, 1000, (1, TOKENS))
    ids[0, :2] = config.text.bos_token_id, config.image_token_index
    seen = np.zeros((1, TOKENS, 1, vision.max_num_tiles), np.int64)
    seen[:, 1:, :, :tiles] = 1
    return {**batch, "input_ids": ids, "attention_mask": np.ones_like(ids), "cross_attention_mask": seen}


def timed(what: str, run: Callable[[], np.ndarray]) -> np.ndarray:
    began = time.perf_counter()
    result = run()
    print(f"{what}: {time.perf_counter() - began:.0f} s, with compilation", flush=True)
    return result


def compare(what: str, got: np.ndarray, want: np.ndarray) -> None:
    worst = np.abs(got - want).max() / np.abs(want).max()
    print(f"{what} {list(want.shape)}: largest difference {worst:.1e} of the largest magnitude", flush=True)


if __name__ == "__main__":
    main()
