"""Adapters against the merged weights and their gradients, and where they lie."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding

from llava_cot_jax.errors import UserError
from llava_cot_jax.model import text_decoder, vision_tower
from llava_cot_jax.model.layers import linear
from llava_cot_jax.model.mllama import Mllama, hidden_states
from llava_cot_jax.model.parameters import parameters
from llava_cot_jax.model.sharding import make_mesh, partition_spec
from llava_cot_jax.training.lora import adapter_table, init_adapters, merge_adapter
from llava_cot_jax.training.optimizer import Optimizer
from llava_cot_jax.training.settings import LoraSettings, OptimizerSettings
from llava_cot_jax.training.state import TrainState, state_sharding
from llava_cot_jax.training.step import loss_sums, make_train_step
from tests.conftest import INPUTS

EVERYTHING = LoraSettings(rank=4, alpha=6.0, targets=["_proj", r"\.fc[12]", "projector"])
OPTIMIZER = OptimizerSettings(learning_rate=2e-3, weight_decay=0.1)


@pytest.fixture(scope="module")
def rows(reference) -> dict[str, np.ndarray]:
    """Four rows (one image, none, two, one), with unequal counts of trained tokens."""
    batch = {name: np.resize(reference[name], (4, *reference[name].shape[1:])) for name in INPUTS}
    draw = np.random.default_rng(0)
    mask = (draw.random(batch["input_ids"].shape) < [[0.1], [0.9], [0.5], [0.3]]) & (batch["attention_mask"] > 0)
    mask[:, 0] = False
    return {**batch, "loss_mask": mask, "stage": np.zeros(mask.shape, np.int8)}


def weights(config, layout="stacked"):
    return flatten_dict(Mllama(config, rngs=nnx.Rngs(0), layout=layout).params, sep=".")


def fresh(config, layout="stacked", mesh=None, seed=0, settings=EVERYTHING):
    return init_adapters(adapter_table(parameters(config, layout), settings), seed, jnp.float32, mesh)


def drawn(config, layout="stacked"):
    """Adapters as after some steps: B is not 0."""
    draw = np.random.default_rng(1)
    return {
        path: jnp.float32(draw.normal(0, 0.1, x.shape)) if path.endswith("lora_b") else x
        for path, x in fresh(config, layout).items()
    }


def merge(base, adapters, scale):
    """The base with every adapter in its weight."""
    whole = {path: np.asarray(x) for path, x in base.items()}
    adapters = {path: np.asarray(x) for path, x in adapters.items()}
    for projection in {path.rpartition(".")[0] for path in adapters}:
        w, a, b = whole[f"{projection}.weight"], adapters[f"{projection}.lora_a"], adapters[f"{projection}.lora_b"]
        whole[f"{projection}.weight"] = merge_adapter(w, a, b, scale)
    return whole


@pytest.mark.slow
def test_loss_and_gradients_are_those_that_the_merged_weights_imply(small, rows):
    """With W' = W + s B A, the chain rule has dA = s B^T dW' and dB = s dW' A^T."""
    base, adapters, scale = weights(small), drawn(small), EVERYTHING.scale

    batch = jax.tree.map(jnp.asarray, rows)

    def loss(trained, frozen, scale):
        found = loss_sums(trained, frozen, batch, config=small, dtype=jnp.float32, remat="none", lora_scale=scale)
        return found.total.sum()

    value = jax.jit(jax.value_and_grad(loss))
    got, gradients = value(adapters, base, scale)
    want, of_weights = value(merge(base, adapters, scale), {}, 1.0)
    assert float(got) == pytest.approx(float(want), rel=1e-5)
    assert float(want) != pytest.approx(float(value(base, {}, 1.0)[0]), rel=0.01)
    for path in adapters:
        projection, _, name = path.rpartition(".")
        a, b = (np.asarray(adapters[f"{projection}.{x}"]) for x in ("lora_a", "lora_b"))
        change = np.asarray(of_weights[f"{projection}.weight"])  # dW' [..., out, in]
        implied = scale * (b.mT @ change if name == "lora_a" else change @ a.mT)
        largest = np.abs(implied).max()
        assert largest > 0, path
        np.testing.assert_allclose(gradients[path], implied, atol=1e-4 * largest, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["stacked", "unrolled"])
def test_hidden_states_are_those_of_the_merged_weights_and_at_first_those_of_the_base(small, rows, layout):
    base, adapters = weights(small, layout), drawn(small, layout)
    inputs = {name: jnp.asarray(rows[name]) for name in INPUTS}

    def forward(arrays):
        return hidden_states(unflatten_dict(arrays, sep="."), small, inputs)

    run = jax.jit(forward)
    of_base, want = np.asarray(run(base)), np.asarray(run(merge(base, adapters, 1.0)))
    np.testing.assert_allclose(run(base | adapters), want, atol=1e-4 * np.abs(want).max())
    assert np.abs(want - of_base).max() > 0.1 * np.abs(of_base).max()
    with jax.disable_jit():  # one operation after another: XLA may round two programs differently
        np.testing.assert_array_equal(forward(base | fresh(small, layout)), forward(base))


def test_every_weight_of_linear_can_carry_an_adapter_and_no_other(small, rows, monkeypatch):
    """``linear`` sees every adapter that the widest target declares, and no weight without one."""
    carrying, bare = set(), []

    def watched(x, w, adapted=True):
        if "lora_a" in w:
            carrying.update({id(w["lora_a"]), id(w["lora_b"])})
        else:
            bare.append(w)
        return linear(x, w, adapted)

    for module in (text_decoder, vision_tower):
        monkeypatch.setattr(module, "linear", watched)
    table = parameters(small, "unrolled")
    adapters = adapter_table(table, replace(EVERYTHING, targets=["."]))

    def forward(arrays):
        out = hidden_states(unflatten_dict(arrays, sep="."), small, {name: jnp.asarray(rows[name]) for name in INPUTS})
        assert not bare and carrying == {id(arrays[path]) for path in adapters}
        return out

    declared = (table | adapters).items()
    with jax.disable_jit():  # so that every layer comes to ``linear``, and not one of each kind
        jax.eval_shape(forward, {path: jax.ShapeDtypeStruct(p.shape, jnp.float32) for path, p in declared})
    assert carrying


def train(config, rows, steps, mesh=None) -> tuple[list[float], TrainState]:
    """The losses of a run in which adapters alone are trained."""
    adapters = adapter_table(parameters(config, "stacked"), EVERYTHING)
    table = parameters(config, "stacked") | adapters
    optimizer = Optimizer(OPTIMIZER, lambda step: OPTIMIZER.learning_rate, table)
    state = TrainState.init(init_adapters(adapters, 0, jnp.float32, mesh), weights(config), optimizer, OPTIMIZER.dtype)
    if mesh is not None:
        state = jax.device_put(state, state_sharding(state, table, mesh))
        rows = jax.device_put(rows, NamedSharding(mesh, partition_spec(("batch",))))
    settings = {"mesh": mesh, "dtype": jnp.float32, "remat": "none", "lora_scale": EVERYTHING.scale}
    step = make_train_step(config, table, optimizer, state, **settings)
    found = []
    for _ in range(steps):
        state, measures = step(state, rows)
        found.append(float(measures["loss"]))
    return found, state


@pytest.mark.slow
def test_steps_change_adapters_alone_and_a_mesh_changes_no_loss(small, rows):
    alone, state = train(small, rows, 10)
    assert alone[-1] < 0.9 * alone[0]
    before = fresh(small)
    assert set(state.trained) == set(state.optimizer[0].mu) == set(state.optimizer[0].nu) == set(before)
    assert all(np.any(state.trained[path] != x) for path, x in before.items())
    base = {path: np.asarray(x).tobytes() for path, x in weights(small).items()}
    assert {path: np.asarray(x).tobytes() for path, x in state.frozen.items()} == base

    mesh = make_mesh(2, 2, 2)
    together, state = train(small, rows, 10, mesh)
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    table = adapter_table(parameters(small, "stacked"), EVERYTHING)
    for tree in (state.trained, state.optimizer[0].mu, state.optimizer[0].nu):
        for path, array in tree.items():
            assert array.sharding.is_equivalent_to(NamedSharding(mesh, partition_spec(table[path].axes)), array.ndim), (
                path
            )


def test_adapters_are_stacked_and_cut_as_their_weights(small):
    table = adapter_table(parameters(small, "stacked"), EVERYTHING)
    down = table["vision_model.transformer.layers.0.mlp.fc2.lora_a"]
    assert down.shape == (3, 4, small.vision.intermediate_size) and down.axes == ("layers", None, "mlp")
    assert down.tensors[1] == "vision_model.transformer.layers.1.mlp.fc2.lora_a"
    keys = table["language_model.model.layers.1.cross_attn.k_proj.lora_b"]
    assert keys.tensor_shape == (small.text.num_key_value_heads * small.text.head_dim, 4)
    assert keys.axes == ("layers", "kv_heads", None)


@pytest.mark.slow
def test_fresh_adapters_are_the_same_in_either_layout_and_lie_as_declared(small):
    few = replace(EVERYTHING, targets=["cross_attn.k_proj", "fc2", "projector"])
    stacked, unrolled = (fresh(small, layout, settings=few) for layout in ("stacked", "unrolled"))
    mesh = make_mesh(2, 2, 2)
    cut = fresh(small, mesh=mesh, settings=few)
    for path, parameter in adapter_table(parameters(small, "stacked"), few).items():
        parts = [unrolled[tensor] for tensor in parameter.tensors]
        np.testing.assert_array_equal(stacked[path], jnp.stack(parts) if parameter.stacked else parts[0])
        np.testing.assert_array_equal(stacked[path], cut[path])
        assert cut[path].sharding == NamedSharding(mesh, partition_spec(parameter.axes))
        if path.endswith("lora_b"):
            assert not stacked[path].any()
    wide = stacked["multi_modal_projector.lora_a"]
    assert float(wide.std()) == pytest.approx(wide.shape[1] ** -0.5, rel=0.2)
    assert not np.array_equal(wide, fresh(small, seed=1, settings=few)["multi_modal_projector.lora_a"])


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_merged_is_computed_in_float32_and_given_back_as_it_came(kind):
    draw = np.random.default_rng(0)
    w, a, b = (draw.normal(size=shape) for shape in ((6, 8), (2, 8), (6, 2)))
    w, a, b = kind(w.astype(jnp.bfloat16)), kind(a.astype(np.float32)), kind(b.astype(jnp.bfloat16))
    got = merge_adapter(w, a, b, 0.5)
    want = np.asarray(w, np.float64) + 0.5 * np.asarray(b, np.float64) @ np.asarray(a, np.float64)
    assert type(got) is type(w) and got.dtype == w.dtype
    np.testing.assert_array_equal(np.asarray(got), want.astype(np.float32).astype(jnp.bfloat16))


def test_every_field_of_the_settings_counts(small):
    table = parameters(small, "stacked")
    assert adapter_table(table, LoraSettings()) == {} and LoraSettings().scale == 1.0
    settings = LoraSettings(rank=2)
    adapters = adapter_table(table, settings)
    assert {path.split(".")[0] for path in adapters} == {"language_model"} and len(adapters) == 2 * 3 * 7
    wider = adapter_table(table, replace(settings, rank=3))
    assert set(wider) == set(adapters) and all(wider[path].shape != p.shape for path, p in adapters.items())
    fewer = adapter_table(table, replace(settings, targets=[r"layers\.0\..*q_proj", "v_proj"]))
    assert 0 < len(fewer) < len(adapters) and any(path.startswith("vision_model") for path in fewer)
    assert (settings.scale, replace(settings, rank=4).scale, replace(settings, alpha=1.0).scale) == (8.0, 4.0, 0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": -1}, "lora.rank is -1"),
        ({"alpha": 0.0}, "lora.alpha is 0.0"),
        ({"targets": []}, "lora.targets is empty"),
        ({"targets": ["("]}, r"lora.targets: '\(' is no regular expression"),
        ({"targets": ["q_proj", "qproj"]}, "lora.targets: 'qproj' matches no projection"),
        ({"targets": ["embed_tokens"]}, "lora.targets: 'embed_tokens' matches no projection"),
        ({"targets": ["lm_head|norm|tile|patch|embedding|gate$|bias"]}, "matches no projection"),
    ],
)
def test_settings_that_cannot_be_meant(small, settings, message):
    with pytest.raises(UserError, match=message) as fault:
        adapter_table(parameters(small, "stacked"), LoraSettings(**{"rank": 2} | settings))
    assert "\n" not in str(fault.value)
