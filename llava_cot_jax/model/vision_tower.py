"""The vision tower, which turns tiles of pixels into features.

An unused tile changes the features of the used ones, so every image goes through with all its tiles. ``tile_tokens``
are the patches of a tile and its class token.

Where the weights are float16, activations are float32: those of the published tower exceed 65504, the largest number
of float16.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer, Shaped, UInt8

from llava_cot_jax.model.attention import AttentionMask
from llava_cot_jax.model.choices import RematPolicy
from llava_cot_jax.model.config import VisionConfig
from llava_cot_jax.model.layers import (
    apply_remat,
    attention,
    embed,
    is_stacked,
    layer_norm,
    linear,
    merge_heads,
    recomputed,
    split_heads,
)
from llava_cot_jax.model.parameters import Params
from llava_cot_jax.model.sharding import constrain

TOKEN_MULTIPLE = 8
"""The tokens of a tile are padded to a multiple of this; the padding takes part in attention."""

OUTER_NORM_EPS = 1e-5
"""Epsilon of the norms before and after the local layers, which ``norm_eps`` does not set."""


def tiles_in_use(config: VisionConfig, aspect_ratio_ids: Integer[Array, "*batch"]) -> Bool[Array, "*batch tiles"]:
    """Whether an image of the given aspect ratio fills each tile. With id 0, which is no image, it fills none."""
    counts = np.array([0, *(height * width for height, width in config.supported_aspect_ratios)])
    return jnp.arange(config.max_num_tiles) < jnp.asarray(counts)[aspect_ratio_ids][..., None]


def normalize(
    config: VisionConfig,
    tiles: UInt8[Array, "*batch tiles channels size size"],
    aspect_ratio_ids: Integer[Array, "*batch"],
) -> Float[Array, "*batch tiles channels size size"]:
    """Convert uint8 tiles to normalised float32 pixel values; unused tiles are exactly 0."""
    mean, std = (jnp.asarray(s, jnp.float32)[:, None, None] for s in (config.image_mean, config.image_std))
    pixels = (tiles.astype(jnp.float32) * jnp.float32(1 / 255) - mean) / std
    return jnp.where(tiles_in_use(config, aspect_ratio_ids)[..., None, None, None], pixels, 0.0)


@jax.named_scope("vision_tower")
def encode(
    w: Params,
    config: VisionConfig,
    pixel_values: Shaped[Array, "images tiles channels size size"],
    aspect_ratio_ids: Integer[Array, " images"],
    aspect_ratio_mask: Shaped[Array, "images tiles"],
    *,
    taps: Sequence[int],
    remat: RematPolicy,
) -> Float[Array, "images tiles tile_tokens features"]:
    """Return the features of every token of every tile.

    Args:
        w: Parameters below ``vision_model``.
        config: Configuration of the tower.
        pixel_values: Tiles, normalised float, or uint8 as the image processor cuts them.
        aspect_ratio_ids: Index into ``supported_aspect_ratios`` + 1; 0 is no image.
        aspect_ratio_mask: 0 or 1, whether a tile is in use; the first always is.
        taps: Indices of the states between the local layers that become features: i is the input of layer i, and the
            number of layers is the output of the last one.
        remat: What the forward pass of a layer saves for the backward pass.

    Returns:
        Output of the last layer, hidden_size features, then those of the taps, interleaved: (1 + taps) * hidden_size.
    """
    if pixel_values.dtype == jnp.uint8:
        pixel_values = normalize(config, pixel_values, aspect_ratio_ids)
    x = _embed_patches(w, config, pixel_values, aspect_ratio_ids)
    images, tiles, tokens, width = x.shape
    padding = -tokens % TOKEN_MULTIPLE
    x = jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0)))

    # [images, tiles * (tile_tokens + padding)]. Padding tokens do not see one another, but the others see them.
    used = aspect_ratio_mask.astype(bool)[:, :, None] & (jnp.arange(tokens + padding) < tokens)
    is_padding = ~used.reshape(images, -1)
    mask = AttentionMask(jnp.stack([jnp.ones_like(is_padding), ~is_padding], axis=-1), is_padding.astype(jnp.int32))

    def flatten_tiles(x: jax.Array) -> jax.Array:
        return x.reshape(images, -1, width)

    def split_tiles(x: jax.Array) -> jax.Array:
        return x.reshape(images, tiles, tokens + padding, -1)

    run = functools.partial(_run_layers, config=config, mask=mask, remat=remat)
    with jax.named_scope("local_layers"):
        layers = w["transformer"]["layers"]
        x, tapped = run(layers, flatten_tiles(x), depth=config.num_hidden_layers, taps=taps)
    x = layer_norm(x, w["layernorm_post"], OUTER_NORM_EPS)
    x = split_tiles(x) + _tile_embedding(w["post_tile_positional_embedding"], config, aspect_ratio_ids)
    if config.num_global_layers:
        with jax.named_scope("global_layers"):
            layers = w["global_transformer"]["layers"]
            x = split_tiles(run(layers, flatten_tiles(x), depth=config.num_global_layers, taps=())[0])
    features = [x, *([split_tiles(jnp.stack(tapped, axis=-1).reshape(images, -1, width * len(taps)))] if taps else [])]
    return jnp.concatenate(features, axis=-1)[:, :, :tokens]


@jax.named_scope("patch_embedding")
def _embed_patches(
    w: Params,
    config: VisionConfig,
    pixel_values: Float[Array, "images tiles channels size size"],
    aspect_ratio_ids: Integer[Array, " images"],
) -> Float[Array, "images tiles tile_tokens width"]:
    """Turn pixel values into tokens, with a class token for each tile, and add the position embeddings."""
    images, tiles, channels, size, _ = pixel_values.shape
    side, patch = size // config.patch_size, config.patch_size
    kernel = w["patch_embedding"]["weight"]  # [width, channels, patch, patch]
    dtype = jnp.float32 if kernel.dtype == jnp.float16 else kernel.dtype
    patches = pixel_values.astype(dtype).reshape(images, tiles, channels, side, patch, side, patch)
    x = jnp.einsum("ntchiwj,dcij->nthwd", patches, kernel).reshape(images, tiles, side * side, -1)
    x = x + _tile_embedding(w["pre_tile_positional_embedding"], config, aspect_ratio_ids)

    class_tokens = jnp.broadcast_to(w["class_embedding"], (images, tiles, 1, x.shape[-1]))
    x = jnp.concatenate([class_tokens, x], axis=2)
    positions = w["gated_positional_embedding"]
    gate = jnp.tanh(positions["gate"])
    by_tile = embed(aspect_ratio_ids, positions["tile_embedding"]).reshape(x.shape)
    x = x + (1 - gate) * positions["embedding"] + gate * by_tile
    return layer_norm(x, w["layernorm_pre"], OUTER_NORM_EPS)


def _tile_embedding(
    w: Params, config: VisionConfig, aspect_ratio_ids: Integer[Array, " images"]
) -> Float[Array, "images tiles 1 width"]:
    """Return the embedding of each tile's position, which is added to all its tokens."""
    embedding = embed(aspect_ratio_ids, w["embedding"])
    return jnp.tanh(w["gate"]) * embedding.reshape(-1, config.max_num_tiles, 1, config.hidden_size)


def _run_layers(
    layers: Params,
    x: Float[Array, "images tokens width"],
    *,
    config: VisionConfig,
    mask: AttentionMask,
    depth: int,
    taps: Sequence[int],
    remat: RematPolicy,
) -> tuple[Float[Array, "images tokens width"], list[Float[Array, "images tokens width"]]]:
    """Apply ``depth`` layers. Return the output, and the states at ``taps``."""
    layer = functools.partial(_layer, mask=mask, config=config, remat=remat)
    traced_once = functools.partial(_layer_traced_once, mask=mask, config=config, remat=remat)

    def run(x: jax.Array, start: int, stop: int) -> jax.Array:
        if is_stacked(layers):
            some = jax.tree.map(lambda stack: stack[start:stop], layers["0"])
            return jax.lax.scan(lambda x, w: (layer(x, w), None), x, some)[0]
        for i in range(start, stop):
            x = traced_once(x, layers[str(i)])
        return x

    states, start = {}, 0
    for stop in sorted({*taps, depth}):  # one scan from tap to tap
        x = run(x, start, stop)
        states[stop], start = x, stop
    return x, [states[tap] for tap in taps]


def _layer(
    x: Float[Array, "images tokens width"],
    w: Params,
    *,
    mask: AttentionMask,
    config: VisionConfig,
    remat: RematPolicy,
) -> Float[Array, "images tokens width"]:
    """Apply a transformer layer, with what ``remat`` says of its backward pass."""
    return apply_remat(functools.partial(_attention_and_mlp, mask=mask, config=config), remat)(x, w)


_layer_traced_once = jax.jit(_layer, static_argnames=("config", "remat"))
"""``_layer``, which a program traces and lowers once for all layers whose parameters have the same shapes."""


def _attention_and_mlp(
    x: Float[Array, "images tokens width"], w: Params, *, mask: AttentionMask, config: VisionConfig
) -> Float[Array, "images tokens width"]:
    """Apply the two branches of a layer. A global layer has a gate on each."""
    x = constrain(x, "batch", None, None)
    with jax.named_scope("self_attention"):
        h = layer_norm(x, w["input_layernorm"], config.norm_eps)
        attended = _self_attention(h, w["self_attn"], config, mask)
        x = x + (jnp.tanh(w["gate_attn"]) * attended if "gate_attn" in w else attended)
    with jax.named_scope("mlp"):
        h = linear(layer_norm(x, w["post_attention_layernorm"], config.norm_eps), w["mlp"]["fc1"])
        h = constrain(h, "batch", None, "mlp")
        h = recomputed(functools.partial(_gelu_linear, w=w["mlp"]["fc2"]))(h)
        return x + (jnp.tanh(w["gate_ffn"]) * h if "gate_ffn" in w else h)


def _gelu_linear(h: Float[Array, "images tokens inner"], w: Params) -> Float[Array, "images tokens width"]:
    return linear(jax.nn.gelu(h.astype(jnp.float32), approximate=False).astype(h.dtype), w)


def _self_attention(
    x: Float[Array, "images tokens width"], w: Params, config: VisionConfig, mask: AttentionMask
) -> Float[Array, "images tokens width"]:
    q, k, v = (
        constrain(split_heads(linear(x, w[name]), config.attention_heads), "batch", "heads", None, None)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    return linear(merge_heads(attention(q, k, v, mask)), w["o_proj"])
