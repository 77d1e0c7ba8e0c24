"""The language model: self-attention layers, and cross-attention layers that attend to the images."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llava_cot_jax.model.attention import AttentionMask
from llava_cot_jax.model.choices import RematPolicy
from llava_cot_jax.model.config import MllamaConfig, TextConfig
from llava_cot_jax.model.image_context import ImageContext
from llava_cot_jax.model.kv_cache import CacheLayers, KVCache, LayerCache
from llava_cot_jax.model.layers import (
    KVSegment,
    apply_remat,
    apply_rope,
    attention,
    cascade_attention,
    embed,
    is_stacked,
    linear,
    merge_heads,
    recomputed,
    rms_norm,
    rope_cos_sin,
    split_heads,
)
from llava_cot_jax.model.parameters import Params
from llava_cot_jax.model.sharding import constrain

IMAGE_TOKEN_MULTIPLE = 128
"""The image tokens of a sequence are padded to a multiple of this, as the TPU compiler copies a cache of odd size."""

RopeTables = tuple[Float[Array, "batch tokens half_head_dim"], Float[Array, "batch tokens half_head_dim"]]
"""Cosines and sines of ``rope_cos_sin``."""

AdaptedTokens = Bool[Array, "batch tokens"] | Literal[True] | None
"""Tokens that adapters act on, where the weights have some: all (True), none (None), or those of a mask."""


@jax.named_scope("projector")
def project(
    w: Params, features: Float[Array, "batch images tiles tile_tokens features"]
) -> Float[Array, "batch image_tokens hidden"]:
    """Project vision features to image tokens of the text model's width, those of a sequence in one row, padded.

    The features may be wider than the weights, whose dtype the result has.
    """
    states = linear(features, w).astype(w["weight"].dtype)
    states = states.reshape(states.shape[0], -1, states.shape[-1])
    padding = -states.shape[1] % IMAGE_TOKEN_MULTIPLE
    return constrain(jnp.pad(states, ((0, 0), (0, padding), (0, 0))), "batch", None, None)


@jax.named_scope("image_keys_values")
def image_keys_values(
    w: Params, config: TextConfig, states: Float[Array, "questions image_tokens hidden"]
) -> CacheLayers:
    """Return the keys and values of image tokens in every cross-attention layer.

    Args:
        w: Parameters below ``language_model.model``, in the unrolled layout.
        config: Configuration of the text model.
        states: Projected image tokens.
    """
    return tuple(
        _image_keys_values_traced_once(states, w["layers"][str(i)]["cross_attn"], config) if cross else None
        for i, cross in enumerate(config.is_cross)
    )


def forward(
    w: Params,
    config: MllamaConfig,
    input_ids: Int[Array, "batch tokens"],
    positions: Int[Array, "batch tokens"],
    mask: AttentionMask,
    images: ImageContext | None,
    remat: RematPolicy = "none",
    *,
    output_hidden_states: bool = False,
    adapted: AdaptedTokens = True,
) -> tuple[Float[Array, "batch tokens hidden"], tuple[Float[Array, "batch tokens hidden"], ...]]:
    """Return hidden states of whole sequences after the final norm, ready for lm_head, and those before each layer.

    Args:
        w: Parameters below ``language_model.model``, in either layout.
        config: Configuration of the model.
        input_ids: int32, tokens.
        positions: int32, position of each token.
        mask: Which tokens each token attends to.
        images: Images with their ``states``; None skips the cross-attention layers.
        remat: What the forward pass of a layer saves for the backward pass.
        output_hidden_states: Whether the states before each layer are wanted; without it there are none.
        adapted: Tokens that adapters act on.
    """
    rope = rope_cos_sin(positions, config.text)

    def run_layer(x: jax.Array, w: Params) -> jax.Array:
        x = constrain(x, "batch", None, None)
        if "self_attn" in w:
            q, k, v = _queries_keys_values(x, w, config.text, rope, adapted)
            with jax.named_scope("self_attention"):
                attended = attention(q, k, v, mask)
            return _after_self_attention(x, attended, w, config.text, adapted)
        if images is None:
            return x
        assert images.states is not None
        with jax.named_scope("cross_attention"):
            entry = _image_keys_values(images.states, w["cross_attn"], config.text)
        return _cross_attention_layer(x, w, entry, config, images, adapted)

    layer = apply_remat(run_layer, remat)
    x = embed(input_ids, w["embed_tokens"])
    layers = w["layers"]
    if is_stacked(layers):

        def block(x: jax.Array, block_layers: Params) -> tuple[jax.Array, tuple[jax.Array, ...]]:
            return _run_layers(layer, x, block_layers, config.text.layers_per_block, output_hidden_states)

        x, by_index = jax.lax.scan(block, x, layers)  # each [blocks, batch, tokens, hidden]
        before = tuple(state for states in zip(*map(jnp.unstack, by_index), strict=True) for state in states)
    else:
        x, before = _run_layers(layer, x, layers, config.text.num_hidden_layers, output_hidden_states)
    with jax.named_scope("final_norm"):
        return rms_norm(x, w["norm"], config.text.rms_norm_eps), before


def _run_layers(
    layer: Callable[[jax.Array, Params], jax.Array],
    x: jax.Array,
    layers: Params,
    count: int,
    output_hidden_states: bool,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Apply ``count`` layers. Return their output, and the states before each, if they are wanted."""
    before = []
    for i in range(count):
        before.append(x)
        x = layer(x, layers[str(i)])
    return x, tuple(before) if output_hidden_states else ()


def forward_with_cache(
    w: Params,
    config: MllamaConfig,
    input_ids: Int[Array, "batch tokens"],
    cache: KVCache,
    images: ImageContext | None,
    adapted: Bool[Array, "batch tokens"] | None = None,
) -> tuple[Float[Array, "batch tokens hidden"], CacheLayers]:
    """Return hidden states of tokens after those in a KV cache. Prefill and sampling are made of this.

    A program traces and lowers a layer of each kind once, however many there are.

    Args:
        w: Parameters below ``language_model.model``, in the unrolled layout.
        config: Configuration of the model.
        input_ids: int32, tokens.
        cache: Keys and values of the tokens before them.
        images: Images with their ``layers``, and the masks of these tokens; None skips the cross-attention layers.
        adapted: Tokens that the verifier's adapter acts on; None for no token. Other adapters are merged into the
            weights for decoding.

    Returns:
        Hidden states as from ``forward``, and the cache's suffix with the keys and values of the tokens.
    """
    rope = rope_cos_sin(cache.positions(input_ids.shape[1]), config.text)
    suffix: list[LayerCache | None] = []
    x = embed(input_ids, w["embed_tokens"])
    for i, cross in enumerate(config.text.is_cross):
        x = constrain(x, "batch", None, None)
        layer = w["layers"][str(i)]
        if cross:
            if images is not None:
                assert images.layers is not None
                entry, masks = images.layers[i], replace(images, layers=None)
                assert entry is not None
                x = _cross_attention_layer_traced_once(x, layer, entry, config, masks, adapted)
            suffix.append(None)
            continue
        x, entry = _cached_self_attention_layer(x, layer, config.text, cache.layer(i), rope, adapted)
        suffix.append(entry)
    with jax.named_scope("final_norm"):
        return rms_norm(x, w["norm"], config.text.rms_norm_eps), tuple(suffix)


@functools.partial(jax.jit, static_argnames="config")
def _cached_self_attention_layer(
    x: Float[Array, "batch tokens hidden"],
    w: Params,
    config: TextConfig,
    cache: KVCache,
    rope: RopeTables,
    adapted: Bool[Array, "batch tokens"] | None,
) -> tuple[Float[Array, "batch tokens hidden"], LayerCache]:
    """Apply a self-attention layer, whose own ``cache`` that is. Return its output, and the suffix with the tokens."""
    q, k, v = _queries_keys_values(x, w, config, rope, adapted)
    (suffix,) = cache.suffix
    assert suffix is not None
    suffix = suffix.update(LayerCache(k, v), cache.lengths)
    return _after_self_attention(x, _attend_to_cache(q, suffix, cache), w, config, adapted), suffix


@jax.named_scope("self_attention")
def _attend_to_cache(
    q: Float[Array, "batch heads tokens head_dim"], suffix: LayerCache, cache: KVCache
) -> Float[Array, "batch heads tokens head_dim"]:
    """Attend to a layer's suffix, which has the keys and values of the queries' tokens already, and to the prefix."""
    index = jnp.arange(suffix.keys.shape[2])
    visible = index <= (cache.lengths[:, None] + jnp.arange(q.shape[2]))[..., None]  # [batch, tokens, capacity]
    segments = [KVSegment(suffix.keys, suffix.values, visible)]
    for segment in cache.prefix:
        (shared,) = segment.layers
        assert shared is not None
        visible = jnp.arange(shared.keys.shape[2]) < segment.lengths[:, None, None]  # [groups, 1, capacity]
        segments.append(KVSegment(shared.keys, shared.values, visible))
    return cascade_attention(q, segments)


@jax.named_scope("self_attention")
def _queries_keys_values(
    x: Float[Array, "batch tokens hidden"], w: Params, config: TextConfig, rope: RopeTables, adapted: AdaptedTokens
) -> tuple[
    Float[Array, "batch heads tokens head_dim"],
    Float[Array, "batch kv_heads tokens head_dim"],
    Float[Array, "batch kv_heads tokens head_dim"],
]:
    """Return the queries, keys and values of a self-attention layer, with RoPE applied."""
    h = rms_norm(x, w["input_layernorm"], config.rms_norm_eps)
    q = apply_rope(_project_heads(h, w["self_attn"]["q_proj"], config.num_attention_heads, "heads", adapted), *rope)
    k = apply_rope(_project_heads(h, w["self_attn"]["k_proj"], config.num_key_value_heads, "kv_heads", adapted), *rope)
    return q, k, _project_heads(h, w["self_attn"]["v_proj"], config.num_key_value_heads, "kv_heads", adapted)


def _after_self_attention(
    x: Float[Array, "batch tokens hidden"],
    attended: Float[Array, "batch heads tokens head_dim"],
    w: Params,
    config: TextConfig,
    adapted: AdaptedTokens,
) -> Float[Array, "batch tokens hidden"]:
    """Apply the rest of a self-attention layer: the output projection and the MLP."""
    with jax.named_scope("self_attention"):
        x = x + linear(merge_heads(attended), w["self_attn"]["o_proj"], adapted)
    with jax.named_scope("mlp"):
        return x + _mlp(rms_norm(x, w["post_attention_layernorm"], config.rms_norm_eps), w["mlp"], adapted)


def _cross_attention_layer(
    x: Float[Array, "batch tokens hidden"],
    w: Params,
    entry: LayerCache,
    config: MllamaConfig,
    images: ImageContext,
    adapted: AdaptedTokens,
) -> Float[Array, "batch tokens hidden"]:
    """Apply a gated cross-attention layer, whose keys and values ``entry`` are those of the questions' images.

    The sequences of a question attend as one sequence of as many queries. A decoding step has few queries, whose
    scores are small and need no kernel.
    """
    text, eps = config.text, config.text.rms_norm_eps
    batch, questions = x.shape[0], entry.keys.shape[0]
    with jax.named_scope("cross_attention"):
        h = rms_norm(x, w["input_layernorm"], eps)
        q = _project_heads(h, w["cross_attn"]["q_proj"], text.num_attention_heads, "heads", adapted)
        q = rms_norm(q, w["cross_attn"]["q_norm"], eps)
        tile = jnp.arange(entry.keys.shape[2]) // config.vision.tile_tokens
        group = jnp.minimum(tile, images.tile_mask.shape[-1] - 1)[None]
        mask = AttentionMask(images.tile_mask.reshape(questions, -1, images.tile_mask.shape[-1]), group)
        q = _group_by_question(q, questions)
        attended = attention(q, entry.keys, entry.values, mask if x.shape[1] > 1 else mask.dense())
        attended = _ungroup(attended, batch)
        attended = linear(merge_heads(attended), w["cross_attn"]["o_proj"], adapted)
        attention_gate, mlp_gate = (
            gate[..., None].astype(x.dtype) for gate in (images.attention_gate, images.mlp_gate)
        )
        x = x + jnp.tanh(w["cross_attn_attn_gate"]) * (attended * attention_gate)
    with jax.named_scope("mlp"):
        h = _mlp(rms_norm(x, w["post_attention_layernorm"], eps), w["mlp"], adapted)
        return x + jnp.tanh(w["cross_attn_mlp_gate"]) * (h * mlp_gate)


_cross_attention_layer_traced_once = jax.jit(_cross_attention_layer, static_argnames="config")


def _group_by_question(
    q: Float[Array, "batch heads tokens head_dim"], questions: int
) -> Float[Array, "questions heads n head_dim"]:
    """Put the queries of all sequences of a question into one sequence."""
    if q.shape[0] == questions:
        return q
    _, heads, _, head_dim = q.shape
    return jnp.swapaxes(q.reshape(questions, -1, *q.shape[1:]), 1, 2).reshape(questions, heads, -1, head_dim)


def _ungroup(x: Float[Array, "questions heads n head_dim"], batch: int) -> Float[Array, "batch heads tokens head_dim"]:
    """Undo ``_group_by_question``."""
    questions, heads, _, head_dim = x.shape
    if batch == questions:
        return x
    x = x.reshape(questions, heads, batch // questions, -1, head_dim)
    return jnp.swapaxes(x, 1, 2).reshape(batch, heads, -1, head_dim)


def _image_keys_values(
    states: Float[Array, "questions image_tokens hidden"], w: Params, config: TextConfig
) -> LayerCache:
    """Return the keys and values of image tokens in one layer. They carry no RoPE."""
    k = _project_heads(states, w["k_proj"], config.num_key_value_heads, "kv_heads")
    v = _project_heads(states, w["v_proj"], config.num_key_value_heads, "kv_heads")
    return LayerCache(rms_norm(k, w["k_norm"], config.rms_norm_eps), v)


_image_keys_values_traced_once = jax.jit(_image_keys_values, static_argnames="config")


def _project_heads(
    x: Float[Array, "batch tokens hidden"], w: Params, heads: int, axis: str, adapted: AdaptedTokens = True
) -> Float[Array, "batch heads tokens head_dim"]:
    """Project and split into heads, whose logical axis is ``axis``."""
    return constrain(split_heads(linear(x, w, adapted), heads), "batch", axis, None, None)


def _mlp(
    x: Float[Array, "batch tokens hidden"], w: Params, adapted: AdaptedTokens
) -> Float[Array, "batch tokens hidden"]:
    """Apply SwiGLU."""
    gate, up = (linear(x, w[name], adapted) for name in ("gate_proj", "up_proj"))

    def down(gate: jax.Array, up: jax.Array) -> jax.Array:
        h = (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(x.dtype)
        return linear(constrain(h, "batch", None, "mlp"), w["down_proj"], adapted)

    return recomputed(down)(gate, up)
