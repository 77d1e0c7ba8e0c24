"""The models of the configurations, and their batches, without an array."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from llava_cot_jax.data.shapes_tokenizer import shapes_config
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.sharding import partition

MODELS = {
    "meta-llama/Llama-3.2-11B-Vision-Instruct": MllamaConfig.llama32_11b(),
    "meta-llama/Llama-3.2-90B-Vision-Instruct": MllamaConfig.llama32_90b(),
    "shapes": shapes_config(),
}
"""By what ``init_from`` says."""


def abstract_batch(config: MllamaConfig, rows: int, tokens: int, mesh: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch as ``Loader`` yields it."""
    tower = config.vision
    images = (rows, 1, tower.max_num_tiles)
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "input_ids": ((rows, tokens), jnp.int32),
        "attention_mask": ((rows, tokens), jnp.int32),
        "pixel_values": ((*images, tower.num_channels, tower.image_size, tower.image_size), jnp.uint8),
        "aspect_ratio_ids": (images[:2], jnp.int32),
        "aspect_ratio_mask": (images, jnp.int32),
        "cross_attention_mask": ((rows, tokens, *images[1:]), jnp.int32),
        "loss_mask": ((rows, tokens), jnp.bool_),
        "stage": ((rows, tokens), jnp.int8),
        "row": ((rows,), jnp.int32),
    }
    sharding = NamedSharding(mesh, partition(("batch",)))
    return {name: jax.ShapeDtypeStruct(shape, kind, sharding=sharding) for name, (shape, kind) in shapes.items()}
