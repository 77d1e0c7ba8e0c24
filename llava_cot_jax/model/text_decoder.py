"""The language model: self-attention layers, and cross-attention layers that see the images."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from llava_cot_jax.model.attention import Mask
from llava_cot_jax.model.choices import Checkpointing
from llava_cot_jax.model.config import MllamaConfig, TextConfig
from llava_cot_jax.model.kv_cache import KeyValue, Layers, Memory
from llava_cot_jax.model.layers import (
    Weights,
    attention,
    attention_in_parts,
    checkpointed,
    is_stacked,
    join_heads,
    linear,
    lookup,
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
        tokens: bool [batch, tokens, images * tiles + 1], the tiles that a cross layer's attention lets a
            text token see, and, last and never seen, what fills up the image tokens.
        attends: bool [batch, tokens], whether a cross layer's attention adds anything to a text token.
        feeds: bool [batch, tokens], whether its MLP does.
        states: [batch, image_tokens, hidden], projected; None once their keys and values are cached.
    """

    tokens: jax.Array
    attends: jax.Array
    feeds: jax.Array
    states: jax.Array | None = None

    def at(self, index: jax.Array) -> "Sight":
        """What the tokens at ``index`` int32 [batch, n] see."""
        tokens = jnp.take_along_axis(self.tokens, index[..., None], axis=1)
        attends, feeds = (jnp.take_along_axis(x, index, axis=1) for x in (self.attends, self.feeds))
        return Sight(tokens, attends, feeds)


def see(config: MllamaConfig, cross_attention_mask: jax.Array, states: jax.Array | None = None) -> Sight:
    """What a cross attention mask of 0 and 1 [batch, tokens, images, tiles] makes visible of ``states``.

    A token without an image gets nothing from a cross layer under ``meta``. Under the conventions of
    transformers it attends to every image token, and the MLP alone adds nothing.
    """
    tiles = cross_attention_mask.astype(bool)
    visible = tiles.reshape(*tiles.shape[:2], -1)
    some = attends = visible.any(axis=-1)
    if config.convention != "meta":
        visible = visible | ~some[..., None]
        attends = jnp.ones_like(some)
    return Sight(jnp.pad(visible, ((0, 0), (0, 0), (0, 1))), attends, some, states)


def project(w: Weights, features: jax.Array) -> jax.Array:
    """Features [batch, images, tiles, tokens, size] as the image tokens of a row, [batch, image_tokens, hidden]."""
    states = linear(features, w)
    states = states.reshape(states.shape[0], -1, states.shape[-1])
    fill = -states.shape[1] % IMAGE_TOKEN_MULTIPLE
    return constrain(jnp.pad(states, ((0, 0), (0, fill), (0, 0))), "batch", None, None)


def image_keys_values(w: Weights, config: TextConfig, states: jax.Array) -> Layers:
    """What each cross layer keeps of image tokens [batch, image_tokens, hidden].

    Args:
        w: the parameters below ``language_model.model``, unrolled.
        config: the text model's.
        states: the projected image tokens.
    """
    return tuple(
        _image_keys_values(states, w["layers"][str(i)]["cross_attn"], config) if cross else None
        for i, cross in enumerate(config.is_cross)
    )


def decode(
    w: Weights,
    config: MllamaConfig,
    input_ids: jax.Array,
    positions: jax.Array,
    mask: Mask,
    sight: Sight | None,
    checkpointing: Checkpointing = "none",
) -> jax.Array:
    """Hidden states of the tokens, ready for lm_head: [batch, tokens, hidden] after the last norm.

    Args:
        w: the parameters below ``language_model.model``, in either layout.
        config: the model's configuration.
        input_ids: int32 [batch, tokens].
        positions: int32 [batch, tokens].
        mask: what of each other the tokens see.
        sight: what they see of the images, whose states it holds; None skips the cross layers.
        checkpointing: what of a layer is saved for the backward pass.
    """
    turn = rotation(positions, config.text)

    def run(x: jax.Array, w: Weights) -> jax.Array:
        x = constrain(x, "batch", None, None)
        if "self_attn" in w:
            q, k, v = _queries_keys_values(x, w, config.text, turn)
            return _after_self_attention(x, attention(q, k, v, mask), w, config.text)
        if sight is None:
            return x
        assert sight.states is not None
        return _cross_layer(x, w, _image_keys_values(sight.states, w["cross_attn"], config.text), config, sight)

    layer = checkpointed(run, checkpointing)
    x = lookup(input_ids, w["embed_tokens"])
    layers = w["layers"]
    if is_stacked(layers):

        def block(x: jax.Array, slots: Weights) -> tuple[jax.Array, None]:
            for slot in range(config.text.period):
                x = layer(x, slots[str(slot)])
            return x, None

        x, _ = jax.lax.scan(block, x, layers)
    else:
        for i in range(config.text.num_hidden_layers):
            x = layer(x, layers[str(i)])
    return rms_norm(x, w["norm"], config.text.rms_norm_eps)


def append(
    w: Weights, config: MllamaConfig, input_ids: jax.Array, memory: Memory, sight: Sight | None
) -> tuple[jax.Array, Layers]:
    """Append tokens to sequences whose keys and values are in ``memory``: the one primitive of decoding.

    Args:
        w: the parameters below ``language_model.model``, unrolled.
        config: the model's configuration.
        input_ids: int32 [rows, tokens].
        memory: what came before.
        sight: what the tokens see of the images; None skips the cross layers.

    Returns:
        Hidden states as from ``decode``, and the rows' own keys and values with the tokens' among them.
    """
    tokens = input_ids.shape[1]
    turn = rotation(memory.positions(tokens), config.text)
    own: list[KeyValue | None] = []
    x = lookup(input_ids, w["embed_tokens"])
    for i, cross in enumerate(config.text.is_cross):
        x = constrain(x, "batch", None, None)
        layer, images, entry = w["layers"][str(i)], memory.images[i], memory.own[i]
        if cross:
            if sight is not None and images is not None:
                x = _cross_layer(x, layer, images, config, sight)
            own.append(None)
            continue
        assert entry is not None
        q, k, v = _queries_keys_values(x, layer, config.text, turn)
        entry = entry.write(KeyValue(k, v), memory.start)
        own.append(entry)
        x = _after_self_attention(x, _attend(q, entry, memory, i), layer, config.text)
    return rms_norm(x, w["norm"], config.text.rms_norm_eps), tuple(own)


def _attend(q: jax.Array, own: KeyValue, memory: Memory, index: int) -> jax.Array:
    """Queries [rows, heads, tokens, head_dim] of layer ``index`` to a row's own tokens and to its prefix."""
    slots = jnp.arange(own.keys.shape[2])
    mine = slots <= (memory.start[:, None] + jnp.arange(q.shape[2]))[..., None]  # [rows, tokens, slots]
    parts = [(own.keys, own.values, mine)]
    if memory.prefix is not None:
        shared = memory.prefix.layers[index]
        assert shared is not None
        before = jnp.arange(shared.keys.shape[2]) < memory.prefix.length[:, None, None]  # [questions, 1, slots]
        parts.append((shared.keys, shared.values, before))
    return attention_in_parts(q, parts)


def _queries_keys_values(
    x: jax.Array, w: Weights, config: TextConfig, turn: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of a self-attention layer, [batch, heads or kv_heads, tokens, head_dim], rotated to their positions."""
    h = rms_norm(x, w["input_layernorm"], config.rms_norm_eps)
    q = rotate(_heads(h, w["self_attn"]["q_proj"], config.num_attention_heads, "heads"), *turn)
    k = rotate(_heads(h, w["self_attn"]["k_proj"], config.num_key_value_heads, "kv_heads"), *turn)
    return q, k, _heads(h, w["self_attn"]["v_proj"], config.num_key_value_heads, "kv_heads")


def _after_self_attention(x: jax.Array, attended: jax.Array, w: Weights, config: TextConfig) -> jax.Array:
    """The rest of a self-attention layer."""
    x = x + linear(join_heads(attended), w["self_attn"]["o_proj"])
    return x + _mlp(rms_norm(x, w["post_attention_layernorm"], config.rms_norm_eps), w["mlp"])


def _cross_layer(x: jax.Array, w: Weights, images: KeyValue, config: MllamaConfig, sight: Sight) -> jax.Array:
    """Gated attention of x [rows, tokens, hidden] to the images of their questions.

    The rows of a question attend as one row of as many queries; a step of decoding has few, whose scores
    are small, and needs no kernel.
    """
    text, eps = config.text, config.text.rms_norm_eps
    rows, questions = x.shape[0], images.keys.shape[0]
    q = _heads(rms_norm(x, w["input_layernorm"], eps), w["cross_attn"]["q_proj"], text.num_attention_heads, "heads")
    q = rms_norm(q, w["cross_attn"]["q_norm"], eps)
    tile = jnp.arange(images.keys.shape[2]) // config.vision.tile_tokens
    group = jnp.minimum(tile, sight.tokens.shape[-1] - 1)[None]
    mask = Mask(sight.tokens.reshape(questions, -1, sight.tokens.shape[-1]), group)
    queries = _together(q, questions)
    attended = attention(queries, images.keys, images.values, mask if x.shape[1] > 1 else mask.dense())
    attended = _apart(attended, rows)
    attended = linear(join_heads(attended), w["cross_attn"]["o_proj"])
    attends, feeds = (seen[..., None].astype(x.dtype) for seen in (sight.attends, sight.feeds))
    x = x + jnp.tanh(w["cross_attn_attn_gate"]) * (attended * attends)
    h = _mlp(rms_norm(x, w["post_attention_layernorm"], eps), w["mlp"])
    return x + jnp.tanh(w["cross_attn_mlp_gate"]) * (h * feeds)


def _together(q: jax.Array, questions: int) -> jax.Array:
    """[rows, heads, tokens, head_dim] -> [questions, heads, rows / questions * tokens, head_dim]."""
    if q.shape[0] == questions:
        return q
    _, heads, _, head_dim = q.shape
    return jnp.swapaxes(q.reshape(questions, -1, *q.shape[1:]), 1, 2).reshape(questions, heads, -1, head_dim)


def _apart(x: jax.Array, rows: int) -> jax.Array:
    """The inverse of ``_together``."""
    questions, heads, _, head_dim = x.shape
    if rows == questions:
        return x
    x = x.reshape(questions, heads, rows // questions, -1, head_dim)
    return jnp.swapaxes(x, 1, 2).reshape(rows, heads, -1, head_dim)


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
