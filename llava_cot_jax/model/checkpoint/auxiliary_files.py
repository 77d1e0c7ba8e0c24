"""The files beside a model's weights: configuration, tokenizer, image settings and generation settings."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from llava_cot_jax.files import write_json
from llava_cot_jax.model.checkpoint.folder import AUXILIARY_PATTERNS
from llava_cot_jax.model.checkpoint.forms import ADAPTER_CONFIG
from llava_cot_jax.model.config import MllamaConfig, TextConfig, VisionConfig
from llava_cot_jax.paths import files_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def list_auxiliary_files(folder: Path) -> list[Path]:
    """Return the files of a checkpoint that a copy of it needs besides its weights, their indexes and config.json."""
    kept = {name for name in files_in(folder) if name not in ("config.json", ADAPTER_CONFIG)}
    kept -= {name for name in kept if name.endswith(".index.json")}
    return [folder / name for name in sorted(kept) if any(fnmatchcase(name, pattern) for pattern in AUXILIARY_PATTERNS)]


def write_auxiliary_files(
    folder: Path,
    config: MllamaConfig,
    tokenizer: PreTrainedTokenizerFast,
    dtype: str,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write all files of a published checkpoint but its weights, config.json included.

    Args:
        folder: Folder that exists.
        config: Configuration of the model.
        tokenizer: Tokenizer of the model.
        dtype: Name of the weights' dtype, for config.json.
        generation: Settings for generation_config.json besides the token ids and LLaVA-CoT's sampling.
    """
    # The template goes into tokenizer_config.json, where published checkpoints have it.
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    write_json(folder / "config.json", config.to_dict(dtype))
    write_json(folder / "generation_config.json", _generation_settings(config.text) | dict(generation or {}))
    image_settings = {"image_processor_type": "MllamaImageProcessor", **expected_image_settings(config.vision)}
    write_json(folder / "preprocessor_config.json", image_settings)


def expected_image_settings(vision: VisionConfig) -> dict[str, Any]:
    """Return the image settings of preprocessor_config.json by which images become what a model expects."""
    return {
        "size": {"height": vision.image_size, "width": vision.image_size},
        "max_image_tiles": vision.max_num_tiles,
        "resample": int(Image.Resampling.BILINEAR),
        "rescale_factor": 1 / 255,
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
        **dict.fromkeys(("do_convert_rgb", "do_resize", "do_pad", "do_rescale", "do_normalize"), True),
    }


def _generation_settings(text: TextConfig) -> dict[str, Any]:
    return {
        "bos_token_id": text.bos_token_id,
        "eos_token_id": list(text.eos_token_ids),
        "pad_token_id": text.pad_token_id,
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
    }
