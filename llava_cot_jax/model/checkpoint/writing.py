"""Writing of checkpoints that transformers and this package read: tensor by tensor, and whole or not at all."""

import contextlib
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from llava_cot_jax.errors import UserError
from llava_cot_jax.files import copy_file, synced_file, write_json
from llava_cot_jax.model.checkpoint.faulty_numbers import is_finite
from llava_cot_jax.model.checkpoint.folder import INDEX_FILE, SINGLE_FILE
from llava_cot_jax.model.checkpoint.generation_settings import GENERATION_FILE, complete_end_tokens
from llava_cot_jax.model.checkpoint.reading import DTYPE_TENSOR, SAFETENSORS_DTYPES
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.paths import bucket_filesystem, check_folder_writable, is_remote, reading_errors, writing_errors

MAX_FILE_BYTES = 5_000_000_000
"""Largest number of bytes of tensors in a file, by default."""

_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """Description of a tensor to be written.

    Attributes:
        name: Published name of the tensor.
        shape: Shape of the tensor.
        dtype: Dtype of the tensor: float32, float16 or bfloat16.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_checkpoint(
    folder: Path,
    config: MllamaConfig,
    entries: Sequence[TensorEntry],
    values: Iterable[np.ndarray],
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    extra_files: Sequence[Path] = (),
) -> None:
    """Write a checkpoint with one safetensors file, or with several and their index.

    On a disk, all is written into a hidden folder beside ``folder``, which is then renamed. In a bucket, which cannot
    rename a folder, all is written to its place, config.json last. So a killed process or a full disk leaves nothing
    that could be taken for a checkpoint.

    Args:
        folder: Folder to write, on a disk or in a bucket. It must be empty or not exist.
        config: Configuration to write as config.json.
        entries: Descriptions of all tensors, in the order of ``values``.
        values: The tensors. Each is taken after the one before it is written.
        max_file_bytes: Largest number of bytes of tensors in a file. A larger tensor gets a file of its own.
        extra_files: Files to copy too.

    Raises:
        UserError: ``folder`` is not empty, or it cannot be written (a full disk, no permission, no bucket), or a
            tensor holds numbers that are not finite.
    """
    groups = _divide_into_files(entries, max_file_bytes)
    count = len(groups)
    names = [SINGLE_FILE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    with new_folder(folder, sum(entry.nbytes for entry in entries)) as partial:
        remaining = iter(values)
        for name, group in zip(names, groups, strict=True):
            write_tensors(partial / name, group, remaining)
        if count > 1:
            write_json(partial / INDEX_FILE, _index(names, groups))
        for extra in extra_files:
            copy_file(extra, partial / extra.name)
            if extra.name == GENERATION_FILE:
                complete_end_tokens(partial / extra.name, config.text.eos_token_ids)
        dtype = next(entry.dtype for entry in entries if entry.name == DTYPE_TENSOR)
        write_json(partial / "config.json", config.to_dict(dtype.name))


def _divide_into_files(entries: Sequence[TensorEntry], max_file_bytes: int) -> list[list[TensorEntry]]:
    """Divide tensors, in order, into files. A new file begins where a tensor no longer fits into the last one."""
    groups: list[list[TensorEntry]] = []
    room = 0
    for entry in entries:
        if not groups or entry.nbytes > room:
            groups.append([])
            room = max_file_bytes
        groups[-1].append(entry)
        room -= entry.nbytes
    return groups


def _index(names: Sequence[str], groups: Sequence[Sequence[TensorEntry]]) -> dict[str, object]:
    """Return the content of the index: which file holds each tensor."""
    total = sum(entry.nbytes for group in groups for entry in group)
    places = {entry.name: name for name, group in zip(names, groups, strict=True) for entry in group}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}


def new_folder(folder: Path, nbytes: int) -> contextlib.AbstractContextManager[Path]:
    """Give a folder to write into, which becomes ``folder`` if the block succeeds, and is deleted otherwise.

    Args:
        folder: Folder to write, on a disk or in a bucket. It must be empty or not exist.
        nbytes: Number of bytes that will be written.

    Raises:
        UserError: ``folder`` is not empty, or it cannot be written (a full disk, no permission, no bucket).
    """
    return _new_folder_in_bucket(folder) if is_remote(folder) else _new_folder_on_disk(folder, nbytes)


@contextlib.contextmanager
def _new_folder_on_disk(folder: Path, nbytes: int) -> Iterator[Path]:
    """Give a hidden folder beside ``folder`` that takes its place if the block succeeds, and is deleted otherwise."""
    folder = folder.resolve()  # so that a symbolic link is kept
    with reading_errors(folder):
        check_folder_writable(folder.parent)
        is_taken = folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
    if is_taken:
        raise UserError(f"{folder} exists and is not empty: name another folder, or remove it")
    partial = folder.with_name(f".{folder.name}.partial")
    with writing_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.mkdir()
        except FileExistsError:
            raise UserError(f"{partial} is being written, or is left from a run that was killed: remove it") from None
        try:
            if nbytes > (free := shutil.disk_usage(partial).free):
                raise UserError(f"{folder} needs {nbytes / 1e9:.1f} GB; its disk has {free / 1e9:.1f} GB free")
            yield partial
            partial.rename(folder)  # this replaces an empty folder
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _new_folder_in_bucket(folder: Path) -> Iterator[Path]:
    """Give ``folder`` itself, whose files are deleted if the block fails."""
    with writing_errors(folder):
        if bucket_filesystem().exists(str(folder)):
            raise UserError(f"{folder} exists and is not empty: name another folder, or remove it")
        try:
            yield folder
        except BaseException:
            with contextlib.suppress(Exception):
                bucket_filesystem().rm(str(folder), recursive=True)
            raise


def write_tensors(path: Path, entries: Sequence[TensorEntry], values: Iterator[np.ndarray]) -> None:
    """Write a safetensors file of the tensors that ``entries`` describe, taken from the head of ``values``."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers 4 refuses a file without it
    position = 0
    for entry in entries:
        offsets = [position, position + entry.nbytes]
        header[entry.name] = {
            "dtype": _DTYPE_NAMES[entry.dtype],
            "shape": entry.shape,
            "data_offsets": offsets,
        }
        position = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the first tensor to 8 bytes
    with synced_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            _write_value(file, entry, next(values))  # no variable keeps the tensor while the next is made


def _write_value(file: BinaryIO, entry: TensorEntry, value: np.ndarray) -> None:
    if value.shape != entry.shape or value.dtype != entry.dtype:
        raise ValueError(f"{entry.name} should be {entry.dtype} {entry.shape}, got {value.dtype} {value.shape}")
    value = np.ascontiguousarray(value)
    if not is_finite(value):
        raise UserError(f"{entry.name} holds numbers that are not finite in {entry.dtype}: no checkpoint is written")
    file.write(value.reshape(-1).view(np.uint8).data)
