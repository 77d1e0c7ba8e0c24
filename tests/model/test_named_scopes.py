"""Names of the model's modules in compiled programs, by which profiles are read."""

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from llava_cot_jax.inference.generator import _decode_steps, _prefill_prompts
from llava_cot_jax.inference.settings import Sampling
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.mllama import Mllama, compute_logits, hidden_states
from llava_cot_jax.model.parameters import ParamLayout
from tests.conftest import INPUTS

TOWER = {
    "vision_tower/patch_embedding",
    "vision_tower/local_layers/self_attention",
    "vision_tower/local_layers/mlp",
    "vision_tower/global_layers/self_attention",
    "vision_tower/global_layers/mlp",
    "projector",
}
TEXT = {"embed", "rope", "self_attention", "self_attention/rope", "cross_attention", "mlp", "final_norm", "lm_head"}


def scopes(lowered: Any) -> set[str]:
    """All paths of scopes in a lowered program, in each of whose functions they begin anew."""
    return paths(re.findall(r'loc\("([^"]*)"', lowered.as_text(debug_info=True)))


def compiled_scopes(lowered: Any) -> set[str]:
    """All paths of scopes in the compiled program, which has no functions."""
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)  # or another one's names are kept
    try:
        return paths(re.findall(r'op_name="([^"]*)"', lowered.compile().as_text()))
    finally:
        jax.config.update("jax_compilation_cache_include_metadata_in_key", False)


def paths(operations: list[str]) -> set[str]:
    """All paths in the names of operations, from every scope on, without the names of control flow."""
    found: set[str] = set()
    for operation in operations:
        names = [name for name in operation.split("/") if re.fullmatch(r"[a-z_]+", name)]
        names = [name for name in names if name not in ("while", "body", "cond", "closed_call", "checkpoint", "scan")]
        found |= {"/".join(names[i:j]) for i in range(len(names)) for j in range(i + 1, len(names) + 1)}
    return found


@pytest.fixture
def inputs(batch) -> dict[str, jax.Array]:
    return {name: jnp.asarray(batch[name]) for name in INPUTS}


@pytest.mark.slow
def test_forward_pass(small: MllamaConfig, inputs):
    assert forward_scopes(small, "unrolled", inputs) >= TOWER | TEXT


@pytest.mark.slow
def test_forward_pass_of_stacked_layers(small: MllamaConfig, inputs):
    assert forward_scopes(small, "stacked", inputs) >= TOWER | TEXT


def forward_scopes(small: MllamaConfig, layout: ParamLayout, inputs: dict[str, jax.Array]) -> set[str]:
    def forward(params: Any, inputs: dict[str, jax.Array]) -> jax.Array:
        return compute_logits(params, hidden_states(params, small, inputs, "full"))

    model = Mllama(small, rngs=nnx.Rngs(0), layout=layout)
    return compiled_scopes(jax.jit(forward).lower(model.params, inputs))


@pytest.mark.slow
def test_decoding(small: MllamaConfig, inputs):
    params = Mllama(small, rngs=nnx.Rngs(0)).params
    lengths = inputs.pop("attention_mask").sum(axis=1)
    static = {"config": small, "sampling": Sampling(), "mesh": None}
    seeds = jnp.zeros(len(lengths), jnp.uint32)
    prefill = _prefill_prompts.lower(params, inputs, lengths, seeds, capacity=64, **static)
    assert compiled_scopes(prefill) >= {f"encode_images/{scope}" for scope in TOWER} | {
        "encode_images/image_keys_values",
        "prefill/self_attention",
        "prefill/cross_attention",
        "prefill/lm_head",
        "sample_token",
    }
    step = _decode_steps.lower(params, prefill.out_info, jnp.int32(4), steps=4, **static)
    assert compiled_scopes(step) >= {f"sample/{scope}" for scope in (*TEXT, "sample_token")}


def test_layers_of_a_kind_are_lowered_once(small: MllamaConfig, inputs):
    """A program with twice the layers of each kind has no further function, and one more call for each layer."""
    functions, calls = zip(*(functions_and_calls(small, copies, dict(inputs)) for copies in (1, 2)), strict=True)
    text, vision = small.text, small.vision
    keys_values = len(text.cross_attention_layers)
    layers = text.num_hidden_layers + keys_values + vision.num_hidden_layers + vision.num_global_layers
    assert functions[0] == functions[1] and calls[1] == calls[0] + layers


def functions_and_calls(small: MllamaConfig, copies: int, inputs: dict[str, jax.Array]) -> tuple[int, int]:
    """Count the functions of the lowered prefill, and its calls of them, with so many copies of all layers."""
    depth = small.text.num_hidden_layers
    cross = tuple(i * depth + layer for i in range(copies) for layer in small.text.cross_attention_layers)
    text = replace(small.text, num_hidden_layers=copies * depth, cross_attention_layers=cross)
    vision = replace(
        small.vision,
        num_hidden_layers=copies * small.vision.num_hidden_layers,
        num_global_layers=copies * small.vision.num_global_layers,
    )
    config = replace(small, text=text, vision=vision)
    lengths = inputs.pop("attention_mask").sum(axis=1)
    seeds = jnp.zeros(len(lengths), jnp.uint32)
    params = Mllama(config, rngs=nnx.Rngs(0)).params
    static = {"config": config, "sampling": Sampling(), "mesh": None}
    program = _prefill_prompts.lower(params, inputs, lengths, seeds, capacity=64, **static).as_text()
    return len(re.findall(r"func\.func", program)), len(re.findall(r"\bcall @", program))
