"""Tests of the package's tokenizer: made from the package alone, one token per word, Llama 3's chat format."""

import json
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from llava_cot_jax.data.shapes.rows import ShapesRows
from llava_cot_jax.data.shapes.tokenizer import VOCAB_SIZE, shapes_config, shapes_tokenizer, train_tokenizer
from llava_cot_jax.model.checkpoint.auxiliary_files import write_auxiliary_files
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.model.parameters import parameters
from llava_cot_jax.paths import BUNDLED_MODEL_FOLDER
from llava_cot_jax.processing.messages import user_turn
from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.stage_format import STAGES

TEXTS = [
    text
    for split in ("train", "validation", "test")
    for rows in [ShapesRows(split, seed=5, size=400)]
    for i in range(400)
    for turn in rows.turns(i)
    for text in (turn.question, turn.answer)
]


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor(shapes_config(), shapes_tokenizer())


def test_the_shipped_files_are_those_that_the_code_makes(tmp_path: Path) -> None:
    """All files are compared but the weights, which ``tests/evidence/shapes_model.py`` makes."""
    write_auxiliary_files(tmp_path, shapes_config(), train_tokenizer(), "float32", generation={"max_new_tokens": 128})
    made, shipped = (
        {path.name: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}
        for folder in (tmp_path, BUNDLED_MODEL_FOLDER)
    )
    assert {path.name for path in BUNDLED_MODEL_FOLDER.iterdir()} == {*made, "model.safetensors"}
    # Each version of transformers writes more or less of its own into this file.
    theirs, ours = made.pop("tokenizer_config.json"), shipped.pop("tokenizer_config.json")
    for name in ("bos_token", "eos_token", "pad_token", "chat_template", "clean_up_tokenization_spaces"):
        assert theirs[name] == ours[name]
    assert made == shipped
    assert MllamaConfig.from_pretrained(BUNDLED_MODEL_FOLDER) == shapes_config()


def test_layout_of_the_vocabulary() -> None:
    tokenizer = shapes_tokenizer()
    assert sorted(tokenizer.get_vocab().values()) == list(range(VOCAB_SIZE + 1))
    assert tokenizer.convert_tokens_to_ids("<|image|>") == VOCAB_SIZE
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|begin_of_text|>", "<|eot_id|>")


def test_every_word_is_one_token() -> None:
    """Llama 3 separates letters from digits, so that the name of a cell has two tokens."""
    tokenizer = shapes_tokenizer()
    words = {word for text in TEXTS for word in re.findall(r" ?[A-Za-z]+|\d", text)}
    words |= {" response", " choose", "Response", "correct", "incorrect", *"0123456789"}
    assert len(words) > 55
    assert {word: tokenizer.tokenize(word) for word in words if len(tokenizer.tokenize(word)) > 1} == {}
    assert tokenizer.tokenize(" b2 two") == ["Ġb", "2", "Ġtwo"]


def test_tags_are_text_in_llama_3_s_pieces() -> None:
    """Tags are cut as in cl100k and Llama 3: a space with the bracket, the name, the bracket with the blank line."""
    tokenizer = shapes_tokenizer()
    for stage in STAGES:
        assert tokenizer.tokenize(f"<{stage}> red </{stage}>\n\n<") == [
            *(f"<{stage}", ">", "Ġred", "Ġ</", stage, ">ĊĊ", "<"),
        ]
        assert tokenizer.tokenize(f" b2 </{stage}>") == ["Ġb", "2", "Ġ</", stage, ">"]


def test_texts_survive() -> None:
    tokenizer = shapes_tokenizer()
    for text in {*TEXTS, "naïve 北京 🦙 1234567!\n\n  end "}:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert max(ids) < VOCAB_SIZE - 11 and tokenizer.decode(ids) == text


def test_conversations_are_short(processor: Processor) -> None:
    rows = ShapesRows("validation")
    lengths = []
    for i in range(0, 1000, 3):
        messages = []
        for k, turn in enumerate(rows.turns(i)):
            messages += [*user_turn(turn.question, images=int(k == 0)), {"role": "assistant", "content": turn.answer}]
        text = processor.prompt(messages, add_generation_prompt=False)
        assert text.count("<|eot_id|>") == 2 * len(rows.turns(i))
        lengths.append(len(processor.tokenizer.encode(text, add_special_tokens=False)))
    assert np.mean(lengths) < 100 and max(lengths) < 230


def test_pickle(processor: Processor) -> None:
    copy = pickle.loads(pickle.dumps(processor))
    assert copy.tokenizer.encode(TEXTS[1]) == shapes_tokenizer().encode(TEXTS[1])


def test_pictures_pass_as_they_are(processor: Processor) -> None:
    rows = [ShapesRows("train")[i] for i in (0, 1)]
    batch = processor(["<|image|>"] * 2, [row.images for row in rows])
    assert batch["pixel_values"].shape == (2, 1, 1, 3, 48, 48)
    for pixels, row in zip(batch["pixel_values"], rows, strict=True):
        np.testing.assert_array_equal(pixels[0, 0].transpose(1, 2, 0), np.asarray(row.images[0]))


def test_the_model_is_small(processor: Processor) -> None:
    assert 0.7e6 < sum(math.prod(p.shape) for p in parameters(processor.config, "stacked").values()) < 1.5e6


@pytest.mark.slow
def test_the_model_sees_the_picture(processor: Processor) -> None:
    rows = [ShapesRows("train")[i] for i in (0, 1)]
    prompts = [processor.prompt(user_turn(rows[0].turns[0].question, images=1))] * 2
    batch = processor(prompts, [row.images for row in rows])
    logits = np.asarray(Mllama(processor.config, rngs=nnx.Rngs(0), layout="stacked")(**batch))
    assert logits.shape == (*batch["input_ids"].shape, VOCAB_SIZE) and np.isfinite(logits).all()
    assert np.abs(logits[0, -1] - logits[1, -1]).max() > 0.01
