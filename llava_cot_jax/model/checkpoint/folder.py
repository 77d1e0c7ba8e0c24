"""The folder of a checkpoint: finding it on a disk, in a bucket or on the Hugging Face hub, and what lies in it."""

import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from llava_cot_jax.errors import UserError
from llava_cot_jax.files import read_json
from llava_cot_jax.model.checkpoint.forms import ADAPTER_CONFIG, check_folder, check_form, is_adapter
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.convention import Convention, find_convention
from llava_cot_jax.paths import BUNDLED_MODEL, as_path, checkpoint_path, files_in, is_remote, reading_errors

_LOG = logging.getLogger(__name__)

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"

AUXILIARY_PATTERNS = ("*.json", "*.jinja", "tokenizer*", "*.txt", "LICENSE*", "USE_POLICY*")
"""Patterns of the names of files that belong to the weights: tokenizer, image settings, chat template, licence."""


def absolute_name(name: str) -> str:
    """Return the name of a checkpoint with its path made absolute.

    The bundled model's name and the id of a checkpoint on the hub stay as they are.
    """
    path = as_path(name)
    with reading_errors(path):
        is_id = _looks_like_hub_id(name) and not path.exists()
    return name if name == BUNDLED_MODEL or is_id else str(path)


def find_checkpoint(path_or_hub_id: str | Path, *, weights: bool = True) -> Path:
    """Return the folder of a checkpoint, fetched from the hub if need be. What lies in it is not checked.

    Args:
        path_or_hub_id: The checkpoint, named as for ``resolve_checkpoint``.
        weights: Whether the weights are fetched from the hub too.

    Raises:
        UserError: There is no such folder, or a bucket or repository is unknown, closed or out of reach.
    """
    if folder := named_folder(path_or_hub_id):
        return folder
    hub_id = str(path_or_hub_id)
    if not weights:
        return fetch(hub_id, AUXILIARY_PATTERNS)
    _check_form_on_hub(hub_id)
    return fetch(hub_id, ["*.safetensors", *AUXILIARY_PATTERNS])


def resolve_checkpoint(path_or_hub_id: str | Path) -> Path:
    """Return the folder of a checkpoint that has weights, fetched from the Hugging Face hub if need be.

    Args:
        path_or_hub_id: A folder with config.json and safetensors files, on a disk or in a bucket; or the checkpoint's
            id on the hub, ``"organisation/name"``; or ``"shapes"``, the bundled model. Without a network, the hub's
            local cache is used.

    Raises:
        UserError: There is no such checkpoint, or its weights are in another form, or its folder lacks config.json or
            safetensors files.
    """
    folder = find_checkpoint(path_or_hub_id)
    files = files_in(folder)
    check_folder(folder, files)
    if "config.json" not in files:
        raise UserError(f"{folder} holds no config.json; is it the folder of a Hugging Face checkpoint?")
    weight_files(folder)
    if ADAPTER_CONFIG in files:
        _note_adapter(folder)
    return folder


@functools.cache  # once for each folder
def _note_adapter(folder: Path) -> None:
    _LOG.warning(
        "%s holds an adapter beside a whole model: the adapter is not used; --adapter %s adds it", folder, folder
    )


def named_folder(path_or_hub_id: str | Path) -> Path | None:
    """Return the folder that is named, on a disk, in a bucket or in the package, or None for an id on the hub.

    Raises:
        UserError: There is no such folder, and the name cannot be an id on the hub.
    """
    folder = checkpoint_path(path_or_hub_id)
    if is_remote(folder):
        return folder
    with reading_errors(folder):
        is_folder, is_file = folder.is_dir(), folder.is_file()
    if is_folder:
        return folder
    if is_file:
        raise UserError(f"{folder} is a file; give the folder that holds it and its config.json")
    if not isinstance(path_or_hub_id, str) or not _looks_like_hub_id(path_or_hub_id):
        raise UserError(f"no such folder: {folder}")
    return None


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint: those that its index names, or all if it has no index.

    Raises:
        UserError: There are none, the index names one that does not exist, or there are files of two checkpoints.
    """
    index, present = folder / INDEX_FILE, files_in(folder)
    if INDEX_FILE not in present:
        names = sorted(name for name in present if name.endswith(".safetensors") and not is_adapter(name))
        if SINGLE_FILE in names and len(names) > 1:
            raise UserError(f"{folder} holds {SINGLE_FILE} and other *.safetensors files: keep only one checkpoint's")
        if not names:
            raise UserError(f"{folder} holds no *.safetensors files; other formats of weights are not read")
        return [folder / name for name in names]
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        others = [name for name in names if not name.endswith(".safetensors")]
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is not the index of a checkpoint: fetch it again") from None
    if others:
        raise UserError(
            f"{index} names {others[0]}, which is no safetensors file: save the checkpoint as safetensors, with "
            "`MllamaForConditionalGeneration.from_pretrained(FOLDER).save_pretrained(NEW)` in transformers"
        )
    if SINGLE_FILE in present and SINGLE_FILE not in names:
        raise UserError(f"{folder} holds both {SINGLE_FILE} and {INDEX_FILE}: keep only one checkpoint's files")
    for name in names:
        if name not in present:
            raise UserError(f"{folder / name} does not exist, though {INDEX_FILE} names it: fetch it again")
    return [folder / name for name in names]


def read_config(folder: Path, convention: Convention | None = None) -> MllamaConfig:
    """Read the configuration of a checkpoint.

    Args:
        folder: Folder of the checkpoint.
        convention: Convention that the weights were trained with. None takes the one that
            ``convention.find_convention`` finds, and warns where config.json does not state it.

    Raises:
        UserError: ``MllamaConfig.from_pretrained`` refuses config.json.
    """
    config = MllamaConfig.from_pretrained(folder)
    if convention is not None:
        return replace(config, convention=convention)
    if doubt := find_convention(read_json(folder / "config.json"))[1]:
        _LOG.warning(
            f"the convention {config.convention!r} is assumed, because config.json in {folder} {doubt}: "
            "name the right one by --convention, or convention= in Python (see configs/README.md)"
        )
    return config


def read_max_new_tokens(folder: Path) -> int | None:
    """Return ``max_new_tokens`` of a checkpoint's generation_config.json, or None if it is not stated.

    Raises:
        UserError: The file is not JSON, or the value is not a positive integer.
    """
    if "generation_config.json" not in files_in(folder):
        return None
    stated = read_json(folder / "generation_config.json").get("max_new_tokens")
    if stated is not None and (type(stated) is not int or stated < 1):
        path = folder / "generation_config.json"
        raise UserError(f"{path}: max_new_tokens is {stated!r}; it must be a positive integer")
    return stated


def _looks_like_hub_id(name: str) -> bool:
    """Whether a name may be an id on the hub, "organisation/name"."""
    organisation, slash, rest = name.partition("/")
    has_its_form = bool(organisation and slash and rest) and "/" not in rest and name[0] not in ".~"
    return has_its_form and not Path(organisation).exists()


def fetch(hub_id: str, patterns: Sequence[str]) -> Path:
    """Fetch files of a repository on the hub, or find them in the local cache if there is no network.

    Args:
        hub_id: Id of the repository, "organisation/name".
        patterns: Patterns of the names of the files.

    Returns:
        The folder that holds them.

    Raises:
        UserError: The repository is unknown, closed or out of reach.
    """
    import huggingface_hub
    from huggingface_hub.errors import IncompleteSnapshotError

    with _hub_errors(hub_id):
        try:
            return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(patterns)))
        except IncompleteSnapshotError as fault:
            # A cache that another program filled may lack only a licence text, which is not read here.
            return Path(fault.snapshot_path)


def _check_form_on_hub(hub_id: str) -> None:
    """Check the form of the weights in a repository before they are fetched, where the hub can be reached.

    Raises:
        UserError: The weights are in another form.
    """
    import huggingface_hub

    try:
        names = {file.rfilename for file in huggingface_hub.model_info(hub_id).siblings or ()}
        config = huggingface_hub.hf_hub_download(hub_id, "config.json") if "config.json" in names else None
    except Exception:
        return  # the fetch that follows finds the checkpoint in the local cache, or says what is wrong
    check_form(hub_id, names, read_json(Path(config)) if config else None)


@contextmanager
def _hub_errors(hub_id: str) -> Iterator[None]:
    """Turn the errors of the hub into a ``UserError`` that names the repository and the remedy."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        yield
    except GatedRepoError:
        raise UserError(
            f"{hub_id} is gated: accept its licence at https://huggingface.co/{hub_id}, then run `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(f"the hub has no {hub_id}, or it is private: check the name, or run `hf auth login`") from None
    except HFValidationError:
        raise UserError(f"no such folder, and not a valid id on the hub: {hub_id}") from None
    except LocalEntryNotFoundError:
        raise UserError(
            f"there is no folder {as_path(hub_id)}, and as an id on the hub, {hub_id} is not in the local cache, and "
            "the hub cannot be reached: give a local folder, or go online"
        ) from None
    except OSError as fault:  # the HTTP errors of huggingface_hub are ``OSError``s
        raise UserError(f"cannot fetch {hub_id} from the hub: {str(fault).splitlines()[0]}") from None
