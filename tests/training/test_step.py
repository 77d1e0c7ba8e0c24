"""The compiled step: parts of a batch, meshes, frozen parameters, and what is not finite."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding

from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.model.parameters import parameters
from llava_cot_jax.model.sharding import make_mesh, partition_spec
from llava_cot_jax.training.lora import adapter_table, init_adapters
from llava_cot_jax.training.optimizer import Optimizer
from llava_cot_jax.training.settings import LoraSettings, OptimizerSettings
from llava_cot_jax.training.state import TrainState, frozen_paths, state_sharding
from llava_cot_jax.training.step import make_train_step
from tests.tiers import in_tiers

SETTINGS = OptimizerSettings(learning_rate=2e-3)

SCOPES = {
    "loss_and_gradients",
    "cross_entropy",
    "probe_losses",
    "gradient_norm",
    "optimizer",
    "vision_tower",
    "lm_head",
    "mlp",
}


@pytest.fixture(scope="module")
def rows(reference) -> dict[str, np.ndarray]:
    """Eight rows (one image, none or two), with very unequal counts of trained tokens and weights of replies."""
    names = ("input_ids", "pixel_values", "aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask")
    batch = {name: np.resize(reference[name], (8, *reference[name].shape[1:])) for name in (*names, "attention_mask")}
    draw = np.random.default_rng(0)
    batch["input_ids"] = np.where(
        batch["input_ids"] < 100, draw.integers(0, 100, batch["input_ids"].shape), batch["input_ids"]
    )
    share = np.array([0.0, 0.9, 0.1, 0.5, 0.05, 0.3, 0.8, 0.2])[:, None]
    mask = (draw.random(batch["input_ids"].shape) < share) & batch["attention_mask"].astype(bool)
    mask[:, 0] = False
    stage = np.where(mask, draw.integers(0, 5, mask.shape), 0).astype(np.int8)
    weights = np.array([0.0, 1.0, 0.0, 0.3, 2.0, 0.0, 0.7, 0.0], np.float32)
    probes = {
        "probe": np.zeros(mask.shape, bool),
        "probe_answers": draw.integers(0, 100, (8, 2)).astype(np.int32),
        "probe_value": draw.random(8).astype(np.float32),
        "probe_weight": weights,
    }
    return {**batch, **probes, "loss_mask": mask, "stage": stage}


def start(config, mesh=None, frozen=(), settings=SETTINGS, lora=None, **more):
    """A state and its step."""
    model = Mllama(config, rngs=nnx.Rngs(0), layout="stacked")
    table = parameters(config, "stacked")
    optimizer = Optimizer(settings, lambda step: settings.learning_rate, table)
    arrays = flatten_dict(model.params, sep=".")
    still = frozen_paths(arrays, frozen)
    rest = {path: arrays.pop(path) for path in still}
    if lora:
        adapters = adapter_table(table, lora)
        arrays, rest, table = init_adapters(adapters, 0, settings.dtype, mesh), arrays, table | adapters
        optimizer = Optimizer(settings, lambda step: settings.learning_rate, table)
        more |= {"lora_tokens": lora.tokens}
    state = TrainState.init(arrays, rest, optimizer, settings.dtype)
    if mesh is not None:
        state = jax.device_put(state, state_sharding(state, table, mesh))
    return state, make_train_step(config, table, optimizer, state, mesh=mesh, dtype=jnp.float32, remat="full", **more)


def train(config, rows, steps, mesh=None, **more) -> tuple[list[float], TrainState]:
    state, step = start(config, mesh, **more)
    batch = rows if mesh is None else jax.device_put(rows, NamedSharding(mesh, partition_spec(("batch",))))
    found = []
    for _ in range(steps):
        state, measures = step(state, batch)
        found += [float(measures[name]) for name in ("loss", "verifier_loss", "verifier_other_probability")]
    return found, state


@pytest.fixture(scope="module")
def alone(small, rows) -> list[float]:
    """The losses of 20 steps on one device."""
    return train(small, rows, 20)[0]


@pytest.mark.slow
def test_scopes_of_a_profile(small, rows):
    """Names by which a profile is read; the forward pass and the backward pass are ``jvp`` and ``transpose``."""
    state, step = start(small)
    locations = re.findall(r'loc\("([^"]*)"', step.lower(state, rows).as_text(debug_info=True))
    names = {name for location in locations for name in re.findall(r"\w+", location)}
    assert names >= SCOPES | {"jvp", "transpose"}


@pytest.mark.parametrize("parts", in_tiers([2, 4], suite=[4]))
def test_parts_of_a_batch_add_up(small, rows, alone, parts):
    np.testing.assert_allclose(train(small, rows, 20, grad_accum_steps=parts)[0], alone, rtol=1e-5)


@pytest.mark.slow
def test_a_reply_counts_by_its_weight_in_parts_of_a_batch_too(small, rows):
    """The weights are not those within a batch: three times the weight of each is three times the gradient."""
    end = rows["attention_mask"].sum(axis=1, keepdims=True)
    at = np.arange(rows["probe"].shape[1])
    rows = rows | {"probe": (at >= end - 3) & (at < end)}
    lora = LoraSettings(rank=2, tokens="probe")
    norms, losses = [], []
    for parts, factor in ((1, 1), (2, 1), (2, 3)):
        state, step = start(small, lora=lora, grad_accum_steps=parts)
        _, found = step(state, rows | {"probe_weight": rows["probe_weight"] * np.float32(factor)})
        norms.append(float(found["gradient_norm"]))
        losses.append(float(found["loss"]))
        assert found["loss"] == found["verifier_loss"] and found["replies"] == 4 and found["tokens"] == 0
    assert norms[0] > 0 and norms[1:] == pytest.approx([norms[0], 3 * norms[0]], rel=1e-4)
    assert losses[1:] == pytest.approx([losses[0], 3 * losses[0]], rel=1e-5)


@pytest.mark.parametrize(
    "case", in_tiers([((8, 1, 1), 1), ((2, 2, 2), 2), ((1, 4, 2), 2)], suite=[((2, 2, 2), 2)]), ids=str
)
def test_losses_are_those_of_one_device(small, rows, alone, case):
    sizes, parts = case
    assert alone[-3] < 0.9 * alone[0] and alone[-2] < 0.9 * alone[1]
    mesh = make_mesh(*sizes)
    together, state = train(small, rows, 20, mesh, grad_accum_steps=parts)
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    table = parameters(small, "stacked")
    for tree in (state.trained, state.optimizer[0].mu, state.optimizer[0].nu):
        for path, array in tree.items():
            held = sum(shard.data.nbytes for shard in array.addressable_shards[:1])
            pieces = np.prod([mesh.shape[m] for m in jax.tree.leaves(tuple(partition_spec(table[path].axes))) if m])
            assert held == array.nbytes // int(pieces)


@pytest.mark.slow
def test_what_is_frozen_stays_and_has_no_moments(small, rows):
    state, step = start(small, frozen=["^vision_model", "norm"])
    assert all("norm" not in path and not path.startswith("vision_model") for path in state.trained)
    before = {path: np.asarray(array) for path, array in state.frozen.items()}
    trained = {path: np.asarray(array) for path, array in state.trained.items()}
    assert set(state.optimizer[0].mu) == set(state.trained)
    state, _ = step(state, rows)
    assert all(np.array_equal(state.frozen[path], before[path]) for path in before)
    assert any(not np.array_equal(state.trained[path], trained[path]) for path in trained)


@pytest.mark.slow
def test_a_step_that_is_not_finite_changes_nothing(small, rows):
    """Nor do the steps after it know of it: all is as without its batch, bit for bit."""
    state, step = start(small)
    state, _ = step(state, rows)
    before = jax.tree.map(np.asarray, (state.trained, state.optimizer))
    broken = rows | {"pixel_values": np.full_like(rows["pixel_values"], np.nan)}
    state, measures = step(state, broken)
    assert not measures["finite"] and int(state.skipped) == 1 and int(state.step) == 2
    jax.tree.map(np.testing.assert_array_equal, (state.trained, state.optimizer), before)
    state, measures = step(state, rows)
    assert measures["finite"] and int(state.skipped) == 1 and int(state.step) == 3
    without, step = start(small)
    for _ in range(2):
        without, _ = step(without, rows)
    jax.tree.map(np.testing.assert_array_equal, (state.trained, state.optimizer), (without.trained, without.optimizer))


@pytest.mark.slow
def test_gradients_are_clipped_to_a_norm(small, rows):
    free, clipped = (start(small, settings=replace(SETTINGS, eps=1.0), max_grad_norm=clip) for clip in (0.0, 1e-3))
    changes = []
    for state, step in (free, clipped):
        state, measures = step(state, rows)
        assert float(measures["gradient_norm"]) > 1e-2  # told as it was
        moments = np.concatenate([np.ravel(x) for x in state.optimizer[0].mu.values()])
        changes.append(np.linalg.norm(moments) / 0.1)
    assert changes[1] == pytest.approx(1e-3, rel=1e-4) and changes[0] > 1e-2
