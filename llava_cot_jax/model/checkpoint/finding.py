"""Finding a checkpoint: in a folder, in a bucket, on the Hugging Face hub."""

import json
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from llava_cot_jax.errors import UserError
from llava_cot_jax.model.config import Convention, MllamaConfig, read_json
from llava_cot_jax.paths import EMBEDDED, access, as_path, checkpoint_path, files_in, is_remote

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"

COMPANIONS = ("*.json", "*.jinja", "tokenizer*", "*.txt", "LICENSE*", "USE_POLICY*")
"""What lies beside the weights and belongs to them: tokenizer, processor, template, licence."""


def absolute_name(name: str) -> str:
    """``name`` with a path in it made absolute; the package's own model, or an id on the hub, stays what it is."""
    path = as_path(name)
    with access(path):
        is_id = _looks_like_hub_id(name) and not path.exists()
    return name if name == EMBEDDED or is_id else str(path)


def find_checkpoint(path_or_hub_id: str | Path, *, weights: bool = True) -> Path:
    """The folder that ``resolve_checkpoint`` takes, whatever it holds.

    Args:
        path_or_hub_id: as for ``resolve_checkpoint``.
        weights: whether they are fetched from the hub too.

    Raises:
        UserError: no such folder; a bucket or repository that is unknown, closed or out of reach.
    """
    return named_folder(path_or_hub_id) or _fetch(str(path_or_hub_id), weights)


def resolve_checkpoint(path_or_hub_id: str | Path) -> Path:
    """The folder of a checkpoint, fetched from the Hugging Face hub where it is named by its id there.

    Args:
        path_or_hub_id: a folder with config.json and safetensors files, on a disk or in a bucket, or
            ``"organisation/name"``, or ``"shapes"``. Without network the hub's local cache serves.

    Raises:
        UserError: what ``find_checkpoint`` refuses, or a folder without config.json, or without safetensors
            files, or that lacks some of these.
    """
    folder = find_checkpoint(path_or_hub_id)
    if "config.json" not in files_in(folder):
        if not is_remote(folder) and (folder / "checkpoints").is_dir():
            raise UserError(
                f"{folder} is the folder of a training run: make a checkpoint of it with "
                "`python -m llava_cot_jax.convert RUN FOLDER`"
            )
        raise UserError(f"{folder} holds no config.json; is it the folder of a Hugging Face checkpoint?")
    weight_files(folder)
    return folder


def named_folder(path_or_hub_id: str | Path) -> Path | None:
    """The folder that is named, on a disk, in a bucket or in the package; None where it is an id on the hub.

    Raises:
        UserError: neither is there such a folder, nor is it such an id.
    """
    folder = checkpoint_path(path_or_hub_id)
    if is_remote(folder):
        return folder
    with access(folder):
        is_folder, is_file = folder.is_dir(), folder.is_file()
    if is_folder:
        return folder
    if is_file:
        raise UserError(f"{folder} is a file; give the folder that holds it and its config.json")
    if not isinstance(path_or_hub_id, str) or not _looks_like_hub_id(path_or_hub_id):
        raise UserError(f"no such folder: {folder}")
    return None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those that its index names, else all there are.

    Raises:
        UserError: there are none, the index names one that is not there, or there are those of two checkpoints.
    """
    index, there = folder / INDEX_FILE, files_in(folder)
    if INDEX_FILE not in there:
        names = sorted(name for name in there if name.endswith(".safetensors"))
        if SINGLE_FILE in names and len(names) > 1:
            raise UserError(f"{folder} holds {SINGLE_FILE} and other *.safetensors files: keep only one checkpoint's")
        if not names:
            raise UserError(f"{folder} holds no *.safetensors files; other formats of weights are not read")
        return [folder / name for name in names]
    with access(index):
        text = index.read_bytes()
    try:
        names = sorted(set(json.loads(text)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is not the index of a checkpoint: fetch it again") from None
    if SINGLE_FILE in there and SINGLE_FILE not in names:
        raise UserError(f"{folder} holds both {SINGLE_FILE} and {INDEX_FILE}: keep only one checkpoint's files")
    for name in names:
        if name not in there:
            raise UserError(f"{folder / name} does not exist, though {INDEX_FILE} names it: fetch it again")
    return [folder / name for name in names]


def read_config(folder: Path, convention: Convention | None = None) -> MllamaConfig:
    """The configuration of the checkpoint in ``folder``.

    Args:
        folder: with a config.json.
        convention: what the weights were trained with, whatever config.json says; None is what it
            says, and ``"meta"`` where it says nothing.

    Raises:
        UserError: config.json is nothing that ``MllamaConfig`` reads.
    """
    config = MllamaConfig.from_pretrained(folder)
    return config if convention is None else replace(config, convention=convention)


def stated_max_new_tokens(folder: Path) -> int | None:
    """The longest answer, in tokens, that the checkpoint's generation_config.json asks for; None where it does not.

    Raises:
        UserError: the file is no JSON, or the number is none.
    """
    if "generation_config.json" not in files_in(folder):
        return None
    stated = read_json(folder / "generation_config.json").get("max_new_tokens")
    if stated is not None and (type(stated) is not int or stated < 1):
        raise UserError(f"{folder / 'generation_config.json'}: max_new_tokens is {stated!r}, which is no count")
    return stated


def companions(folder: Path) -> list[Path]:
    """The files of ``folder`` that belong to its weights and are neither weights nor their configuration."""
    kept = files_in(folder) - {"config.json", INDEX_FILE}
    return [folder / name for name in sorted(kept) if any(fnmatchcase(name, pattern) for pattern in COMPANIONS)]


def _looks_like_hub_id(name: str) -> bool:
    organisation, slash, rest = name.partition("/")
    named = bool(organisation and slash and rest) and "/" not in rest and name[0] not in ".~"
    return named and not Path(organisation).exists()


def _fetch(hub_id: str, weights: bool) -> Path:
    """The snapshot of a repository of the hub, from the local cache where the network is off."""
    import huggingface_hub
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        IncompleteSnapshotError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    patterns = [*(["*.safetensors"] if weights else []), *COMPANIONS]
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns))
    except IncompleteSnapshotError as fault:
        # A cache filled by another program may lack a licence text and still hold all that is read here.
        return Path(fault.snapshot_path)
    except GatedRepoError:
        raise UserError(
            f"{hub_id} is gated: accept its licence at https://huggingface.co/{hub_id}, then run `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(f"the hub has no {hub_id}, or it is private: check the name, or run `hf auth login`") from None
    except HFValidationError:
        raise UserError(f"no such folder, nor a valid name of the hub: {hub_id}") from None
    except LocalEntryNotFoundError:
        raise UserError(
            f"there is no folder {as_path(hub_id)}, and taken for an id of the hub, {hub_id} is not in the local cache "
            "and the hub cannot be reached: give a local folder, or go online"
        ) from None
    except OSError as fault:  # the hub's HTTP errors are of this kind too
        raise UserError(f"cannot fetch {hub_id} from the hub: {str(fault).splitlines()[0]}") from None
