"""Tests of the index of lengths: built once, saved, and never mistaken for that of other data."""

import json
from dataclasses import replace

import numpy as np
import pytest

from llava_cot_jax.data import index as index_module
from llava_cot_jax.data.chat import Chat, SkippedConversation
from llava_cot_jax.data.index import Index
from llava_cot_jax.data.rows import Turn
from llava_cot_jax.data.settings import ChatSettings
from llava_cot_jax.errors import UserError
from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.processing.tokenizer import make_tokenizer
from tests.data.rows import Noise, demo_processor
from tests.demo import CORPUS, VOCAB_SIZE, demo_config

SETTINGS = ChatSettings(max_length=150)


class Flawed(Noise):
    """Rows of which every eleventh contains a special token."""

    def turns(self, index):
        return super().turns(index) if index % 11 else (Turn("a", "<|eot_id|>"),)


def open_index(folder, rows=None, settings=SETTINGS, processor=None, **more) -> Index:
    return Index.open(rows or Flawed(1200), processor or demo_processor(), settings, folder, **more)


def test_the_lengths_are_those_of_the_rows(tmp_path):
    calls = []
    index = open_index(tmp_path, on_progress=lambda *counts: calls.append(counts))
    chat = Chat(demo_processor(), SETTINGS)
    for i in range(0, 1200, 7):
        try:
            assert index.lengths[i] == len(chat.encode(Flawed(1200).turns(i)).ids)
            assert i not in index.skipped
        except SkippedConversation as reason:
            assert index.lengths[i] == 0
            assert index.skipped[i] == str(reason)
    assert calls[-1] == (1200, 1200) and len(calls) > 1
    skipped = np.count_nonzero(index.lengths == 0)
    assert 110 < skipped < 600  # special tokens, and answers that are too long
    assert f"{skipped} of 1200 rows skipped" in index.summary()
    assert "110: the text of a message contains the special token" in index.summary()
    assert "does not fit into 150 tokens" in index.summary()


class Varied(Noise):
    """Rows with 0, 1 or 2 images in turn, and a second turn in every fifth."""

    def turns(self, index):
        first = replace(super().turns(index)[0], images=index % 3)
        return (first,) if index % 5 else (first, Turn("And now?", "red " * 200))


def test_it_counts_images_and_turns_that_are_cut(tmp_path):
    for _ in range(2):  # built, then read
        index = open_index(tmp_path, Varied(30, words=(3,), fingerprint="varied"), ChatSettings(max_length=150))
        assert index.images.tolist() == [0, 1, 2] * 10
        assert index.cut_turns.tolist() == [1, 0, 0, 0, 0] * 6
        summary = "10 with 0 images; 10 with 1 image; 10 with 2 images; 6 rows lose 6 turns at their end; 0 of 30 rows"
        assert index.summary().startswith(summary)
    assert open_index(tmp_path, Noise(30)).summary() == "0 of 30 rows skipped"


@pytest.mark.slow
def test_an_index_that_cannot_be_kept_is_used_all_the_same(tmp_path, warnings_of):
    (tmp_path / "file").write_text("")
    kept = open_index(tmp_path)
    for folder in (None, tmp_path / "file/index"):
        assert np.array_equal(open_index(folder).lengths, kept.lengths)
    assert [message.split(":")[0] for message in warnings_of.messages] == [
        f"counts of tokens cannot be kept in {tmp_path}/file/index"
    ]


def test_it_is_built_once(tmp_path, monkeypatch):
    built = open_index(tmp_path)
    monkeypatch.setattr(index_module, "Chat", None)  # nothing can be counted any more
    again = open_index(tmp_path)
    assert np.array_equal(again.lengths, built.lengths) and again.skipped == built.skipped


@pytest.mark.slow
def test_whatever_the_lengths_depend_on_makes_another_index(tmp_path):
    tokenizer = make_tokenizer(CORPUS[:-3], VOCAB_SIZE)
    templated = make_tokenizer(CORPUS, VOCAB_SIZE)
    templated.chat_template += "{# the same otherwise #}"
    others = [
        {},
        {"rows": Flawed(1200, fingerprint="other")},
        {"settings": replace(SETTINGS, max_length=151)},
        {"settings": replace(SETTINGS, variant="conclusion")},
        {"settings": replace(SETTINGS, upstream_quirks=True)},
        {"settings": replace(SETTINGS, max_images=1)},
        {"settings": replace(SETTINGS, text_only=False)},
        {"processor": Processor(demo_config(tokenizer), tokenizer)},
        {"processor": Processor(demo_config(templated), templated)},
    ]
    assert len({open_index(tmp_path, **other).fingerprint for other in others}) == len(others)
    assert len(list(tmp_path.iterdir())) == len(others)


@pytest.mark.parametrize("damage", ["", "{}", "[1]", '{"lengths": 3}', "short", "foreign"])
def test_a_damaged_one_is_built_anew(tmp_path, damage):
    rows = Noise(30)
    built = open_index(tmp_path, rows)
    (file,) = tmp_path.iterdir()
    whole = json.loads(file.read_text())
    edits = {"short": whole | {"lengths": whole["lengths"][:-1]}, "foreign": whole | {"fingerprint": "x"}}
    file.write_text(json.dumps(edits[damage]) if damage in edits else damage)
    assert np.array_equal(open_index(tmp_path, rows).lengths, built.lengths)
    assert json.loads(file.read_text()) == whole


def test_nothing_to_train_on(tmp_path):
    with pytest.raises(UserError, match=r"none of the 5 rows can be trained on: 5 of 5 rows skipped; 5: .* 9 tokens"):
        open_index(tmp_path, Noise(5), ChatSettings(max_length=9))
