"""Recognition of weights in other forms than a Hugging Face checkpoint of Llama-3.2-Vision in safetensors files.

What is recognised by the names of files and by config.json is refused before any weights are fetched or read.
"""

import contextlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from llava_cot_jax.errors import UserError
from llava_cot_jax.files import read_json
from llava_cot_jax.paths import is_remote

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""Names of the two files of an adapter in the form of the PEFT library."""

_SAVE_AS_SAFETENSORS = (
    "save it as safetensors, with `MllamaForConditionalGeneration.from_pretrained(FOLDER).save_pretrained(NEW)` in "
    "transformers"
)
_TAKE_UNQUANTIZED = (
    "give the checkpoint that it was made from, in float32, float16 or bfloat16; `generate --quantize int8` quantizes "
    "that one while loading"
)

_OTHER_FILES: tuple[tuple[str, str, str], ...] = (
    (
        r"consolidated\..*\.pth|original/consolidated\..*\.pth",
        "is in Meta's own format",
        "take its form for Hugging Face, such as meta-llama/Llama-3.2-11B-Vision-Instruct, or make it with "
        "convert_mllama_weights_to_hf.py of transformers",
    ),
    (
        r".*\.gguf",
        "is a GGUF file, as llama.cpp reads",
        "give the checkpoint in Hugging Face form that it was made from",
    ),
    (
        r"zero_to_fp32\.py|global_step\d+/?.*|.*_zero_pp_rank_.*|.*zero.*_optim_states\.pt|.*mp_rank_\d+_model_states\.pt",
        "is of a DeepSpeed checkpoint",
        "join its shards with the zero_to_fp32.py beside it, and give the folder of the result with its config.json",
    ),
    (
        r".*\.distcp|pytorch_model_fsdp_\d+.*",
        "is of a sharded PyTorch (FSDP) checkpoint",
        "join it with `accelerate merge-weights`, and give the folder of the result with its config.json",
    ),
    (
        r"(.*/)?(manifest\.ocdbt|_CHECKPOINT_METADATA|_METADATA)|.*\.orbax-checkpoint.*",
        "is of an Orbax checkpoint",
        "give a folder in Hugging Face form; that of a training run is written with `llava-cot convert RUN FOLDER`",
    ),
    (
        r"model_world_size_\d+_rank_\d+\.pt",
        "is of a sharded PyTorch (FSDP) checkpoint of verl",
        "join it with `python -m verl.model_merger merge`, and give the folder of the result",
    ),
    (
        r".*\.(incomplete|crdownload|part|aria2)",
        "is of a download that has not ended",
        "fetch the checkpoint again",
    ),
    (r"openvino_.*", "is of an OpenVINO program", "give the checkpoint in Hugging Face form that it was made from"),
    (r"flax_model.*\.msgpack(\.index\.json)?", "holds weights for Flax in transformers", _SAVE_AS_SAFETENSORS),
    (r"tf_model.*\.h5(\.index\.json)?", "holds weights for TensorFlow", _SAVE_AS_SAFETENSORS),
    (r".*\.onnx", "is an ONNX program", "give the checkpoint in Hugging Face form that it was made from"),
    (r"(.*\.(bin|pt|pth|ckpt|pkl))(\.index\.json)?", "holds PyTorch pickles, which are not read", _SAVE_AS_SAFETENSORS),
)
"""Patterns of names of files that are no safetensors, what a file of such a name is, and what to do about it."""

_NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*|random_states.*)\.(bin|pt|pth|pkl)")
"""Pattern of the names of PyTorch files that a training writes beside its weights."""

_QUANTIZATION_FILES = {"hf_quant_config.json", "quantize_config.json", "quant_config.json"}
"""Names of files that ModelOpt, GPTQ and AWQ write beside quantized weights."""

_QUANTIZED_NAME = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|weight_packed|weight_scale(_2|_inv)?|weight_zero_point|(input|k|v)_scale|absmax"
    r"|quant_map|SCB|W_q|weight\.(absmax|quant_map|nested_absmax|quant_state\..*)|weight:.*)$"
)
"""Pattern of the names of tensors that only quantized weights have."""

_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer", "modules_to_save"}
"""Parts of names that wrappers of modules in PyTorch and PEFT add anywhere, and that no tensor of the model has."""


def check_form(where: str | Path, names: Collection[str], config: Mapping[str, Any] | None) -> None:
    """Check that weights are in the form that is read, as far as names of files and config.json tell.

    Args:
        where: Folder, or id on the hub, for the error.
        names: Names of its files, those in its folders with their paths; or, of folders, the name and a slash.
        config: Content of config.json, if there is one.

    Raises:
        UserError: The weights are in another form. The message says what they are and what to do.
    """
    if "model_index.json" in names:
        raise UserError(f"{where} is a pipeline of the diffusers library, not a Llama-3.2-Vision model: give another")
    if config is not None:
        _check_config(where, config)
    if beside := _QUANTIZATION_FILES.intersection(names):
        raise UserError(
            f"{where} holds quantized weights (it has a {min(beside)}), which are not read: {_TAKE_UNQUANTIZED}"
        )
    if any(name.endswith(".safetensors") and "/" not in name and not is_adapter(name) for name in names):
        return
    if ADAPTER_CONFIG in names or any("/" not in name and is_adapter(name) for name in names):
        raise UserError(
            f"{where} is an adapter, not a whole model: give its base model as the checkpoint, and this with --adapter"
        )
    if steps := {int(found[1]) for name in names if (found := re.match(r"checkpoint-(\d+)/", name))}:
        raise UserError(
            f"{where} is the output folder of a trainer: give one of its checkpoints, such as "
            f"{where}/checkpoint-{max(steps)}"
        )
    if snapshots := sorted(name for name in names if re.fullmatch(r"snapshots/[^/]+", name)):
        raise UserError(f"{where} is a folder of the hub's cache: give the checkpoint in it, {where}/{snapshots[-1]}")
    for pattern, form, remedy in _OTHER_FILES:
        for name in sorted(names):
            if re.fullmatch(pattern, name) and not _NO_WEIGHTS.fullmatch(name):
                raise UserError(f"{where} holds no safetensors files: {name} {form}; {remedy}")
    if inner := sorted({name.rpartition("/")[0] for name in names if name.endswith(".safetensors")}):
        raise UserError(f"{where} holds its safetensors files in {', '.join(inner)}: give that folder")


def _check_config(where: str | Path, config: Mapping[str, Any]) -> None:
    """Check that config.json is of a Llama-3.2-Vision model that is not quantized."""
    if (kind := config.get("model_type")) != "mllama":
        names = "names no model_type" if kind is None else f"is of a {kind!r} model, not of 'mllama'"
        raise UserError(f"{where} is no Llama-3.2-Vision model: its config.json {names}")
    text = config.get("text_config")
    for section in (config, text if isinstance(text, Mapping) else {}):
        for key in ("quantization_config", "compression_config", "quantization"):
            if found := section.get(key):
                method = found.get("quant_method") if isinstance(found, Mapping) else None
                by = f" by {method}" if method else ""
                raise UserError(
                    f"{where} holds quantized weights{by} ({key} in its config.json), which are not read: "
                    f"{_TAKE_UNQUANTIZED}"
                )


def is_adapter(name: str) -> bool:
    """Whether a file of this name holds the weights of an adapter, which may lie beside those of a whole model."""
    return name.startswith("adapter_") and name.endswith((".safetensors", ".bin"))


def entries_in(folder: Path) -> set[str]:
    """Return the names in the folders of a folder, with their paths; none of deeper folders, none in a bucket."""
    found: set[str] = set()
    for path in [] if is_remote(folder) else folder.iterdir():
        with contextlib.suppress(OSError):  # a folder that may not be read tells nothing
            if path.is_dir() and not path.name.startswith("."):
                found |= {f"{path.name}/", *(f"{path.name}/{inner.name}" for inner in path.iterdir())}
    return found


def check_folder(folder: Path, files: Collection[str]) -> None:
    """Check the form of the weights in a folder that has these files, as ``check_form`` does.

    Raises:
        UserError: The weights are in another form, or the folder belongs to a training run.
    """
    has_weights = any(name.endswith(".safetensors") for name in files)
    if not is_remote(folder) and not has_weights:
        _check_not_of_a_run(folder, files)
    config = read_json(folder / "config.json") if "config.json" in files else None
    check_form(folder, files if has_weights else {*files, *entries_in(folder)}, config)


def _check_not_of_a_run(folder: Path, files: Collection[str]) -> None:
    """Check that a folder is neither that of a training run of this package nor one within it."""
    for run in (folder, *list(folder.parents)[:3]):
        is_run = (run / "config.yaml").exists() or (run == folder and "config.json" not in files)
        if is_run and (run / "checkpoints").is_dir():
            raise UserError(
                f"{folder} is {'' if run == folder else 'within '}the folder of a training run: write a checkpoint of "
                f"it with `python -m llava_cot_jax.convert {run} FOLDER`"
            )


def describe_tensors(names: Iterable[str], dtypes: Iterable[str]) -> str:
    """Return what tensors are that do not belong to the model, and what to do; nothing if they are not known.

    Args:
        names: Names of tensors that the model does not have.
        dtypes: Names of dtypes of tensors in their safetensors files that weights may not have.
    """
    found, kinds = list(names), set(dtypes)
    if "F64" in kinds:
        return "there are weights in float64: save it in float32, float16 or bfloat16"
    quantized = sorted(kinds - {"BOOL", "I64"})
    if quantized or any(_QUANTIZED_NAME.search(name) for name in found):
        return f"its weights are quantized{f' ({quantized[0]})' if quantized else ''}: {_TAKE_UNQUANTIZED}"
    if any(".lora_A." in name or ".lora_B." in name for name in found):
        return "its adapters are not merged: merge them with merge_and_unload() of PEFT before saving"
    if any(name.endswith(("_flat_param", ".flat_param")) for name in found):
        return "its tensors are shards of a PyTorch (FSDP) training: save the full state dict instead"
    if any("tok_embeddings" in name or ".feed_forward.w1" in name for name in found):
        return (
            "its tensors have the names of Meta's own format: take the form for Hugging Face, or make it with "
            "convert_mllama_weights_to_hf.py of transformers"
        )
    return ""


def unwrap_names(stored: list[str], expected: Collection[str], published: Callable[[str], str]) -> dict[str, str]:
    """Return the published name of each stored one, without what wrappers of a training put before or into it.

    A prefix that all names share, such as ``module.`` or ``base_model.model.``, is taken off where every name is then
    one of the model's, or every tensor of the model is then there. Where there is no such prefix, no name changes but
    by ``published``.

    Args:
        stored: Names in the files.
        expected: Names of the model's tensors.
        published: Function that turns a name of any version of transformers into the published one.
    """
    plain = {name: published(name) for name in stored}
    if not stored or set(plain.values()) <= set(expected):
        return plain
    bare = {name: [part for part in name.split(".") if part not in _WRAPPERS] for name in stored}
    first, *others = bare.values()
    shared = 0
    while all(len(parts) > shared + 1 and parts[shared] == first[shared] for parts in (first, *others)):
        shared += 1
    for count in range(shared + 1):
        found = {name: published(".".join(parts[count:])) for name, parts in bare.items()}
        if set(found.values()) <= set(expected) or set(found.values()) >= set(expected):
            return found
    return plain
