"""int8 weights: how far from the given ones, and that the model computes with what they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.generator import Generator
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.model.parameters import parameters
from llava_cot_jax.model.quantization import is_quantized, quantize
from llava_cot_jax.model.sharding import make_mesh, parameter_sharding


def test_a_weight_is_within_half_a_step():
    weight = np.random.default_rng(0).normal(size=(40, 30)).astype(np.float32) * np.logspace(-4, 2, 40)[:, None]
    weight[7] = 0
    steps, scale = quantize(jnp.asarray(weight))
    assert steps.dtype == jnp.int8 and scale.dtype == jnp.float32
    assert (np.abs(steps).max(axis=1) == np.where(np.arange(40) == 7, 0, 127)).all()
    error = np.abs(np.asarray(steps, np.float32) * np.asarray(scale)[:, None] - weight)
    assert (error <= 0.5001 * np.asarray(scale)[:, None]).all()


@pytest.fixture
def model(tiny) -> Mllama:
    return Mllama.from_pretrained(tiny)


@pytest.mark.slow
def test_the_model_computes_with_what_int8_stands_for(model, batch):
    """The logits are those of a model whose float32 weights are rounded to int8 steps, not those of the original."""
    given = np.asarray(model(**batch))
    arrays = flatten_dict(model.params, sep=".")
    for path in filter(is_quantized, list(arrays)):
        exact = np.asarray(arrays[path])
        scale = np.abs(exact).max(axis=1, keepdims=True) / 127
        arrays[path] = jnp.asarray(np.round(exact / scale) * scale)
    rounded = Mllama.from_arrays(model.config, arrays, layout="unrolled")
    want = np.asarray(rounded(**batch))
    model.quantize()
    held = flatten_dict(model.params, sep=".")
    assert {path for path, x in held.items() if x.dtype == jnp.int8} == set(filter(is_quantized, arrays))
    assert model.dtype == jnp.float32 and model.is_quantized
    got = np.asarray(model(**batch))
    seen = np.asarray(batch["attention_mask"], bool)
    off = np.abs(got - want)[seen].max() / np.abs(want[seen]).max()
    assert off < 1e-5
    assert np.abs(got - given)[seen].max() / np.abs(want[seen]).max() > 1e-3
    tokens = Generator(model).generate(batch, max_new_tokens=6)
    np.testing.assert_array_equal(tokens, Generator(rounded).generate(batch, max_new_tokens=6))


@pytest.mark.slow
def test_on_a_mesh(model, batch):
    mesh, table = make_mesh(fsdp=4, tensor=2), parameters(model.config, "unrolled")
    arrays = {
        path: jax.device_put(x, parameter_sharding(table[path], mesh))
        for path, x in flatten_dict(model.params, sep=".").items()
    }
    spread = Mllama.from_arrays(model.config, arrays, layout="unrolled", mesh=mesh)
    spread.quantize()
    model.quantize()
    weight = spread.params["language_model"]["lm_head"]["weight"]
    assert weight.sharding.shard_shape(weight.shape) != weight.shape
    want = np.asarray(model(**batch))
    np.testing.assert_allclose(spread(**batch), want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_int8_is_for_decoding(model, tiny, tmp_path):
    model.quantize()
    with pytest.raises(UserError, match="load the model anew"):
        model.to_layout("stacked")
    with pytest.raises(UserError, match=r"before quantize\(\)"):
        model.save_pretrained(tmp_path / "copy")
    with pytest.raises(UserError, match="to_layout"):
        Mllama.from_pretrained(tiny, layout="stacked").quantize()
