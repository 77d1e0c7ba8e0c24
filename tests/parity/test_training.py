"""One training step against transformers with torch's AdamW, on the same batch, in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict

from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.model.parameters import parameters
from llava_cot_jax.training.optimizer import Optimizer
from llava_cot_jax.training.settings import OptimizerSettings
from llava_cot_jax.training.state import TrainState, frozen_paths
from llava_cot_jax.training.step import loss_sums, make_train_step
from tests.parity.reference import Sizes, batch_of_rows, published_weights, random_model, under
from tests.parity.test_transformers import CONVENTIONS, ours

FLOOR = 1e-3
"""Share of a tensor's largest gradient: below it AdamW's first step, g / |g|, turns noise into a whole step."""

SETTINGS = OptimizerSettings(learning_rate=1e-3, weight_decay=0.1)
FROZEN = ["^vision_model", "embed_tokens"]


def batch_for(reference, seed: int, padding: str = "right") -> dict[str, np.ndarray]:
    """Rows with one image, two, none, and two apart; some answers in each, in several turns, of unequal length."""
    batch = batch_of_rows(reference.config, seed, padding)
    draw = np.random.default_rng(seed)
    trained = (draw.random(batch["input_ids"].shape) < 0.5) & (batch["input_ids"] < 120)
    trained &= batch["attention_mask"].astype(bool)
    trained &= np.roll(batch["attention_mask"], 1, axis=1).astype(bool) & (np.arange(trained.shape[1]) > 0)
    trained[2, :4] = False
    return {**batch, "loss_mask": trained, "stage": np.where(trained, draw.integers(0, 5, trained.shape), 0)}


def of_torch(reference, batch: dict[str, np.ndarray], frozen: set[str]) -> tuple[float, dict, dict]:
    """Loss, gradients and the change of parameters over the learning rate, by published name."""
    before = {name: value.copy() for name, value in published_weights(reference).items()}
    names = dict(zip(published_names(reference), reference.parameters(), strict=True))
    for name, parameter in names.items():
        parameter.requires_grad_(name not in frozen)
    trained = {name: p for name, p in names.items() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained.values() if p.ndim > 1], "weight_decay": SETTINGS.weight_decay},
            {"params": [p for p in trained.values() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=SETTINGS.learning_rate,
    )
    inputs = {name: torch.tensor(x) for name, x in batch.items() if name not in ("loss_mask", "stage")}
    logits = reference(**inputs, use_cache=False).logits[:, :-1]
    chosen = torch.tensor(batch["loss_mask"][:, 1:])
    loss = torch.nn.functional.cross_entropy(logits[chosen], inputs["input_ids"][:, 1:][chosen])
    loss.backward()
    gradients = {name: p.grad.numpy().copy() for name, p in trained.items() if p.grad is not None}
    optimizer.step()
    after = published_weights(reference)
    change = {name: (after[name] - before[name]) / SETTINGS.learning_rate for name in names}
    return loss.item(), gradients, change


def published_names(reference) -> list[str]:
    """Return the published names of the parameters, in their order, without those of buffers."""
    by_value = {id(p): name for name, p in reference.named_parameters()}
    keys = list(published_weights(reference))
    state = list(reference.state_dict())
    renamed = dict(zip(state, keys, strict=True))
    return [renamed[by_value[id(p)]] for p in reference.parameters()]


def by_tensor(arrays: dict[str, jax.Array], config: MllamaConfig) -> dict[str, np.ndarray]:
    """Arrays of the stacked layout by published name."""
    table = parameters(config, "stacked")
    found = {}
    for path, array in arrays.items():
        parts = np.asarray(array) if table[path].stacked else [np.asarray(array)]
        found |= dict(zip(table[path].tensors, parts, strict=True))
    return found


def begin(model: Mllama, frozen=(), settings: OptimizerSettings = SETTINGS) -> tuple[TrainState, Optimizer]:
    optimizer = Optimizer(settings, lambda step: settings.learning_rate, parameters(model.config, "stacked"))
    # Copied: the step donates its state.
    arrays = {path: jnp.array(array) for path, array in flatten_dict(model.params, sep=".").items()}
    rest = {path: arrays.pop(path) for path in frozen_paths(arrays, frozen)}
    return TrainState.init(arrays, rest, optimizer, settings.dtype), optimizer


def step_of(model: Mllama, optimizer: Optimizer, state: TrainState, **more):
    settings = {"mesh": None, "dtype": jnp.float32, "remat": "none"} | more
    return make_train_step(model.config, parameters(model.config, "stacked"), optimizer, state, **settings)


@pytest.mark.parametrize(
    ("seed", "padding", "frozen", "grad_accum_steps"),
    [
        pytest.param(0, "right", (), 1, marks=pytest.mark.slow),
        pytest.param(1, "left", FROZEN, 1, marks=pytest.mark.slow),
        pytest.param(2, "right", FROZEN, 2, marks=pytest.mark.slow),
        pytest.param(5, "left", (), 2, marks=pytest.mark.slow),
    ],
)
def test_one_step(seed, padding, frozen, grad_accum_steps):
    reference = random_model(Sizes.draw(seed).hf_config(), seed)
    convention = CONVENTIONS[seed % 3]
    batch = batch_for(reference, seed, padding)
    model = ours(reference, convention, layout="stacked")
    still = {
        t
        for path in (frozen_paths(parameters(model.config, "stacked"), frozen) if frozen else ())
        for t in parameters(model.config, "stacked")[path].tensors
    }
    state, optimizer = begin(model, frozen)
    before = {**state.trained}
    count = batch["loss_mask"].sum()

    compute = functools.partial(loss_sums, config=model.config, dtype=jnp.float32, remat="full")
    gradient = jax.jit(jax.grad(lambda trained, batch: compute(trained, state.frozen, batch).total.sum() / count))
    gradients = by_tensor(gradient(state.trained, batch), model.config)
    held = by_tensor(before, model.config)
    with under(convention, reference):
        loss, wanted, changes = of_torch(reference, batch, still)
    state, measures = step_of(model, optimizer, state, grad_accum_steps=grad_accum_steps)(state, batch)
    assert float(measures["loss"]) == pytest.approx(loss, rel=1e-5)
    assert int(measures["tokens"]) == count
    assert measures["stage_tokens"].tolist() == np.bincount(batch["stage"][batch["loss_mask"]], minlength=5).tolist()

    assert set(gradients).isdisjoint(still) and set(wanted) <= set(gradients)
    after = by_tensor(state.trained, model.config)
    checked = 0
    for name, got in gradients.items():
        want = wanted.get(name, np.zeros_like(got))  # torch has none for what the loss does not reach
        largest = np.abs(want).max()
        np.testing.assert_allclose(got, want, atol=1e-3 * largest, err_msg=name)
        above = np.abs(want) > FLOOR * largest
        change = (after[name] - held[name]) / SETTINGS.learning_rate
        np.testing.assert_allclose(change[above], changes[name][above], rtol=1e-3, err_msg=name)
        checked += above.sum()
    assert checked > 0.5 * sum(x.size for x in wanted.values())
    for name in still:
        assert not changes[name].any()
    assert set(by_tensor(state.frozen, model.config)) == still
