"""What the forward pass of a layer keeps for the backward pass is what the plan counts."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llava_cot_jax.benchmark.workload import config_100m
from llava_cot_jax.model import text_decoder, vision_tower
from llava_cot_jax.model.attention import AttentionMask
from llava_cot_jax.model.layers import attention, rope_cos_sin
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.planning.memory import SAVED_BY_TEXT_LAYER, SAVED_BY_TOWER_BLOCK

TOKENS = 33  # no width has this size


def saved_bytes(layer: Callable, x: jax.Array, w: dict) -> int:
    """Bytes of the bfloat16 arrays with a value for each token that the backward pass needs, each counted once.

    Attention keeps its result once more, by heads, which the compiler merges only where it lies in memory alike.
    """
    kept = [np.asarray(leaf) for leaf in jax.tree.leaves(jax.vjp(layer, x, w)[1])]
    arrays = [leaf for leaf in kept if TOKENS in leaf.shape]
    wide = [leaf.shape for leaf in arrays if leaf.dtype == np.float32 and leaf.shape[-1] > x.shape[-1]]
    assert not wide, "an activation of the MLP is kept in float32"
    return sum({leaf.tobytes(): leaf.nbytes for leaf in arrays if leaf.dtype == jnp.bfloat16}.values())


@pytest.fixture(scope="module")
def params() -> dict:
    config = config_100m()
    text = replace(config.text, num_hidden_layers=2, cross_attention_layers=(1,))
    vision = replace(config.vision, num_hidden_layers=1, num_global_layers=1, intermediate_layers_indices=(0,))
    model = Mllama(replace(config, text=text, vision=vision), rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    return {"config": model.config, **model.params}


@pytest.mark.slow
def test_a_text_layer(params):
    config = params["config"].text
    mask = AttentionMask(jnp.ones((1, TOKENS, 1), bool), jnp.zeros((1, TOKENS), jnp.int32))
    rope = rope_cos_sin(jnp.arange(TOKENS)[None], config)

    def layer(x: jax.Array, w: dict) -> jax.Array:
        q, k, v = text_decoder._queries_keys_values(x, w, config, rope, True)
        return text_decoder._after_self_attention(x, attention(q, k, v, mask), w, config, True)

    x = jax.random.normal(jax.random.key(0), (1, TOKENS, config.hidden_size), jnp.bfloat16)
    found = saved_bytes(layer, x, params["language_model"]["model"]["layers"]["0"])
    counted = SAVED_BY_TEXT_LAYER["none"].values(config.hidden_size, config.intermediate_size, 1)
    # The plan counts keys and values together as one vector of the hidden size.
    narrower = config.hidden_size - 2 * config.num_key_value_heads * config.head_dim
    assert found == (counted - narrower) * TOKENS * 2


def test_a_block_of_the_tower(params):
    config = params["config"].vision
    mask = AttentionMask(jnp.ones((1, TOKENS, 1), bool), jnp.zeros((1, TOKENS), jnp.int32))
    layer = partial(vision_tower._layer, config=config, mask=mask, remat="none")
    x = jax.random.normal(jax.random.key(0), (1, TOKENS, config.hidden_size), jnp.bfloat16)
    found = saved_bytes(layer, x, params["vision_model"]["transformer"]["layers"]["0"])
    counted = SAVED_BY_TOWER_BLOCK["none"].values(config.hidden_size, config.intermediate_size, 1)
    assert found == counted * TOKENS * 2
