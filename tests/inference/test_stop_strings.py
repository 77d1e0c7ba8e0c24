"""Tables over a vocabulary against a search in the decoded text, whatever the tokens."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_cot_jax.data.shapes.tokenizer import shapes_config, shapes_tokenizer
from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.stop_strings import (
    TAILS,
    case_insensitive,
    compile_stop_table,
    string_automaton,
    tag_automaton,
    vocabulary_bytes,
)
from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.search import tables as tables_module
from llava_cot_jax.search.prompts import JudgePrompts
from llava_cot_jax.search.request_builder import RequestBuilder
from llava_cot_jax.search.strategies import StageBeam
from llava_cot_jax.search.tables import build_judge_tables, build_stage_tables, token_ids, vocabulary_of
from llava_cot_jax.stage_format import STAGES
from tests.search.models import tagged_processor

CASES = 3000
FILLERS = [
    "",
    " ",
    "\n",
    "\n\n",
    "\n\n\n",
    "<",
    "</",
    "</SUMM",
    "SUMMARY>",
    "</CAPTION>",
    "I see 2 < 3.",
    "猫在看",
    " é",
    ".",
]


@pytest.fixture(scope="module")
def embedded() -> Processor:
    return Processor(shapes_config(), shapes_tokenizer())


@pytest.fixture(params=["llama3", "embedded"])
def processor(request, published, embedded) -> Processor:
    return published if request.param == "llama3" else embedded


def random_split(text: bytes, entries: dict[bytes, int], rng: np.random.Generator) -> list[int]:
    """The text in any tokens that spell it, long ones and short ones."""
    ids, start = [], 0
    while start < len(text):
        fits = [end for end in range(start + 1, min(len(text), start + 14) + 1) if text[start:end] in entries]
        end = int(rng.choice(fits))
        ids.append(entries[text[start:end]])
        start = end
    return ids


def random_text(rng: np.random.Generator, parts: list[str]) -> bytes:
    return "".join(rng.choice(parts) for _ in range(rng.integers(1, 7))).encode()


@pytest.mark.slow
def test_tags_are_found_where_the_decoded_bytes_have_them(processor):
    """The state counts the line breaks after a tag in the token that completes it, and until then the tag's bytes."""
    tag = b"</SUMMARY>"
    entries = vocabulary_bytes(processor.tokenizer, processor.config.text.vocab_size, processor.control_tokens)
    (table,), accept = compile_stop_table([(tag_automaton(tag), TAILS)], entries)
    by_bytes = {entry: i for i, entry in enumerate(entries) if entry}
    rng, closed = np.random.default_rng(0), 0
    for _ in range(CASES):
        ids = random_split(random_text(rng, [*FILLERS, tag.decode(), f" {tag.decode()}\n\n"]), by_bytes, rng)
        state, so_far = 0, b""
        for token in ids:
            state, so_far = int(table[state, token]), so_far + entries[token]
            if tag in so_far:
                tail = so_far.partition(tag)[2]
                breaks = len(tail) - len(tail.rstrip(b"\n"))
                assert state == accept + min(breaks, 2)
                closed += 1
                break
            longest = max(n for n in range(len(tag)) if so_far.endswith(tag[:n]))
            assert state == longest
    assert CASES / 4 < closed < CASES


@pytest.mark.slow
def test_written_verdicts_are_found_where_the_decoded_text_has_them(processor):
    """The first of two, in any case; one that stands within the other is not it."""
    readings = ["verdict: correct", "verdict: incorrect", "correct", "incorrect"]
    entries = vocabulary_bytes(processor.tokenizer, processor.config.text.vocab_size, processor.control_tokens)
    automaton = case_insensitive(string_automaton([reading.encode() for reading in readings[2:]]))
    (table,), accept = compile_stop_table([(automaton, 2)], entries)
    by_bytes = {entry: i for i, entry in enumerate(entries) if entry}
    rng, found = np.random.default_rng(1), [0, 0]
    for _ in range(CASES):
        parts = ["In", "correct", "incorr", "in", " ", "INCORRECT", "Correct", "orrect", "c", "is wrong"]
        ids = random_split(random_text(rng, parts), by_bytes, rng)
        state = 0
        for token in ids:
            state = int(table[min(state, accept - 1), token]) if state < accept else state
        text = b"".join(entries[token] for token in ids).decode().lower()
        first = re.search("(in)?correct", text)
        assert (state - accept if state >= accept else None) == (None if first is None else int(bool(first[1])))
        if first:
            found[bool(first[1])] += 1
    assert min(found) > CASES / 10


@settings(max_examples=200, deadline=None)
@given(
    strings=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3, unique=True),
    text=st.text("abc", max_size=30),
)
def test_any_strings_in_any_text(strings, text):
    """The automaton alone: the first to be complete, the longest of those complete at once."""
    table = string_automaton([s.encode() for s in strings])
    state = 0
    for byte in text.encode():
        state = int(table[state, byte])
    accept = len(table) - len(strings)
    want = None
    for end in range(len(text) + 1):
        if complete := [s for s in strings if text[:end].endswith(s)]:
            want = strings.index(max(complete, key=len))
            break
    assert (state - accept if state >= accept else None) == want


def test_special_tokens_are_no_text(published):
    entries = vocabulary_bytes(published.tokenizer, 128256, published.control_tokens)
    assert entries[128009] == b"" and entries[271] == b"\n\n"
    for i in range(0, 128000, 97):
        text = published.tokenizer.decode([i])
        assert "\ufffd" in text or entries[i] == text.encode()  # a part of a character cannot be decoded alone


def test_in_llama3s_vocabulary_a_tag_ends_within_a_token(published):
    """The case that a search for the tag's own tokens misses."""
    ids = published.tokenizer("It is. </SUMMARY>\n\n<CAPTION>", add_special_tokens=False)["input_ids"]
    plain = published.tokenizer(" </SUMMARY>", add_special_tokens=False)["input_ids"]
    assert not any(ids[i : i + len(plain)] == plain for i in range(len(ids)))
    tables = build_stage_tables(published, StageBeam().to_spec(), vocabulary_of(published))
    state = 0
    for token in ids:
        state = int(tables.stop_tables[0, state, token])
        if state >= tables.num_states:
            break
    assert state == tables.num_states + 2
    assert published.tokenizer.decode([token]) == ">\n\n"


def test_a_stage_that_is_closed_for_the_model_reads_as_one_it_closed(processor):
    """Whatever of the tag stands there, the rest is added; and the next stage stands after one blank line."""
    tables = build_stage_tables(processor, StageBeam().to_spec(), vocabulary_of(processor))
    for number, stage in enumerate(STAGES):
        tag = f"</{stage}>"
        for state in range(len(tag)):
            rest = decoded(processor, tables.closings[number, state])
            assert tag[:state] + rest == ("" if state else " ") + tag + "\n\n"
        for tail in range(TAILS):
            assert decoded(processor, tables.closings[number, tables.num_states + tail]) == ""
            assert "\n" * tail + decoded(processor, tables.openings[number, tail]) == f"\n\n<{stage}>"


def decoded(processor, piece) -> str:
    return processor.decode(piece.tokens[: piece.lengths])


def test_what_an_end_token_of_the_configuration_alone_adds_is_what_is_decoded():
    """The tokenizer calls it a part of a text."""
    processor = tagged_processor()
    token = processor.tokenizer.get_added_vocab()["</SUMMARY>"]
    for ends in ((), (token,)):
        text = replace(processor.config.text, eos_token_ids=(*processor.config.text.eos_token_ids, *ends))
        processor = Processor(replace(processor.config, text=text), processor.tokenizer)
        tables = build_stage_tables(processor, StageBeam().to_spec(), vocabulary_of(processor))
        assert (processor.decode([token]) == "") == (tables.stop_tables[0, 0, token] == 0) == bool(ends)


@pytest.mark.parametrize("stages", [STAGES, ("PLAN", "REASONING", "CONCLUSION")], ids=len)
def test_both_verdicts_are_the_natural_next_token(processor, stages):
    prompts = JudgePrompts.load()
    spec = StageBeam(stages=stages).to_spec()
    one, two = build_judge_tables(processor, spec, spec.judge, prompts, vocabulary_of(processor)).verdicts.tolist()
    for stage in stages:
        *_, ending = prompts.split(processor, "pair", stage, stages, images=1)
        before = token_ids(processor, ending + prompts.stem)
        assert token_ids(processor, ending + prompts.stem + "1") == [*before, one]
        assert token_ids(processor, ending + prompts.stem + "2") == [*before, two]


def test_a_tokenizer_that_is_not_byte_level_is_refused(embedded):
    tokenizer = shapes_tokenizer()
    tokenizer.get_vocab = lambda: {"▁the": 300}
    with pytest.raises(UserError, match="not byte-level"):
        vocabulary_bytes(tokenizer, 512, ())


@pytest.mark.parametrize("strings", [[], [b""], [b"a", b""]], ids=str)
def test_nothing_to_look_for(strings):
    with pytest.raises(UserError, match="must not be empty"):
        string_automaton(strings)


@pytest.mark.slow
def test_a_tag_that_is_too_long():
    with pytest.raises(UserError, match="too long"):
        compile_stop_table([(tag_automaton(b"x" * 300), TAILS)], [b"a"])


def test_a_search_reads_the_vocabulary_once(processor, monkeypatch):
    """Its stages and its judge have stop tables of the same vocabulary."""
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return vocabulary_bytes(*arguments)

    monkeypatch.setattr(tables_module, "vocabulary_bytes", counted)
    RequestBuilder(processor, StageBeam())
    assert len(calls) == 1
