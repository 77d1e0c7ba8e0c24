"""End tokens of a checkpoint whose files name different ones, and settings of generation that are not honoured."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llava_cot_jax.errors import UserError
from llava_cot_jax.model.checkpoint.generation_settings import ignored_settings
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.paths import BUNDLED_MODEL_FOLDER

END_OF_TEXT, EOM, EOT = 465, 472, 473


def edit(path: Path, change: dict[str, Any], section: str | None = None) -> None:
    """Change the object of a JSON file, or a section of it."""
    content = json.loads(path.read_text())
    (content[section] if section else content).update(change)
    path.write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The package's model, whose config.json names one end token only."""
    copy = Path(shutil.copytree(BUNDLED_MODEL_FOLDER, tmp_path / "model"))
    edit(copy / "config.json", {"eos_token_id": END_OF_TEXT}, "text_config")
    return copy


def ends(folder: Path) -> tuple[int, ...]:
    return MllamaConfig.from_pretrained(folder).text.eos_token_ids


def test_the_tokenizer_alone_names_the_others(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    assert ends(folder) == (END_OF_TEXT, EOT, EOM)


def test_an_end_token_of_the_tokenizer_that_is_no_control_token(folder: Path) -> None:
    """Text of that spelling ends nothing, but the tokenizer's own ``eos_token`` does, as an object too."""
    (folder / "generation_config.json").unlink()
    edit(folder / "tokenizer_config.json", {"eos_token": {"content": "<|eom_id|>"}})
    content = json.loads((folder / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["special"] = token["content"] not in ("<|eot_id|>", "<|eom_id|>")
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert ends(folder) == (END_OF_TEXT, EOM)


def test_the_vocabulary_is_parsed_only_for_an_end_token_that_stands_in_it(folder: Path) -> None:
    """It takes a third of a second for Llama's. Here it is no JSON, or holds the token."""
    (folder / "generation_config.json").unlink()
    tokenizer = folder / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    word = next(word for word, token in content["model"]["vocab"].items() if token == 300)
    tokenizer.write_text(json.dumps({"added_tokens": content["added_tokens"]})[:-1] + ', "model": ...')
    assert ends(folder) == (END_OF_TEXT, EOT, EOM)
    edit(folder / "tokenizer_config.json", {"eos_token": word})
    for order in (("model", "added_tokens"), ("added_tokens", "model")):
        tokenizer.write_text(json.dumps({name: content[name] for name in order}, indent=2))
        assert ends(folder) == (END_OF_TEXT, 300, EOM, EOT)


def test_no_end_token_in_the_vocabulary(folder: Path) -> None:
    for name in ("generation_config.json", "tokenizer.json"):
        (folder / name).unlink()
    edit(folder / "config.json", {"eos_token_id": [9999]}, "text_config")
    with pytest.raises(
        UserError, match=r"names no end token within its vocabulary of \d+ \(\[9999\]\), so that no answer"
    ):
        ends(folder)
    edit(folder / "config.json", {"eos_token_id": [9999, EOT]}, "text_config")
    assert ends(folder) == (9999, EOT)


@pytest.mark.parametrize(("stated", "found"), [(7, (7,)), ([7, EOM], (7, EOM)), (None, ())])
def test_generation_config_alone_names_the_others(folder: Path, stated: object, found: tuple[int, ...]) -> None:
    edit(folder / "generation_config.json", {"eos_token_id": stated})
    (folder / "tokenizer.json").unlink()
    assert ends(folder) == (END_OF_TEXT, *found)


@pytest.mark.parametrize("wrong", ["<|eot_id|>", [7, -1], 1.5, True])
def test_what_is_no_token_id(folder: Path, wrong: object) -> None:
    edit(folder / "generation_config.json", {"eos_token_id": wrong})
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id is .*must be the id of a token"):
        ends(folder)


ASKED = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "bad_words_ids": [[5]], "forced_eos_token_id": 7}
NEUTRAL = {"num_beams": 1, "min_length": 0, "length_penalty": 1.0, "stop_strings": None, "suppress_tokens": []}


def test_settings_that_are_not_honoured(folder: Path) -> None:
    assert ignored_settings(folder) == {}
    edit(folder / "generation_config.json", ASKED | NEUTRAL)
    edit(folder / "config.json", {"repetition_penalty": 1.0, "typical_p": 0.9})
    edit(folder / "config.json", {"max_length": 20, "min_length": 5}, "text_config")
    assert ignored_settings(folder) == {**ASKED, "typical_p": 0.9}


def test_they_are_named_once(folder: Path, warnings_of: pytest.LogCaptureFixture) -> None:
    Mllama.from_pretrained(folder)
    assert not warnings_of.messages
    edit(folder / "generation_config.json", ASKED)
    Mllama.from_pretrained(folder)
    (line,) = warnings_of.messages
    assert line.endswith(
        "not honoured here: repetition_penalty = 1.3, no_repeat_ngram_size = 3, bad_words_ids = [[5]], "
        "forced_eos_token_id = 7"
    )
