"""A cache that is a chain of segments against transformers' whole forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from llava_cot_jax.inference.decoding import Decoder, encode_images, prefill
from llava_cot_jax.inference.ragged_tokens import RaggedTokens
from llava_cot_jax.model.kv_cache import KVCache, Segment, init_cache
from tests.costs.test_model_costs import arrays
from tests.jaxprs import shapes
from tests.parity.reference import BOS, Sizes, batch_of_rows, logits_of, random_model, under
from tests.parity.test_transformers import OFF, ours
from tests.tiers import in_tiers

QUESTIONS, CANDIDATES, CONTINUATIONS = 4, 2, 3
SHORT, CHUNK = 9, 4

LENGTHS = np.array([[5, 0], [9, 3], [1, 7], [4, 2]], np.int32)
"""Number of tokens of each candidate: one has none."""


def ragged(tokens: np.ndarray, lengths: np.ndarray) -> RaggedTokens:
    return RaggedTokens(jnp.asarray(tokens, jnp.int32), jnp.asarray(lengths, jnp.int32))


@pytest.mark.parametrize("convention", in_tiers(["meta", "transformers_5"], suite=["meta"]))
def test_three_segments_give_the_logits_of_the_whole_forward_pass(convention):
    """Four questions, two candidates of each, three continuations of each candidate, all of different lengths.

    The questions have one, two, no, and two images. Each token of the continuations is checked, and the last of the
    questions and candidates.
    """
    reference = random_model(Sizes.draw(4).hf_config(), 4)
    model = ours(reference, convention)
    batch = batch_of_rows(reference.config, 4, "right")
    present = batch.pop("attention_mask")
    rng, rows = np.random.default_rng(5), (QUESTIONS, CANDIDATES, CONTINUATIONS)
    candidates = rng.integers(0, BOS, (*rows[:2], SHORT))
    continuations = rng.integers(0, BOS, (*rows, SHORT))
    lengths = present.sum(axis=1).astype(np.int32)
    params, config = model.params, model.config

    @jax.jit
    def chain_of_two(params, inputs):
        decoder = Decoder(params, config, encode_images(params, config, inputs, jnp.asarray(lengths)), CHUNK)
        flat = ragged(candidates.reshape(-1, SHORT), LENGTHS.reshape(-1))
        question, after_question = _append(decoder, (), ragged(inputs["input_ids"], lengths))
        candidate, after_candidate = _append(decoder, (question,), flat)
        return decoder, (question, candidate), after_question, after_candidate

    @jax.jit
    def step(decoder, token, cache):
        hidden, suffix = decoder.forward(token[:, None], cache)
        return decoder.logits(hidden[:, 0]), KVCache(suffix, cache.lengths + 1, cache.prefix)

    decoder, chain, after_question, after_candidate = chain_of_two(params, batch)
    batch_size = int(np.prod(rows))
    cache = KVCache(decoder.init_cache(batch_size, SHORT), jnp.zeros(batch_size, jnp.int32), chain)
    steps = []
    for i in range(SHORT):
        logits, cache = step(decoder, jnp.asarray(continuations[..., i].reshape(-1), jnp.int32), cache)
        steps.append(np.asarray(logits).reshape(*rows, -1))

    with under(convention, reference):
        for q, c, n in np.ndindex(*rows):
            added = np.concatenate([candidates[q, c, : LENGTHS[q, c]], continuations[q, c, n]])
            want = logits_of(reference, _with_tokens(batch, q, lengths[q], added))[0]
            largest, own = np.abs(want).max(), lengths[q] + LENGTHS[q, c]
            got = np.stack([logits[q, c, n] for logits in steps])
            assert np.abs(got - want[own:]).max() / largest < OFF
            assert np.abs(after_question[q] - want[lengths[q] - 1]).max() / largest < OFF
            if LENGTHS[q, c]:
                assert np.abs(after_candidate[q * CANDIDATES + c] - want[own - 1]).max() / largest < OFF


def _append(decoder: Decoder, chain: tuple[Segment, ...], tokens: RaggedTokens) -> tuple[Segment, jax.Array]:
    """Return a new segment of ``tokens`` after a chain, and the logits after it."""
    none = jnp.zeros_like(tokens.lengths)
    cache = KVCache(decoder.init_cache(len(none), tokens.capacity + CHUNK), none, chain)
    layers, logits = prefill(decoder, tokens, cache)
    return Segment(layers, tokens.lengths), logits


def _with_tokens(batch: dict[str, np.ndarray], row: int, length: int, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Return one row of a batch alone, cut to its own length, and then ``tokens``, which see what its last token sees.

    It has its own images, and none that fill up the batch.
    """
    own = {name: x[row : row + 1] for name, x in batch.items()}
    ids = np.concatenate([own["input_ids"][:, :length], tokens[None]], axis=1)
    alone = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    count = int((own["aspect_ratio_ids"] > 0).sum())
    if not count:
        return alone
    mask = own["cross_attention_mask"][:, :length, :count]
    mask = np.concatenate([mask, np.repeat(mask[:, -1:], len(tokens), axis=1)], axis=1)
    images = {name: own[name][:, :count] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    return alone | images | {"cross_attention_mask": mask}


def test_a_chain_is_never_copied(small):
    """No array of the program has a question's or a candidate's keys once for each continuation."""
    capacities, rows = (37, 23), (2, 6, 24)
    text = small.text
    abstract = jax.eval_shape(
        lambda: tuple(
            Segment(_layers(small, groups, capacity), jnp.zeros(groups, jnp.int32))
            for groups, capacity in zip(rows[:2], capacities, strict=True)
        )
    )

    def forward(flat, tokens, chain):
        decoder = Decoder(unflatten_dict(flat, sep="."), small, None, CHUNK)
        cache = KVCache(decoder.init_cache(rows[2], SHORT), jnp.zeros(rows[2], jnp.int32), chain)
        return decoder.forward(tokens, cache)

    tokens = jax.ShapeDtypeStruct((rows[2], 1), jnp.int32)
    program = jax.make_jaxpr(forward)(arrays(small, "unrolled"), tokens, abstract)
    found = shapes(program.jaxpr)
    for groups, capacity in zip(rows[:2], capacities, strict=True):
        with_keys = [shape for shape in found if capacity in shape and text.head_dim in shape]
        largest = groups * text.num_key_value_heads * capacity * text.head_dim
        assert max([int(np.prod(shape)) for shape in with_keys], default=0) <= largest
        scores = [shape for shape in found if capacity in shape and text.head_dim not in shape]
        assert max(int(np.prod(shape)) for shape in scores) == rows[2] * text.num_attention_heads * capacity


def _layers(config, batch: int, capacity: int):
    return init_cache(config.text, batch, capacity, jnp.dtype(jnp.float32))
