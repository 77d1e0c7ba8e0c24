"""Tokenizers built like Llama 3's, and a checkpoint with one that transformers loads without a murmur."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, GenerationConfig, MllamaForConditionalGeneration

from llava_cot_jax.errors import UserError
from llava_cot_jax.model.config import CLIP_MEAN, CLIP_STD, MllamaConfig
from llava_cot_jax.processing.messages import user_turn
from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.processing.tokenizer import make_tokenizer
from tests.demo import CORPUS, VOCAB_SIZE, write_demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    write_demo(folder)
    return folder


def test_transformers_loads_it(demo: Path) -> None:
    model, info = MllamaForConditionalGeneration.from_pretrained(demo, output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.text_config.cross_attention_layers == [3, 8]
    generation = GenerationConfig.from_pretrained(demo)
    assert (generation.do_sample, generation.temperature, generation.top_p) == (True, 0.6, 0.9)
    config = MllamaConfig.from_pretrained(demo)
    assert tuple(generation.eos_token_id) == config.text.eos_token_ids
    # Its answer depends on the picture and on the question.
    processor = Processor.from_pretrained(demo)
    picture = Image.open(demo / "picture.png")
    pictures = [picture, picture, Image.new("RGB", picture.size, "red")]
    prompts = [
        processor.prompt(user_turn(question, images=1)) for question in ("Is it red?", "Is it blue?", "Is it red?")
    ]
    batch = processor(prompts, [[each] for each in pictures])
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    inputs = {name: torch.from_numpy(value).long() for name, value in batch.items()}
    inputs["pixel_values"] = torch.from_numpy((batch["pixel_values"].astype(np.float32) / 255 - mean) / std)
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1]
    assert 0.3 < logits.std() < 5
    assert (logits[0] - logits[1]).abs().max() > 0.05 and (logits[0] - logits[2]).abs().max() > 0.05


def test_tokenizer(demo: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo)
    assert len(tokenizer) == VOCAB_SIZE + 1 and tokenizer.convert_tokens_to_ids("<|image|>") == VOCAB_SIZE
    assert sorted(tokenizer.get_vocab().values()) == list(range(VOCAB_SIZE + 1))
    text = "<SUMMARY> The red square's left, naïve 北京 🦙 1234567! </SUMMARY>\n\n  end "
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id and ids.count(ids[0]) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    # Digits in threes, words with the space before them, and the merges of the corpus are in use.
    assert tokenizer.tokenize(" triangle square") == ["Ġtriangle", "Ġsquare"]
    assert [len(piece) for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("1234567")] == [
        3,
        3,
        1,
    ]


def test_make_tokenizer() -> None:
    tokenizer = make_tokenizer(iter(CORPUS), 300)
    assert tokenizer.convert_tokens_to_ids(["<|begin_of_text|>", "<|python_tag|>", "<|image|>"]) == [289, 299, 300]
    few = make_tokenizer(["ab ab"], 280)
    assert few.convert_tokens_to_ids(["ab", "<|begin_of_text|>"]) == [256, 258]  # 257 is " ab"
    assert few.convert_tokens_to_ids("<|reserved_special_token_13|>") == 279
    with pytest.raises(UserError, match="at least 267 entries, not 266"):
        make_tokenizer(CORPUS, 266)
