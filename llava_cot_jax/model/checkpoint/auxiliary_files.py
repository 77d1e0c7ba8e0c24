"""The files that lie beside a model's weights: configuration, tokenizer, image and generation settings."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import PreTrainedTokenizerFast

from llava_cot_jax.model.config import MllamaConfig, TextConfig, VisionConfig


def write_companions(
    folder: Path,
    config: MllamaConfig,
    tokenizer: PreTrainedTokenizerFast,
    dtype: str,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write what a published checkpoint has beside its weights, config.json included.

    Args:
        folder: there already.
        config: the model's.
        tokenizer: its own.
        dtype: of the weights, for config.json.
        generation: what generation_config.json says besides the token ids and LLaVA-CoT's sampling.
    """
    # The template goes into tokenizer_config.json, where published checkpoints have it.
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    write_json(folder / "config.json", config.to_dict(dtype))
    write_json(folder / "generation_config.json", _generation_settings(config.text) | dict(generation or {}))
    write_json(folder / "preprocessor_config.json", _image_settings(config.vision))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` for people to read too."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _generation_settings(text: TextConfig) -> dict[str, Any]:
    return {
        "bos_token_id": text.bos_token_id,
        "eos_token_id": list(text.eos_token_ids),
        "pad_token_id": text.pad_token_id,
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
    }


def _image_settings(vision: VisionConfig) -> dict[str, Any]:
    return {
        "image_processor_type": "MllamaImageProcessor",
        "size": {"height": vision.image_size, "width": vision.image_size},
        "max_image_tiles": vision.max_num_tiles,
        "resample": int(Image.Resampling.BILINEAR),
        "rescale_factor": 1 / 255,
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
        **dict.fromkeys(("do_convert_rgb", "do_resize", "do_pad", "do_rescale", "do_normalize"), True),
    }
