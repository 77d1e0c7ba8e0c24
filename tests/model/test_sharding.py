"""The model on eight simulated devices gives what it gives on one."""

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.generator import Generator
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.layers import embed
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.model.parameters import parameters
from llava_cot_jax.model.sharding import default_mesh, make_mesh, parameter_sharding, partition_spec, use_mesh
from llava_cot_jax.planning.collectives import find_collectives
from llava_cot_jax.training.loss import causal_lm_loss
from tests.conftest import INPUTS
from tests.model.test_mllama import off
from tests.tiers import EXHAUSTIVE


def endless(model: Mllama) -> Mllama:
    """The same weights in a model where no token ends an answer."""
    model = nnx.clone(model)
    model.config = replace(model.config, text=replace(model.config.text, eos_token_ids=()))
    return model


def bytes_by_device(model: Mllama) -> list[int]:
    held = dict.fromkeys(jax.devices(), 0)
    for array in flatten_dict(model.params, sep=".").values():
        for shard in array.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return list(held.values())


@dataclass
class Alone:
    """The model on one device, and what it makes of a batch of three and of eight rows."""

    model: Mllama
    logits: np.ndarray
    eight: dict[str, np.ndarray]
    logits_of_eight: np.ndarray
    generated: np.ndarray


@pytest.fixture(scope="module")
def alone(tiny, reference) -> Alone:
    model, batch = Mllama.from_pretrained(tiny), {name: reference[name] for name in INPUTS}
    eight = {name: np.concatenate([x, x, x[:2]]) for name, x in batch.items()}
    logits, logits_of_eight = (np.asarray(model(**b)) for b in (batch, eight))
    return Alone(model, logits, eight, logits_of_eight, Generator(endless(model)).generate(batch, max_new_tokens=8))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "share"),
    [
        ((2, 2, 2), 1 / 4),
        pytest.param((8, 1, 1), 1, marks=EXHAUSTIVE),
        pytest.param((1, 8, 1), 1 / 8, marks=EXHAUSTIVE),
        pytest.param((4, 1, 2), 1 / 2, marks=EXHAUSTIVE),
    ],
)
def test_a_mesh_changes_nothing(tiny, batch, alone, shape, share, capsys):
    """Loading, forward pass (a batch that the mesh divides, and one that it does not) and generation."""
    spread = Mllama.from_pretrained(tiny, mesh=make_mesh(*shape))
    for (path, a), b in zip(
        flatten_dict(alone.model.params, sep=".").items(), flatten_dict(spread.params, sep=".").values(), strict=True
    ):
        np.testing.assert_array_equal(a, b, err_msg=path)

    whole = sum(x.nbytes for x in flatten_dict(alone.model.params, sep=".").values())
    held = bytes_by_device(spread)
    with capsys.disabled():
        print(f"\n  {shape}: {min(held)} to {max(held)} bytes a device of {whole}")
    assert max(held) < (share + 0.02) * whole  # gates, norms and most biases are on every device

    assert off(spread(**batch), alone.logits) < 1e-5
    assert off(spread(**alone.eight), alone.logits_of_eight) < 1e-5
    got = Generator(endless(spread)).generate(batch, max_new_tokens=8)
    np.testing.assert_array_equal(got, alone.generated)


@pytest.mark.slow
def test_training_layout_on_a_mesh(tiny, batch, alone):
    spread = Mllama.from_pretrained(tiny, layout="stacked", mesh=make_mesh(2, 2, 2))
    assert off(spread(**batch), alone.logits) < 1e-5
    spread.to_layout("unrolled")
    layer = spread.language_model.model.layers["3"].cross_attn.q_proj.weight[...]
    assert layer.addressable_shards[0].data.shape == (32, 32)
    np.testing.assert_array_equal(layer, alone.model.language_model.model.layers["3"].cross_attn.q_proj.weight[...])
    assert off(spread(**batch), alone.logits) < 1e-5


@pytest.mark.slow
def test_fresh_weights_are_the_same_on_a_mesh(small):
    alone = Mllama(small, rngs=nnx.Rngs(0))
    spread = Mllama(small, rngs=nnx.Rngs(0), mesh=make_mesh(2, 2, 2))
    for (path, a), b in zip(
        flatten_dict(alone.params, sep=".").items(), flatten_dict(spread.params, sep=".").values(), strict=True
    ):
        np.testing.assert_array_equal(a, b, err_msg=path)


@pytest.mark.slow
def test_activations_are_spread(tiny, alone):
    """The logits of a batch that the mesh divides are cut by row and by vocabulary."""
    model = Mllama.from_pretrained(tiny, mesh=make_mesh(2, 2, 2))
    assert model(**alone.eight).addressable_shards[0].data.shape == (2, 10, 128)


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 2, 4), (1, 8, 1), (1, 1, 8), (8, 1, 1)])
def test_embed_gives_a_device_no_more_than_the_rows_of_its_batch(shape):
    """Rows and gradients of a sharded table equal numpy's. No collective but an all-reduce has a larger result."""
    rng = np.random.default_rng(0)
    table, ids = rng.normal(size=(4096, 64)).astype(np.float32), rng.integers(0, 4096, (8, 16))
    weight = rng.normal(size=(8, 16, 64)).astype(np.float32)
    mesh = make_mesh(*shape)
    cut = NamedSharding(mesh, partition_spec((None, "columns")))
    rows = NamedSharding(mesh, partition_spec(("batch",)))

    def loss(table, ids, weight):
        with use_mesh(mesh):
            found = embed(ids, {"weight": table})
            return (found * weight).sum(), found

    given = jax.device_put(table, cut), jax.device_put(ids, rows), jax.device_put(weight, rows)
    step = jax.jit(jax.grad(loss, has_aux=True), out_shardings=(cut, rows)).lower(*given).compile()
    gradient, found = step(*given)
    expected = np.zeros_like(table)
    np.add.at(expected, ids, weight)
    np.testing.assert_array_equal(found, table[ids])
    np.testing.assert_allclose(gradient, expected, atol=1e-5)
    own = table[ids].nbytes // (mesh.shape["data"] * mesh.shape["fsdp"])
    exchanged = [each for each in find_collectives(step.as_text(), dict(mesh.shape)) if "all-reduce" not in each.kind]
    assert max((each.result_bytes for each in exchanged), default=0) <= own


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        ((1, 1, 4), "4 text key and value heads|2 text key and value heads"),
        ((3, 3, 1), "takes 9 devices; there are 8"),
        ((0, 1, 1), "at least 1"),
        ((1, 3, 1), "fsdp=3"),
    ],
)
def test_a_mesh_that_does_not_fit(tiny, shape, named):
    with pytest.raises(UserError, match=named):
        Mllama.from_pretrained(tiny, mesh=make_mesh(*shape))


def test_two_axes_on_one_mesh_axis_collide():
    with pytest.raises(ValueError, match="twice"):
        partition_spec(("heads", "mlp"))


@pytest.mark.parametrize("config", [MllamaConfig.llama32_11b(), MllamaConfig.llama32_90b()], ids=["11b", "90b"])
@pytest.mark.parametrize("layout", ["unrolled", "stacked"])
def test_every_large_parameter_of_the_published_models_is_cut(config, layout):
    for path, parameter in parameters(config, layout).items():
        cut = [axis for axis in partition_spec(parameter.axes) if axis]
        assert cut or math.prod(parameter.shape) < 1e6 * max(len(parameter.tensors), 1), path


def test_the_default_mesh_uses_every_device(tiny):
    mesh = default_mesh(MllamaConfig.llama32_11b())
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 8}
    mesh = default_mesh(MllamaConfig.from_pretrained(tiny))
    assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "tensor": 2}


def users_mesh(*axes: str, kind: AxisType = AxisType.Auto) -> Mesh:
    shape = {1: (8,), 2: (4, 2), 3: (2, 2, 2)}[len(axes)]
    return jax.make_mesh(shape, axes, axis_types=(kind,) * len(axes))


IDS = np.random.default_rng(0).integers(0, 200, (8, 12))


@dataclass
class Twins:
    """A model on one device and one of the same weights on a mesh, and the logits of ``IDS``."""

    plain: Mllama
    spread: Mllama
    logits: np.ndarray


@pytest.fixture(scope="module")
def twins(small) -> Twins:
    text = replace(small.text, num_hidden_layers=1, cross_attention_layers=())  # quick to compile
    config = replace(small, text=text)
    plain, mesh, table = Mllama(config, rngs=nnx.Rngs(0)), make_mesh(2, 2, 2), parameters(config, "unrolled")
    arrays = {
        path: jax.device_put(array, parameter_sharding(table[path], mesh))
        for path, array in flatten_dict(plain.params, sep=".").items()
    }
    spread = Mllama.from_arrays(config, arrays, layout="unrolled", mesh=mesh)
    return Twins(plain, spread, np.asarray(plain(IDS)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [lambda: users_mesh("x"), lambda: users_mesh("data", "model", kind=AxisType.Explicit)],
    ids=["x", "data, model, explicit"],
)
def test_a_mesh_that_the_user_has_set_changes_nothing(twins, mesh):
    """A model computes on its own mesh, or on one device, whatever ``jax.set_mesh`` has set around it."""
    want = Generator(twins.plain).generate({"input_ids": IDS}, max_new_tokens=2)
    with jax.set_mesh(mesh()):
        for model in (twins.plain, twins.spread):
            assert off(model(IDS), twins.logits) < 1e-5
            np.testing.assert_array_equal(Generator(model).generate({"input_ids": IDS}, max_new_tokens=2), want)


@pytest.mark.slow
def test_numbers_of_64_bits_change_nothing(twins):
    want = Generator(twins.plain).generate({"input_ids": IDS}, max_new_tokens=2)
    with jax.enable_x64(True):
        assert off(twins.plain(IDS), twins.logits) < 1e-5
        np.testing.assert_array_equal(Generator(twins.plain).generate({"input_ids": IDS}, max_new_tokens=2), want)


@pytest.mark.slow
def test_a_loaded_model_under_a_mesh_of_the_user(twins):
    """Arrays that are loaded, unlike fresh ones, are bound to their device. The mesh has others too."""
    loaded = jax.device_put(flatten_dict(twins.plain.params, sep="."), jax.devices()[1])
    model = Mllama.from_arrays(twins.plain.config, loaded, layout="unrolled")
    want = Generator(twins.plain).generate({"input_ids": IDS}, max_new_tokens=3)
    with jax.set_mesh(users_mesh("x")):
        assert off(model(IDS), twins.logits) < 1e-5
        np.testing.assert_array_equal(Generator(model).generate({"input_ids": IDS}, max_new_tokens=3), want)
        model.to_layout("stacked")
        model.to_layout("unrolled")
        model.quantize()
        assert off(model(IDS), twins.logits) < 0.1


@pytest.mark.slow
def test_inputs_on_a_mesh_of_the_user(twins):
    mesh = users_mesh("x")
    rows = jax.device_put(IDS, NamedSharding(mesh, PartitionSpec("x")))
    with jax.set_mesh(mesh):
        assert off(twins.plain(rows), twins.logits) < 1e-5
        assert off(jax.jit(twins.plain)(rows), twins.logits) < 1e-5


@pytest.mark.slow
def test_each_device_calls_the_model_for_its_rows(twins):
    mesh, axis = users_mesh("data", "fsdp", "tensor"), PartitionSpec("data")
    mapped = jax.shard_map(twins.plain, mesh=mesh, in_specs=axis, out_specs=axis)
    assert off(mapped(jnp.asarray(IDS)), twins.logits) < 1e-5


@pytest.mark.slow
def test_layouts_and_int8_under_a_mesh_of_the_user(twins):
    with jax.set_mesh(users_mesh("data", "model", kind=AxisType.Explicit)):
        model = nnx.clone(twins.spread)
        model.to_layout("stacked")
        model.to_layout("unrolled")
        model.quantize()
        assert off(model(IDS), twins.logits) < 0.1


def under_another_mesh(twins):
    with jax.set_mesh(users_mesh("x")):
        jax.jit(twins.spread)(IDS)


def gradient_under_another_mesh(twins):
    with jax.set_mesh(users_mesh("x")):
        nnx.grad(lambda model: causal_lm_loss(model(IDS), IDS))(twins.spread)


def inside_shard_map(twins):
    axis = PartitionSpec("x")
    jax.shard_map(twins.spread, mesh=users_mesh("x"), in_specs=axis, out_specs=axis)(jnp.asarray(IDS))


def with_explicit_rows(twins):
    mesh = users_mesh("x", kind=AxisType.Explicit)
    with jax.set_mesh(mesh):
        twins.plain(jax.device_put(IDS, NamedSharding(mesh, PartitionSpec("x"))))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "named"),
    [
        (gradient_under_another_mesh, r"use jax.set_mesh\(model.mesh\), or call the model outside jit"),
        (under_another_mesh, r"use jax.set_mesh\(model.mesh\), or call the model outside jit"),
        (inside_shard_map, "call it outside, or load it without a mesh"),
        (with_explicit_rows, "input_ids is sharded over mesh axes of the type Explicit"),
        (
            lambda twins: Mllama(twins.plain.config, rngs=nnx.Rngs(0), mesh=users_mesh("data", "model")),
            "lacks fsdp, tensor",
        ),
        (
            lambda twins: Mllama.from_pretrained(
                "shapes", mesh=users_mesh("data", "fsdp", "tensor", kind=AxisType.Explicit)
            ),
            "not of the type Auto",
        ),
        (lambda twins: Mllama.from_pretrained("shapes", mesh="8"), "mesh is '8'; make one with"),
    ],
)
def test_what_a_model_needs_of_a_mesh(twins, call, named):
    with pytest.raises(UserError, match=named):
        call(twins)
