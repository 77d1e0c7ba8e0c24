"""Texts, stop strings and log-probabilities of generated answers."""

from copy import copy
from dataclasses import replace

import jax
import numpy as np
import pytest

from llava_cot_jax import Generator, Sampling, user_turn
from llava_cot_jax.inference.completions import GrowingCompletion
from llava_cot_jax.inference.generator import STEPS_PER_CALL, cut_by_context
from tests.search.models import random_model

NEW = 40


@pytest.fixture(scope="module")
def generator():
    """A generator of a random model in which no token ends an answer, its processor, and two prompts of its own."""
    model, processor = random_model(0, eos=())
    inputs = processor([processor.prompt(user_turn(text)) for text in ("red?", "How many stars are there?")])
    return Generator(model, Sampling(1.0), processor), model, processor, inputs


@pytest.mark.slow
def test_log_probabilities_are_those_of_the_whole_forward_pass(generator):
    generator, model, _, inputs = generator
    for row, completion in enumerate(generator.complete(inputs, max_new_tokens=20, seeds=[3, 4])):
        prompt = inputs["input_ids"][row][inputs["attention_mask"][row] == 1].tolist()
        logits = np.asarray(model([prompt + completion.tokens]))[0, len(prompt) - 1 : -1]
        want = np.asarray(jax.nn.log_softmax(logits))[np.arange(20), completion.tokens]
        np.testing.assert_allclose(completion.log_probs, want, atol=1e-4)
        assert completion.ended == "max_new_tokens"


def test_tokens_and_texts_are_those_of_generate(generator):
    generator, _, processor, inputs = generator
    tokens = generator.generate(inputs, max_new_tokens=NEW, seeds=[3, 4])
    for row, completion in zip(tokens, generator.complete(inputs, max_new_tokens=NEW, seeds=[3, 4]), strict=True):
        assert completion.tokens == row.tolist() and completion.text == processor.decode(row)


def test_an_answer_ends_at_a_stop_string(generator):
    """The strings are taken from the middle of the whole answers, wherever tokens begin and end. One row goes on."""
    generator, _, processor, inputs = generator
    first, second = generator.complete(inputs, max_new_tokens=NEW, seeds=[3, 4])
    assert len(first.text) > 40
    for start in range(5, 30, 4):
        stop = first.text[start : start + 3]
        got, other = generator.complete(inputs, max_new_tokens=NEW, seeds=[3, 4], stop=["no such text", stop])
        assert got.text == first.text[: first.text.index(stop)] and got.ended == "stop"
        assert got.tokens == first.tokens[: len(got.tokens)] and len(got.log_probs) == len(got.tokens)
        assert stop in processor.decode(got.tokens) and stop not in processor.decode(got.tokens[:-1])
        assert stop in second.text or other == second


def test_a_stop_string_just_before_the_end_of_the_context_leaves_nothing_cut_off(generator, caplog):
    generator, model, _, inputs = generator
    context = inputs["input_ids"].shape[1] + NEW
    short = copy(generator)
    short.config = replace(model.config, text=replace(model.config.text, max_position_embeddings=context))
    whole = short.complete(inputs, seeds=[3, 4])
    assert [len(completion.tokens) for completion in whole] == [NEW] * 2
    assert caplog.messages == [f"the answer: {cut_by_context(short.config, NEW)}"]
    stopped = short.complete(inputs, seeds=[3, 4], stop=[completion.text[-8:] for completion in whole])
    assert {completion.ended for completion in stopped} == {"stop"} and len(caplog.messages) == 1
    assert max(len(completion.tokens) for completion in stopped) > NEW - STEPS_PER_CALL // 2  # in the last piece


def test_pieces_of_text_make_the_whole(generator):
    generator, _, _, inputs = generator
    pieces = list(generator.stream_text(inputs, max_new_tokens=NEW, seeds=[3, 4]))
    whole = generator.complete(inputs, max_new_tokens=NEW, seeds=[3, 4])
    assert len(pieces) > 2
    assert ["".join(row) for row in zip(*pieces, strict=True)] == [completion.text for completion in whole]


def test_characters_come_whole(generator):
    """Each character of this text has several tokens, which come one by one."""
    processor, text = generator[2], "北京 é 🦙!"
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(text)
    growing = GrowingCompletion(processor, eos_token_ids=(), stop=())
    seen = [""]
    for i, token in enumerate(ids):
        growing.extend(np.array([token]), np.zeros(1), is_last=i == len(ids) - 1)
        seen.append(growing.now.text)
        assert seen[-1].startswith(seen[-2]) and "\ufffd" not in seen[-1]
    assert seen[-1] == text and len(set(seen)) == len(text) + 1


def test_what_may_become_a_stop_string_is_held_back(generator):
    processor, eos = generator[2], generator[1].config.text.pad_token_id
    ids = processor.tokenizer("a </b> c </SUM", add_special_tokens=False)["input_ids"]
    growing = GrowingCompletion(processor, (eos,), ("</SUMMARY>",))
    for token in ids:
        growing.extend(np.array([token]), np.zeros(1), is_last=False)
        assert not growing.now.text.endswith(("<", "</", "</S", "</SUM"))
    assert growing.now.text == "a </b> c "
    growing.extend(np.array([eos, 1, 2]), np.zeros(3), is_last=False)
    assert (growing.now.text, growing.now.ended) == ("a </b> c </SUM", "eos")
    assert growing.now.tokens == [*ids, eos] and len(growing.now.log_probs) == len(ids) + 1
