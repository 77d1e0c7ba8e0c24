"""The model against transformers with torch, live, on random small configurations."""

from dataclasses import replace
from itertools import product

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from llava_cot_jax.inference.generator import Generator
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.convention import Convention
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.model.parameters import ParamLayout
from tests.alone import alone
from tests.parity.reference import (
    Sizes,
    batch_of_rows,
    logits_of,
    published_weights,
    random_model,
    shortfall,
    under,
)
from tests.tiers import in_tiers

SEEDS = range(8)
SUITE = (3, 4, 5, 6)
"""Seeds whose cases differ in all that matters."""

OFF = 1e-4
"""How far the logits of either may be from the other's, over the largest logit, in float32.

A sum of n products in whichever order is off by about sqrt(n) 2**-24 of its size: 1.4e-6 for the longest here, of 512.
Two such sums follow each other in each of at most 17 layers, and their errors have any sign: sqrt(34) times that, 8e-6.
The rest is for norms and softmaxes, which amplify. What a wrong model gives is off by more than 1e-2.
"""

CONVENTIONS: tuple[Convention, ...] = ("meta", "transformers_4", "transformers_5")


def ours(reference, convention: Convention, dtype=jnp.float32, layout: ParamLayout = "unrolled") -> Mllama:
    """The same model here; no token ends an answer."""
    config = replace(MllamaConfig.from_dict(reference.config.to_dict()), convention=convention)
    config = replace(config, text=replace(config.text, eos_token_ids=()))
    arrays = {name: jnp.asarray(x, dtype) for name, x in published_weights(reference).items()}
    model = Mllama.from_arrays(config, arrays, layout="unrolled")
    model.to_layout(layout)
    return model


def difference(got: np.ndarray, want: np.ndarray, batch: dict[str, np.ndarray]) -> float:
    """The largest difference at a token that is no padding, over the largest logit."""
    real = batch["attention_mask"].astype(bool)
    return float(np.abs(got - want)[real].max() / np.abs(want[real]).max())


def layout_of(seed: int) -> ParamLayout:
    return "stacked" if seed % 4 < 2 else "unrolled"


def test_the_cases_of_the_suite_differ_in_what_matters():
    drawn = [Sizes.draw(seed) for seed in SUITE]
    periodic = [MllamaConfig.from_dict(s.hf_config().to_dict()).text.layers_per_block < s.layers for s in drawn]
    layouts = map(layout_of, SUITE)
    assert {*zip(layouts, periodic, strict=True)} == {*product(["stacked", "unrolled"], [True, False])}
    assert {seed % len(CONVENTIONS) for seed in SUITE} == {*range(len(CONVENTIONS))}
    assert len({s.heads // s.kv_heads for s in drawn}) > 1
    assert len({s.tiles for s in drawn}) > 2
    assert len({s.image_size for s in drawn}) == 3
    assert len({len(s.taps) for s in drawn}) > 2


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("seed", in_tiers(SEEDS, suite=SUITE))
def test_logits_at_real_positions(seed, padding):
    reference = random_model(Sizes.draw(seed).hf_config(), seed)
    batch = batch_of_rows(reference.config, seed, padding)
    convention = CONVENTIONS[seed % len(CONVENTIONS)]
    with under(convention, reference):
        want = logits_of(reference, batch)
    got = ours(reference, convention, layout=layout_of(seed))(**batch)
    assert difference(np.asarray(got), want, batch) < OFF


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["unrolled", "stacked"])
def test_hidden_states(layout):
    """The state before each layer, and the one after the final norm."""
    reference = random_model(Sizes.draw(1).hf_config(), 1)
    batch = batch_of_rows(reference.config, 1, "right")
    with torch.no_grad():
        tensors = {name: torch.tensor(x) for name, x in batch.items()}
        want = reference(**tensors, use_cache=False, output_hidden_states=True).hidden_states
    model = ours(reference, "transformers_5", layout=layout)
    logits, states = model(**batch, output_hidden_states=True)
    assert len(states) == len(want) == model.config.text.num_hidden_layers + 1
    for got, theirs in zip(states, want, strict=True):
        assert difference(np.asarray(got), theirs.numpy(), batch) < OFF
    np.testing.assert_array_equal(logits, model(**batch))


@pytest.mark.parametrize("seed", [1, 2])
def test_greedy_tokens(seed):
    """Each is the likeliest after those before it in transformers, where its question is asked alone.

    Or it is as good as that one: within what the logits of either may be off. The rows have other numbers of images.
    """
    reference = random_model(Sizes.draw(seed).hf_config(), seed)
    batch = batch_of_rows(reference.config, seed, "left")  # an answer goes on from the last column
    got = np.asarray(Generator(ours(reference, "transformers_5")).generate(batch, max_new_tokens=20))
    assert got.shape == (4, 20)
    for row, tokens in enumerate(got):
        assert shortfall(reference, alone(batch, row), tokens[None]).max() < 2 * OFF


@pytest.mark.parametrize("seed", [0, 3])
def test_text_alone(seed):
    reference = random_model(Sizes.draw(seed).hf_config(), seed)
    batch = {k: v for k, v in batch_of_rows(reference.config, seed, "right").items() if k == "attention_mask"}
    batch["input_ids"] = np.random.default_rng(seed).integers(0, 100, batch["attention_mask"].shape)
    want = logits_of(reference, batch)
    assert difference(np.asarray(ours(reference, "transformers_5")(**batch)), want, batch) < OFF


@pytest.mark.parametrize("seeds", in_tiers([SEEDS[:3], SEEDS], suite=[SEEDS[:3]]), ids=len)
def test_bfloat16_is_as_near_to_float32_as_that_of_transformers(seeds):
    error = {"here": 0.0, "transformers": 0.0}
    for seed in seeds:
        reference = random_model(Sizes.draw(seed).hf_config(), seed)
        rounded = reference.to(torch.bfloat16).float()  # so that both start from the same weights
        batch = batch_of_rows(reference.config, seed, "right")
        real = batch["attention_mask"].astype(bool)
        exact = logits_of(rounded, batch)[real]
        size = np.square(exact).mean()
        here = np.asarray(ours(rounded, "transformers_5", jnp.bfloat16)(**batch))[real]
        there = logits_of(rounded.to(torch.bfloat16), batch)[real]
        error["here"] += float(np.square(here - exact).mean() / size)
        error["transformers"] += float(np.square(there - exact).mean() / size)
    assert 0 < error["here"] <= error["transformers"], error
