"""The demo: a whole checkpoint, the same bytes every time, that transformers loads without a murmur."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from transformers import AutoTokenizer, GenerationConfig, MllamaForConditionalGeneration

from llava_cot_jax import cli
from llava_cot_jax.data.messages import user_turn
from llava_cot_jax.data.processor import Processor
from llava_cot_jax.data.tokenizer import make_tokenizer
from llava_cot_jax.demo import CORPUS, VOCAB_SIZE, main, write_demo
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.config import CLIP_MEAN, CLIP_STD, MllamaConfig

FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "picture.png",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    write_demo(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_bytes_every_time(demo: Path, tmp_path: Path) -> None:
    """In another process, too, with strings hashed another way."""
    command = [sys.executable, "-m", "llava_cot_jax.demo", str(tmp_path)]
    result = subprocess.run(
        command, check=True, capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": "7"}
    )
    assert result.stdout == f"wrote a random checkpoint and picture.png to {tmp_path}\n"
    assert contents(tmp_path) == contents(demo) and set(contents(demo)) == FILES


def test_another_seed_gives_other_weights_alone(demo: Path, tmp_path: Path) -> None:
    write_demo(tmp_path, seed=1)
    first, second = contents(demo), contents(tmp_path)
    assert {name for name in FILES if first[name] != second[name]} == {"model.safetensors"}


def test_weights(demo: Path) -> None:
    weights = load_file(demo / "model.safetensors")
    assert 1e6 < sum(w.size for w in weights.values()) < 3e6
    assert {w.dtype for w in weights.values()} == {np.dtype(np.float32)}
    assert weights["language_model.model.embed_tokens.weight"].shape == (VOCAB_SIZE + 8, 128)
    assert abs(weights["language_model.lm_head.weight"].std() - 0.1) < 0.005
    assert (weights["language_model.model.layers.3.cross_attn_attn_gate"] != 0).all()
    assert not np.array_equal(
        weights["language_model.model.layers.0.self_attn.q_proj.weight"],
        weights["language_model.model.layers.1.self_attn.q_proj.weight"],
    )
    assert (demo / "model.safetensors").stat().st_mode & 0o044 == (demo / "config.json").stat().st_mode & 0o044


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


def test_an_earlier_demo_may_be_replaced(demo: Path, tmp_path: Path) -> None:
    write_demo(tmp_path, seed=5)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "config.json").unlink()
    write_demo(tmp_path)
    assert contents(tmp_path) == contents(demo) | {"notes.txt": b"mine"}


@pytest.mark.parametrize("theirs", ["config.json", "README.md"])
def test_anything_else_is_left_alone(
    tmp_path: Path, theirs: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / theirs).write_text("# Precious")
    with pytest.raises(UserError, match="is not empty, and not an earlier demo"):
        write_demo(tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert contents(tmp_path) == {theirs: b"# Precious"}


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        write_demo(tmp_path / "file")
