"""The language model: self-attention layers, and cross-attention layers that see the images."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from llava_cot_jax.model.attention import Mask
from llava_cot_jax.model.cache import Cache, KeyValue
from llava_cot_jax.model.config import MllamaConfig, TextConfig
from llava_cot_jax.model.layers import (
    Checkpointing,
    Weights,
    attention,
    checkpointed,
    is_stacked,
    join_heads,
    linear,
    rms_norm,
    rotate,
    rotation,
    split_heads,
)
from llava_cot_jax.model.sharding import constrain

IMAGE_TOKEN_MULTIPLE = 128
"""The image tokens of a row are filled up to a multiple of this: the TPU compiler copies an odd cache."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sight:
    """What the text sees of the images.

    Attributes:
        states: [batch, image_tokens, hidden], projected; None once their keys and values are cached.
        tokens: bool [batch, tokens, images * tiles + 1], the tiles that a cross layer's attention lets a
            text token see, and, last and never seen, what fills up the image tokens.
        any: bool [batch, tokens], whether a text token sees an image at all.
    """

    states: jax.Array | None
    tokens: jax.Array
    any: jax.Array


def see(config: MllamaConfig, cross_attention_mask: jax.Array, states: jax.Array | None) -> Sight:
    """What a cross attention mask of 0 and 1 [batch, tokens, images, tiles] makes visible of ``states``.

    A token without an image sees, under the conventions of transformers, every image token.
    """
    tiles = cross_attention_mask.astype(bool)
    visible = tiles.reshape(*tiles.shape[:2], -1)
    some = visible.any(axis=-1)
    if config.convention != "meta":
        visible = visible | ~some[..., None]
    return Sight(states, jnp.pad(visible, ((0, 0), (0, 0), (0, 1))), some)


def project(w: Weights, features: jax.Array) -> jax.Array:
    """Features [batch, images, tiles, tokens, size] as the image tokens of a row, [batch, image_tokens, hidden]."""
    states = linear(features, w)
    states = states.reshape(states.shape[0], -1, states.shape[-1])
    fill = -states.shape[1] % IMAGE_TOKEN_MULTIPLE
    return constrain(jnp.pad(states, ((0, 0), (0, fill), (0, 0))), "batch", None, None)


def decode(
    w: Weights,
    config: MllamaConfig,
    input_ids: jax.Array,
    positions: jax.Array,
    mask: jax.Array | Mask,
    sight: Sight | None,
    *,
    cache: Cache | None = None,
    capacity: int | None = None,
    checkpointing: Checkpointing = "none",
) -> tuple[jax.Array, Cache | None]:
    """Hidden states of the tokens, ready for lm_head.

    Args:
        w: the parameters below ``language_model.model``.
        config: the model's configuration.
        input_ids: int32 [batch, tokens].
        positions: int32 [batch, tokens]; with a cache, consecutive in a row: they are its slots.
        mask: as ``attention`` takes it; the keys are these tokens or, with a cache, its slots.
        sight: what the tokens see of the images; None skips the cross layers.
        cache: what came before; the tokens' own keys and values are written into it.
        capacity: without a cache, start one with room for so many tokens.
        checkpointing: what of a layer is saved for the backward pass.

    Returns:
        [batch, tokens, hidden] after the last norm, and the cache where there is one. Stacked
        parameters, which are for training, keep none.
    """
    x = w["embed_tokens"]["weight"][input_ids]
    layer = checkpointed(
        functools.partial(
            _layer,
            config=config,
            turn=rotation(positions, config.text),
            mask=mask,
            sight=sight,
            start=positions[:, 0],
            capacity=capacity,
        ),
        checkpointing,
    )
    layers = w["layers"]
    entries: list[KeyValue | None] = []
    if is_stacked(layers):
        if cache is not None or capacity is not None:
            raise ValueError("stacked parameters keep no cache: use the unrolled layout for decoding")

        def block(x: jax.Array, slots: Weights) -> tuple[jax.Array, None]:
            for slot in range(config.text.period):
                x, _ = layer(x, slots[str(slot)], None)
            return x, None

        x, _ = jax.lax.scan(block, x, layers)
    else:
        for i in range(config.text.num_hidden_layers):
            x, entry = layer(x, layers[str(i)], cache[i] if cache is not None else None)
            entries.append(entry)
    keeps = cache is not None or capacity is not None
    return rms_norm(x, w["norm"], config.text.rms_norm_eps), tuple(entries) if keeps else None


def _layer(
    x: jax.Array,
    w: Weights,
    entry: KeyValue | None,
    *,
    config: MllamaConfig,
    turn: tuple[jax.Array, jax.Array],
    mask: jax.Array | Mask,
    sight: Sight | None,
    start: jax.Array,
    capacity: int | None,
) -> tuple[jax.Array, KeyValue | None]:
    """One layer of either kind, told apart by the weights it has."""
    x = constrain(x, "batch", None, None)
    if "self_attn" in w:
        return _self_layer(x, w, entry, config.text, turn, mask, start, capacity)
    if sight is None:
        return x, None
    return _cross_layer(x, w, entry, config, sight)


def _self_layer(
    x: jax.Array,
    w: Weights,
    entry: KeyValue | None,
    config: TextConfig,
    turn: tuple[jax.Array, jax.Array],
    mask: jax.Array | Mask,
    start: jax.Array,
    capacity: int | None,
) -> tuple[jax.Array, KeyValue | None]:
    h = rms_norm(x, w["input_layernorm"], config.rms_norm_eps)
    q = rotate(_heads(h, w["self_attn"]["q_proj"], config.num_attention_heads, "heads"), *turn)
    k = rotate(_heads(h, w["self_attn"]["k_proj"], config.num_key_value_heads, "kv_heads"), *turn)
    v = _heads(h, w["self_attn"]["v_proj"], config.num_key_value_heads, "kv_heads")
    seen = new = KeyValue(k, v)
    if entry is not None:
        seen = entry = entry.write(new, start)
    elif capacity is not None:
        entry = new.padded(capacity)
    x = x + linear(join_heads(attention(q, seen.keys, seen.values, mask)), w["self_attn"]["o_proj"])
    return x + _mlp(rms_norm(x, w["post_attention_layernorm"], config.rms_norm_eps), w["mlp"]), entry


def _cross_layer(
    x: jax.Array, w: Weights, entry: KeyValue | None, config: MllamaConfig, sight: Sight
) -> tuple[jax.Array, KeyValue | None]:
    """Gated attention to the images; a token that sees none gets what ``config.convention`` says."""
    text, eps = config.text, config.text.rms_norm_eps
    if entry is None:
        assert sight.states is not None
        entry = _image_keys_values(sight.states, w["cross_attn"], text)
    sees = sight.any[..., None].astype(x.dtype)  # [batch, tokens, 1]
    q = _heads(rms_norm(x, w["input_layernorm"], eps), w["cross_attn"]["q_proj"], text.num_attention_heads, "heads")
    q = rms_norm(q, w["cross_attn"]["q_norm"], eps)
    tile = jnp.arange(entry.keys.shape[2]) // config.vision.tile_tokens
    mask = Mask(sight.tokens, jnp.minimum(tile, sight.tokens.shape[-1] - 1)[None])
    attended = attention(q, entry.keys, entry.values, mask)
    attended = linear(join_heads(attended), w["cross_attn"]["o_proj"])
    if config.convention == "meta":
        attended = attended * sees
    x = x + jnp.tanh(w["cross_attn_attn_gate"]) * attended
    h = _mlp(rms_norm(x, w["post_attention_layernorm"], eps), w["mlp"])
    return x + jnp.tanh(w["cross_attn_mlp_gate"]) * (h * sees), entry


def _image_keys_values(states: jax.Array, w: Weights, config: TextConfig) -> KeyValue:
    """Keys and values of image tokens [batch, image_tokens, hidden], which carry no rotation."""
    k = _heads(states, w["k_proj"], config.num_key_value_heads, "kv_heads")
    v = _heads(states, w["v_proj"], config.num_key_value_heads, "kv_heads")
    return KeyValue(rms_norm(k, w["k_norm"], config.rms_norm_eps), v)


def _heads(x: jax.Array, w: Weights, heads: int, axis: str) -> jax.Array:
    """x [batch, tokens, hidden] projected to [batch, heads, tokens, head_dim]."""
    return constrain(split_heads(linear(x, w), heads), "batch", axis, None, None)


def _mlp(x: jax.Array, w: Weights) -> jax.Array:
    """SwiGLU."""
    gate, up = (linear(x, w[name]).astype(jnp.float32) for name in ("gate_proj", "up_proj"))
    h = (jax.nn.silu(gate) * up).astype(x.dtype)
    return linear(constrain(h, "batch", None, "mlp"), w["down_proj"])
