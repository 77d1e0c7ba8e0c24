"""Decoding with a cache against the whole forward pass, and what it compiles."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_cot_jax.cli import CompilationCounter
from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.decoding import Decoder, bucket, encode_images, prefill
from llava_cot_jax.inference.generator import STEPS_PER_CALL, Generator
from llava_cot_jax.inference.ragged_tokens import RaggedTokens
from llava_cot_jax.inference.settings import Sampling
from llava_cot_jax.model.kv_cache import KVCache
from llava_cot_jax.model.mllama import Mllama
from tests.alone import alone
from tests.model.test_mllama import off
from tests.tiers import in_tiers

PROMPT, NEW = 10, 12


@pytest.fixture(scope="module")
def model(tiny) -> Mllama:
    """No token ends an answer."""
    model = Mllama.from_pretrained(tiny)
    model.config = replace(model.config, text=replace(model.config.text, eos_token_ids=()))
    return model


def with_shorter_rows(batch: dict[str, np.ndarray], side: str) -> dict[str, np.ndarray]:
    """The rows cut to 7, 10 and 8 tokens, padded with nonsense on one side."""
    out = {name: x.copy() for name, x in batch.items()}
    for row, length in enumerate((7, 10, 8)):
        room = PROMPT - length
        out["attention_mask"][row, length:] = 0
        out["input_ids"][row, length:] = 99
        out["cross_attention_mask"][row, length:] = 0
        if side == "left":
            for name in ("attention_mask", "input_ids", "cross_attention_mask"):
                out[name][row] = np.roll(out[name][row], room, axis=0)
    return out


@pytest.mark.parametrize("convention", in_tiers(["meta", "transformers_5"], suite=["meta"]))
def test_every_step_gives_the_logits_of_the_whole_forward_pass(tiny, batch, convention):
    """Rows with one image, none and two, of different lengths, read four tokens at a time, against each row alone.

    The tokens appended are arbitrary.
    """
    model = Mllama.from_pretrained(tiny, convention=convention)
    config, params = model.config, model.params
    batch = with_shorter_rows(batch, "right")
    lengths = batch.pop("attention_mask").sum(axis=1).astype(np.int32)
    inputs = {name: jnp.asarray(x) for name, x in batch.items()}
    appended = np.random.default_rng(0).integers(0, 256, (3, NEW)).astype(np.int32)

    @jax.jit
    def prefill_prompts(params, inputs, lengths):
        decoder = Decoder(params, config, encode_images(params, config, inputs, lengths), prefill_chunk=4)
        cache = KVCache(decoder.init_cache(len(lengths), PROMPT + 4 + NEW), jnp.zeros_like(lengths))
        suffix, logits = prefill(decoder, RaggedTokens(inputs["input_ids"], lengths), cache)
        return decoder, KVCache(suffix, lengths), logits

    @jax.jit
    def step(decoder, token, cache):
        hidden, suffix = decoder.forward(token[:, None], cache)
        return decoder.logits(hidden[:, 0]), KVCache(suffix, cache.lengths + 1)

    decoder, cache, logits = prefill_prompts(params, inputs, lengths)
    steps = [logits]
    for i in range(NEW):
        logits, cache = step(decoder, appended[:, i], cache)
        steps.append(logits)

    for row, length in enumerate(lengths):
        own = alone(batch, row)
        own["input_ids"] = np.concatenate([own["input_ids"][:, :length], appended[row : row + 1]], axis=1)
        if "cross_attention_mask" in own:
            seen = own["cross_attention_mask"][:, :length]
            own["cross_attention_mask"] = np.concatenate([seen, np.repeat(seen[:, -1:], NEW, axis=1)], axis=1)
        whole = model(**own)[0, length - 1 :]
        assert off(np.stack([s[row] for s in steps]), whole) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, top_k=20, top_p=0.9)], ids=["greedy", "sampled"])
def test_padding_and_neighbours_change_no_answer(model, batch, sampling):
    generator = Generator(model, sampling)
    seeds = [5, 6, 7]
    want = generator.generate(with_shorter_rows(batch, "right"), max_new_tokens=NEW, seeds=seeds)
    got = generator.generate(with_shorter_rows(batch, "left"), max_new_tokens=NEW, seeds=seeds)
    np.testing.assert_array_equal(got, want)
    turned = {name: x[::-1] for name, x in with_shorter_rows(batch, "right").items()}
    got = generator.generate(turned, max_new_tokens=NEW, seeds=seeds[::-1])
    np.testing.assert_array_equal(got[::-1], want)


@pytest.mark.slow
def test_a_seed_gives_its_answer_and_another_seed_another(model, batch):
    generator = Generator(model, Sampling(1.0))
    first, again, other = (generator.generate(batch, max_new_tokens=NEW, seeds=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.slow
def test_a_length_that_is_not_given_is_what_the_context_leaves(tiny, batch, caplog):
    model = Mllama.from_pretrained(tiny)
    prompt, text = batch["input_ids"].shape[1], replace(model.config.text, eos_token_ids=())
    model.config = replace(model.config, text=replace(text, max_position_embeddings=prompt + 5))
    generator = Generator(model)
    whole = generator.generate(batch)
    assert whole.shape[1] == 5
    assert caplog.messages == [
        f"the answer: cut off after 5 tokens, which is what the prompt left of the model's context of {prompt + 5}"
    ]
    np.testing.assert_array_equal(generator.generate(batch, max_new_tokens=3), whole[:, :3])
    np.testing.assert_array_equal(Generator(model, default_max_new_tokens=3).generate(batch), whole[:, :3])
    assert len(caplog.messages) == 1
    with pytest.raises(UserError, match=rf"with 6 new ones that exceeds the context of {prompt + 5}"):
        generator.generate(batch, max_new_tokens=6)
    model.config = replace(model.config, text=replace(text, max_position_embeddings=prompt))
    with pytest.raises(UserError, match=f"which leaves no room for an answer in the context of {prompt}: shorten"):
        Generator(model).generate(batch)


@pytest.mark.slow
def test_an_answer_ends_at_its_token_and_the_loop_when_all_have(tiny, batch, model):
    endless = Generator(model).generate(batch, max_new_tokens=3 * STEPS_PER_CALL)
    ends = (int(endless[0, 2]), int(endless[1, 5]), int(endless[2, 0]))
    config = replace(model.config, text=replace(model.config.text, eos_token_ids=ends))
    ending = Mllama.from_pretrained(tiny)
    ending.config = config
    got = Generator(ending).generate(batch, max_new_tokens=3 * STEPS_PER_CALL)
    stops = [next(i for i, token in enumerate(row) if token in ends) for row in endless]
    assert got.shape[1] == max(stops) + 1
    for row, stop in enumerate(stops):
        np.testing.assert_array_equal(got[row, : stop + 1], endless[row, : stop + 1])
        assert (got[row, stop + 1 :] == config.text.pad_token_id).all()


def test_the_stream_is_the_answer_in_pieces(model, batch):
    pieces = list(Generator(model).stream(batch, max_new_tokens=2 * STEPS_PER_CALL + 3))
    assert [piece.shape[1] for piece in pieces] == [1, STEPS_PER_CALL, STEPS_PER_CALL, 2]
    whole = Generator(model).generate(batch, max_new_tokens=2 * STEPS_PER_CALL + 3)
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole)


@pytest.mark.slow
def test_a_second_question_of_similar_length_compiles_nothing(model, batch):
    generator = Generator(model)
    generator.generate(with_shorter_rows(batch, "right"), max_new_tokens=20)
    compilations = CompilationCounter()
    generator.generate(with_shorter_rows(batch, "left"), max_new_tokens=33, seeds=9)
    assert compilations.count == 0
    generator.generate(batch, max_new_tokens=200)  # another bucket: the counter does count
    assert compilations.count > 0


POISON = 77
"""Token whose embedding is damaged."""


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, top_k=20, top_p=0.9)], ids=["greedy", "sampled"])
def test_logits_that_are_not_finite_are_no_answer(tiny, model, batch, sampling, value):
    damaged = Mllama.from_pretrained(tiny)
    damaged.config = model.config  # so that nothing is compiled anew
    weight = damaged.language_model.model.embed_tokens.weight
    weight.set_value(weight.get_value().at[POISON].set(value))
    batch["input_ids"][batch["input_ids"] == POISON] = 1
    batch["input_ids"][1, 4] = POISON
    with pytest.raises(UserError, match=r"logits are not finite within the first 1 tokens of answer 2, .* too large"):
        Generator(damaged, sampling).generate(batch, max_new_tokens=NEW, seeds=[5, 6, 7])


def test_logits_that_are_not_finite_in_mid_answer(tiny, model, batch):
    """The first token of an answer is damaged here. It is still given out, as its own logits were sound."""
    token = int(Generator(model).generate(batch, max_new_tokens=NEW)[0, 0])
    damaged = Mllama.from_pretrained(tiny)
    damaged.config = model.config
    weight = damaged.language_model.model.embed_tokens.weight
    weight.set_value(weight.get_value().at[token].set(jnp.nan))
    assert token not in batch["input_ids"][0]
    batch["input_ids"][batch["input_ids"] == token] = 1
    stream = Generator(damaged).stream(batch, max_new_tokens=NEW)
    assert next(stream)[0] == token
    with pytest.raises(UserError, match=f"within the first {NEW} tokens of answer 1"):
        next(stream)


@pytest.mark.parametrize(("length", "padded"), [(1, 64), (64, 64), (65, 128), (1000, 1024), (1025, 2048)])
def test_bucket(length, padded):
    assert bucket(length) == padded


def test_what_exceeds_the_context_is_refused(model, batch):
    with pytest.raises(UserError, match=r"the prompt has 10 tokens.*context of 512"):
        Generator(model).generate(batch, max_new_tokens=503)
    with pytest.raises(UserError, match="max_new_tokens"):
        Generator(model).generate(batch, max_new_tokens=0)
    batch["attention_mask"][1] = 0
    with pytest.raises(UserError, match="row 1 of the batch has no tokens"):
        Generator(model).generate(batch, max_new_tokens=4)
