"""Finding a LoRA adapter in the form of the PEFT library, and its adapter_config.json.

The form is described at huggingface.co/docs/peft, "PEFT checkpoint format".
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_cot_jax.errors import UserError
from llava_cot_jax.files import read_json
from llava_cot_jax.model.checkpoint.folder import fetch, named_folder
from llava_cot_jax.model.checkpoint.forms import ADAPTER_CONFIG, ADAPTER_WEIGHTS, entries_in
from llava_cot_jax.paths import files_in, is_remote

_REFUSED_SETTINGS = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "layer_replication",
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)
"""Settings of PEFT that change what an adapter computes, and that this implementation does not have."""

MERGE_IN_PEFT = "merge it in PEFT with merge_and_unload(), and give the model that this makes as the checkpoint"
"""Remedy for an adapter that cannot be read."""

_STARTS_FROM_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` with which PEFT trains on the base weights as stored. PiSSA changes them."""

FOR_VERIFIER = "llava_cot_verifier"
"""Setting in adapter_config.json, beside PEFT's own, of an adapter that acts on the verifier's question alone."""

PROBE_DIGEST = "llava_cot_verifier_question"
"""Setting in adapter_config.json, beside PEFT's own, of the digest of the question that such an adapter learnt."""

_SAVED_BY_PEFT = {"auto_mapping", "peft_version"}
"""Settings that PEFT writes into every adapter_config.json, and that have no meaning for LoRA."""


@dataclass(frozen=True)
class AdapterSettings:
    """Settings of an adapter that decide what it computes.

    Attributes:
        folder: Folder of the adapter.
        alpha: Scale of its output, which is divided by the rank.
        alpha_pattern: Scales of the modules whose path, or the end of it, matches a regular expression.
        divides_by_root: Whether scales are divided by the square root of the rank instead (rsLoRA, arXiv 2312.03732).
        probe_digest: Digest of the question to the verifier that the adapter was trained for, ``ProbePrompt.digest``;
            None where it is not told, or where the adapter is for all tokens.
        saved_by_peft: Whether PEFT itself wrote the settings, so that it may have trained the adapter.
    """

    folder: Path
    alpha: float
    alpha_pattern: Mapping[str, float]
    divides_by_root: bool
    probe_digest: str | None
    saved_by_peft: bool

    def scale(self, module: str, rank: int) -> float:
        """Return the factor of the output of an adapter of ``rank`` on a module, which is named as PEFT names it."""
        matching = (pattern for pattern in self.alpha_pattern if re.match(rf"(.*\.)?({pattern})$", module))
        pattern = next(matching, None)
        alpha = self.alpha if pattern is None else self.alpha_pattern[pattern]
        return alpha / (math.sqrt(rank) if self.divides_by_root else rank)


def read_adapter_settings(path_or_hub_id: str | Path, *, for_verifier: bool = False) -> AdapterSettings:
    """Find an adapter, fetched from the Hugging Face hub if need be, and read its settings.

    Args:
        path_or_hub_id: Folder with adapter_config.json and adapter_model.safetensors, on a disk or in a bucket, or the
            adapter's id on the hub.
        for_verifier: Whether the adapter is to act on the verifier's question alone, rather than on all tokens.

    Raises:
        UserError: There is no such adapter, or it is none of PEFT's LoRA, or it has a setting that is not supported, or
            it was trained for other tokens.
    """
    named = named_folder(path_or_hub_id)
    folder = named or fetch(str(path_or_hub_id), [ADAPTER_CONFIG, "adapter_model.*"])
    files = files_in(folder)
    if ADAPTER_CONFIG not in files:
        if not is_remote(folder) and (folder / "checkpoints").is_dir():
            raise UserError(
                f"{folder} is the folder of a training run: write its adapter with `llava-cot convert {folder} FOLDER "
                "--for peft`"
            )
        if inner := sorted(path for path in entries_in(folder) if path.endswith(f"/{ADAPTER_CONFIG}")):
            raise UserError(f"{folder} holds its adapters in folders: give one, such as {(folder / inner[0]).parent}")
        raise UserError(f"{folder} holds no {ADAPTER_CONFIG}; is it the folder of an adapter in PEFT's form?")
    config = read_json(folder / ADAPTER_CONFIG)
    settings = _settings(folder, config)
    if bool(config.get(FOR_VERIFIER)) != for_verifier:
        raise UserError(
            f"{folder} was trained for all tokens, not for the verifier's question alone (lora.tokens probe): give it "
            "as --adapter (adapter= in Python)"
            if for_verifier
            else f"{folder} was trained for the verifier's question alone, and would change every answer: give it as "
            "--verifier_adapter (verifier_adapter= in Python)"
        )
    if ADAPTER_WEIGHTS not in files:
        pickle = next(
            (f"{name} is a PyTorch pickle, which is not read; " for name in files if name.endswith(".bin")), ""
        )
        raise UserError(f"{folder} holds no {ADAPTER_WEIGHTS}: {pickle}save it again with PEFT, as safetensors")
    return settings


def _settings(folder: Path, config: Mapping[str, Any]) -> AdapterSettings:
    """Return the settings in an adapter_config.json."""
    place = folder / ADAPTER_CONFIG
    if (kind := config.get("peft_type")) != "LORA":
        raise UserError(f"{place}: peft_type is {kind!r}; only 'LORA' is supported: {MERGE_IN_PEFT}")
    for name in _REFUSED_SETTINGS:
        if config.get(name):
            raise UserError(f"{place}: {name} is {config[name]!r}, which is not supported: {MERGE_IN_PEFT}")
    if (start := config.get("init_lora_weights")) not in _STARTS_FROM_THE_BASE:
        raise UserError(
            f"{place}: init_lora_weights is {start!r}, with which PEFT may change the base model's weights: "
            f"{MERGE_IN_PEFT}; or save it there with path_initial_model_for_weight_conversion"
        )
    try:
        return AdapterSettings(
            folder,
            _alpha(config["lora_alpha"]),
            {re.compile(pattern).pattern: _alpha(a) for pattern, a in (config.get("alpha_pattern") or {}).items()},
            bool(config.get("use_rslora")),
            config.get(PROBE_DIGEST),
            saved_by_peft=not _SAVED_BY_PEFT.isdisjoint(config),
        )
    except re.error as fault:
        raise UserError(f"{place}: alpha_pattern holds no regular expression ({fault})") from None
    except (KeyError, TypeError, ValueError, AttributeError) as fault:
        raise UserError(f"{place}: lora_alpha or alpha_pattern is missing or no number ({fault})") from None


def _alpha(value: Any) -> float:
    """Return a scale as a finite number.

    Raises:
        ValueError: It is none.
    """
    alpha = float(value)
    if not math.isfinite(alpha):
        raise ValueError(f"it is {alpha}")
    return alpha
