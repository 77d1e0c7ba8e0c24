"""The vision tower: tiles of pixels to features.

N images of T tiles each, P patches a tile, width D. An unused tile changes the features of the used
ones, so every image goes through with all its T tiles.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llava_cot_jax.model.attention import Mask
from llava_cot_jax.model.choices import Checkpointing
from llava_cot_jax.model.config import VisionConfig
from llava_cot_jax.model.layers import (
    Weights,
    attention,
    checkpointed,
    is_stacked,
    join_heads,
    layer_norm,
    linear,
    lookup,
    split_heads,
)
from llava_cot_jax.model.sharding import constrain

TOKEN_MULTIPLE = 8
"""The tower fills up a tile's tokens to a multiple of this; the fill takes part in attention."""

OUTER_NORM_EPS = 1e-5
"""Epsilon of the norms before and after the local blocks, which ``norm_eps`` does not set."""


def tiles_in_use(config: VisionConfig, aspect_ratio_ids: jax.Array) -> jax.Array:
    """Which tiles an image fills: bool [..., T] for ids [...]; none for id 0, which is no image."""
    counts = np.array([0, *(height * width for height, width in config.supported_aspect_ratios)])
    return jnp.arange(config.max_num_tiles) < jnp.asarray(counts)[aspect_ratio_ids][..., None]


def normalize(config: VisionConfig, tiles: jax.Array, aspect_ratio_ids: jax.Array) -> jax.Array:
    """uint8 tiles [..., T, C, size, size] of ids [...] as float32 pixel values; unused tiles are exactly 0."""
    mean, std = (jnp.asarray(s, jnp.float32)[:, None, None] for s in (config.image_mean, config.image_std))
    pixels = (tiles.astype(jnp.float32) * jnp.float32(1 / 255) - mean) / std
    return jnp.where(tiles_in_use(config, aspect_ratio_ids)[..., None, None, None], pixels, 0.0)


def encode(
    w: Weights,
    config: VisionConfig,
    pixel_values: jax.Array,
    aspect_ratio_ids: jax.Array,
    aspect_ratio_mask: jax.Array,
    *,
    taps: Sequence[int],
    checkpointing: Checkpointing,
) -> jax.Array:
    """Features of every token of every tile.

    Args:
        w: the parameters below ``vision_model``.
        config: the tower's configuration.
        pixel_values: [N, T, C, size, size], normalised float, or uint8 as the image processor cut them.
        aspect_ratio_ids: int [N], an index into ``supported_aspect_ratios`` + 1; 0 is no image.
        aspect_ratio_mask: 0 or 1 [N, T]: the tiles in use (the first always).
        taps: the local states that are features: i is the input of block i, and the number of
            blocks is the last one's output.
        checkpointing: what of a block is saved for the backward pass.

    Returns:
        [N, T, P + 1, D * (1 + taps)]: the last block's output, then the taps, feature by feature.
    """
    if pixel_values.dtype == jnp.uint8:
        pixel_values = normalize(config, pixel_values, aspect_ratio_ids)
    x = _embed(w, config, pixel_values, aspect_ratio_ids)  # [N, T, P + 1, D]
    n, tiles, tokens, width = x.shape
    fill = -tokens % TOKEN_MULTIPLE
    x = jnp.pad(x, ((0, 0), (0, 0), (0, fill), (0, 0)))

    # [N, T * (P + 1 + fill)]; hidden from one another, padding tokens are seen by the others.
    used = aspect_ratio_mask.astype(bool)[:, :, None] & (jnp.arange(tokens + fill) < tokens)
    padding = ~used.reshape(n, -1)
    mask = Mask(jnp.stack([jnp.ones_like(padding), ~padding], axis=-1), padding.astype(jnp.int32))

    def flat(x: jax.Array) -> jax.Array:
        return x.reshape(n, -1, width)

    def by_tile(x: jax.Array) -> jax.Array:
        return x.reshape(n, tiles, tokens + fill, -1)

    run = functools.partial(_blocks, config=config, mask=mask, checkpointing=checkpointing)
    x, tapped = run(w["transformer"]["layers"], flat(x), depth=config.num_hidden_layers, taps=taps)
    x = layer_norm(x, w["layernorm_post"], OUTER_NORM_EPS)
    x = by_tile(x) + _tile_embedding(w["post_tile_positional_embedding"], config, aspect_ratio_ids)
    if config.num_global_layers:
        blocks = w["global_transformer"]["layers"]
        x = by_tile(run(blocks, flat(x), depth=config.num_global_layers, taps=())[0])
    features = [x, *([by_tile(jnp.stack(tapped, axis=-1).reshape(n, -1, width * len(taps)))] if taps else [])]
    return jnp.concatenate(features, axis=-1)[:, :, :tokens]


def _embed(w: Weights, config: VisionConfig, pixel_values: jax.Array, aspect_ratio_ids: jax.Array) -> jax.Array:
    """Pixel values as tokens with their positions: [N, T, P + 1, D]."""
    n, tiles, channels, size, _ = pixel_values.shape
    side, patch = size // config.patch_size, config.patch_size
    kernel = w["patch_embedding"]["weight"]  # [D, C, patch, patch]
    patches = pixel_values.astype(kernel.dtype).reshape(n, tiles, channels, side, patch, side, patch)
    x = jnp.einsum("ntchiwj,dcij->nthwd", patches, kernel).reshape(n, tiles, side * side, -1)
    x = x + _tile_embedding(w["pre_tile_positional_embedding"], config, aspect_ratio_ids)

    start = jnp.broadcast_to(w["class_embedding"], (n, tiles, 1, x.shape[-1]))
    x = jnp.concatenate([start, x], axis=2)  # [N, T, P + 1, D]
    positions = w["gated_positional_embedding"]
    gate = jnp.tanh(positions["gate"])
    in_tile = lookup(aspect_ratio_ids, positions["tile_embedding"]).reshape(x.shape)
    x = x + (1 - gate) * positions["embedding"] + gate * in_tile
    return layer_norm(x, w["layernorm_pre"], OUTER_NORM_EPS)


def _tile_embedding(w: Weights, config: VisionConfig, aspect_ratio_ids: jax.Array) -> jax.Array:
    """What every token of a tile is told of the tile's place: [N, T, 1, D]."""
    embedding = lookup(aspect_ratio_ids, w["embedding"])
    return jnp.tanh(w["gate"]) * embedding.reshape(-1, config.max_num_tiles, 1, config.hidden_size)


def _blocks(
    blocks: Weights,
    x: jax.Array,
    *,
    config: VisionConfig,
    mask: Mask,
    depth: int,
    taps: Sequence[int],
    checkpointing: Checkpointing,
) -> tuple[jax.Array, list[jax.Array]]:
    """x [N, tokens, D] through all blocks, and the tapped states on the way, each like x."""
    block = checkpointed(functools.partial(_block, config=config, mask=mask), checkpointing)

    def run(x: jax.Array, start: int, stop: int) -> jax.Array:
        if is_stacked(blocks):
            part = jax.tree.map(lambda stack: stack[start:stop], blocks["0"])
            return jax.lax.scan(lambda x, w: (block(x, w), None), x, part)[0]
        for i in range(start, stop):
            x = block(x, blocks[str(i)])
        return x

    states, start = {}, 0
    for stop in sorted({*taps, depth}):  # one scan from tap to tap
        x = run(x, start, stop)
        states[stop], start = x, stop
    return x, [states[tap] for tap in taps]


def _block(x: jax.Array, w: Weights, *, config: VisionConfig, mask: Mask) -> jax.Array:
    """A transformer block; the global ones have a gate on each branch."""
    x = constrain(x, "batch", None, None)
    attended = _self_attention(layer_norm(x, w["input_layernorm"], config.norm_eps), w["self_attn"], config, mask)
    x = x + (jnp.tanh(w["gate_attn"]) * attended if "gate_attn" in w else attended)
    h = linear(layer_norm(x, w["post_attention_layernorm"], config.norm_eps), w["mlp"]["fc1"])
    h = constrain(h, "batch", None, "mlp")
    h = jax.nn.gelu(h.astype(jnp.float32), approximate=False).astype(x.dtype)
    h = linear(h, w["mlp"]["fc2"])
    return x + (jnp.tanh(w["gate_ffn"]) * h if "gate_ffn" in w else h)


def _self_attention(x: jax.Array, w: Weights, config: VisionConfig, mask: Mask) -> jax.Array:
    q, k, v = (
        constrain(split_heads(linear(x, w[name]), config.attention_heads), "batch", "heads", None, None)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    return linear(join_heads(attention(q, k, v, mask)), w["o_proj"])
