"""Settings of generation in a checkpoint: the tokens that end an answer, and those that are not honoured here."""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from llava_cot_jax.errors import UserError
from llava_cot_jax.files import read_json, write_json
from llava_cot_jax.paths import files_in, reading_errors

GENERATION_FILE = "generation_config.json"

END_TOKENS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
"""Control tokens of Llama 3's tokenizer that end an answer: that of a text, of a message and of a turn."""

_NEUTRAL_SETTINGS: dict[str, Any] = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "constraints": None,
    "diversity_penalty": 0.0,
    "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "forced_bos_token_id": None,
    "forced_decoder_ids": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1.0,
    "max_length": 20,
    "max_time": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "min_p": 0.0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "penalty_alpha": 0.0,
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "repetition_penalty": 1.0,
    "sequence_bias": None,
    "stop_strings": None,
    "suppress_tokens": None,
    "top_h": None,
    "typical_p": 1.0,
    "watermarking_config": None,
}
"""Settings of transformers' generation that are not honoured here, each with the value by which it has no effect.

``max_new_tokens``, ``temperature``, ``top_k`` and ``top_p`` are the user's to choose, so they are not among them.
"""


def end_token_ids(folder: Path) -> tuple[int, ...]:
    """Return the tokens that end an answer by a checkpoint's generation_config.json or its tokenizer.

    The tokenizer's are its ``eos_token``, and those of ``END_TOKENS`` that it has as special tokens.

    Raises:
        UserError: generation_config.json is not JSON, or its ``eos_token_id`` is no token id.
    """
    names = files_in(folder)
    stated = read_json(folder / GENERATION_FILE) if GENERATION_FILE in names else {}
    found = check_token_ids(stated.get("eos_token_id"), f"{folder / GENERATION_FILE}: eos_token_id")
    return tuple(dict.fromkeys((*found, *_tokenizer_end_ids(folder, names))))


def check_token_ids(value: Any, where: str) -> tuple[int, ...]:
    """Return the token ids of a setting that is an id, a list of ids, or null.

    Args:
        value: Value of the setting.
        where: Name of the setting, for the error.

    Raises:
        UserError: It is something else.
    """
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if not all(type(token) is int and token >= 0 for token in ids):
        raise UserError(f"{where} is {value!r}; it must be the id of a token, or a list of ids")
    return ids


def complete_end_tokens(path: Path, ids: Collection[int]) -> None:
    """Add the end tokens that a generation_config.json lacks. One that has them all stays as it is."""
    stated = read_json(path)
    named = check_token_ids(stated.get("eos_token_id"), f"{path}: eos_token_id")
    if missing := [token for token in ids if token not in named]:
        write_json(path, stated | {"eos_token_id": [*named, *missing]})


def ignored_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of generation that a checkpoint's files ask for and that are not honoured here, by name.

    They stand in generation_config.json, or, as transformers 4 wrote them, in config.json.

    Raises:
        UserError: One of the files is not JSON.
    """
    names = files_in(folder)
    sections: list[Mapping[str, Any]] = []
    if "config.json" in names:
        config = read_json(folder / "config.json")
        sections += [config.get("text_config") or {}, config]
    if GENERATION_FILE in names:
        sections.append(read_json(folder / GENERATION_FILE))
    stated = {name: value for section in sections for name, value in section.items() if name in _NEUTRAL_SETTINGS}
    return {name: value for name, value in stated.items() if value not in (None, [], {}, _NEUTRAL_SETTINGS[name])}


def _tokenizer_end_ids(folder: Path, names: set[str]) -> list[int]:
    """Return the end tokens of a tokenizer. One that is missing or damaged has none here; the processor refuses it."""
    if not {"tokenizer.json", "tokenizer_config.json"} <= names:
        return []
    try:
        end = read_json(folder / "tokenizer_config.json").get("eos_token")
        named = end["content"] if isinstance(end, dict) else end  # transformers 4 wrote some as objects
        added = {token["content"]: token for token in _added_tokens(folder / "tokenizer.json")}
        if named is None or named in added:
            known = {name: token["id"] for name, token in added.items()}
        else:
            known = read_json(folder / "tokenizer.json")["model"]["vocab"]
        ends = [known[named]] if named in known else []
        return [*ends, *(added[name]["id"] for name in END_TOKENS if name in added and added[name]["special"])]
    except (KeyError, TypeError, ValueError, UserError):
        return []


def _added_tokens(path: Path) -> list[dict[str, Any]]:
    """Return the added tokens of a tokenizer.json without parsing its vocabulary, which takes a third of a second.

    Raises:
        UserError: There is no access to the file.
        ValueError: It is not JSON.
    """
    with reading_errors(path):
        text = path.read_bytes()
    # A vocabulary has this name, if at all, as that of a number.
    place = re.search(rb'"added_tokens"\s*:\s*(?=\[)', text)
    if not place:
        return []
    found: list[dict[str, Any]] = json.JSONDecoder().raw_decode(text[place.end() :].decode())[0]
    return found
