"""Writing a checkpoint that transformers and this package read: tensor by tensor, and whole or not at all."""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from llava_cot_jax.errors import UserError
from llava_cot_jax.model.checkpoint.finding import INDEX_FILE, SINGLE_FILE, companions
from llava_cot_jax.model.checkpoint.reading import (
    DTYPE_TENSOR,
    FORMAT_DTYPES,
    OnProgress,
    StoredTensor,
    read_shards,
    verified_tensors,
)
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.paths import access, bucket_files, check_folder_can_be_made, is_remote

MAX_FILE_BYTES = 5_000_000_000
_FORMAT_NAMES = {dtype: name for name, dtype in FORMAT_DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor that is to be written.

    Attributes:
        name: its published name.
        shape: its shape.
        dtype: float32, float16 or bfloat16.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def convert_checkpoint(
    source: Path,
    destination: Path,
    config: MllamaConfig,
    *,
    dtype: np.dtype | None = None,
    on_progress: OnProgress | None = None,
) -> None:
    """Write ``source``'s weights under published names, one tensor in memory at a time, and carry its companions along.

    Args:
        source: the folder of a checkpoint.
        destination: the folder to make; it must not exist, or be empty.
        config: what to write as config.json; of the same shapes as the source's.
        dtype: of the weights written; None keeps each tensor's own.
        on_progress: called after each tensor.

    Raises:
        UserError: both folders are one; or anything that ``verified_tensors`` or ``write_checkpoint`` refuses.
    """
    if os.path.realpath(destination) == os.path.realpath(source):  # of paths in a bucket too
        raise UserError(f"{destination} is the checkpoint that is to be converted: name another folder for the result")
    stored = verified_tensors(source, config)
    entries = [Entry(name, tensor.shape, dtype or tensor.dtype) for name, tensor in stored.items()]
    total = sum(entry.nbytes for entry in entries)

    def values() -> Iterator[np.ndarray]:
        done = 0
        for entry in entries:
            yield read_whole(stored[entry.name], entry.dtype)
            done += entry.nbytes
            if on_progress:
                on_progress(done, total)

    write_checkpoint(destination, config, entries, values(), extra_files=companions(source))


def read_whole(tensor: StoredTensor, dtype: np.dtype) -> np.ndarray:
    """All of a tensor, in ``dtype``."""
    value = np.empty(tensor.shape, dtype)
    read_shards(tensor, {tuple((0, size) for size in tensor.shape): value})
    return value


def write_checkpoint(
    folder: Path,
    config: MllamaConfig,
    entries: Sequence[Entry],
    values: Iterable[np.ndarray],
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    extra_files: Sequence[Path] = (),
) -> None:
    """Write a checkpoint of one safetensors file, or of several and their index.

    Everything is written into a hidden folder beside, which is then renamed; in a bucket, where nothing
    can be, into the folder itself. config.json comes last: a kill or a full disk leaves nothing that
    could pass for a checkpoint.

    Args:
        folder: where, on a disk or in a bucket; it must not exist, or be empty.
        config: what config.json is to say.
        entries: every tensor, in the order of ``values``.
        values: the tensors, each asked for when the one before is written.
        max_file_bytes: bytes of tensors in a file at most; a larger tensor has a file of its own.
        extra_files: files to copy along.

    Raises:
        UserError: ``folder`` is not empty, or it cannot be written (a full disk, no permission, no bucket).
    """
    groups = _group(entries, max_file_bytes)
    count = len(groups)
    names = [SINGLE_FILE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    begin = _in_bucket if is_remote(folder) else _on_disk
    with begin(folder, sum(entry.nbytes for entry in entries)) as partial:
        remaining = iter(values)
        for name, group in zip(names, groups, strict=True):
            _write_tensors(partial / name, group, remaining)
        if count > 1:
            _write_json(partial / INDEX_FILE, _index(names, groups))
        for extra in extra_files:
            (partial / extra.name).write_bytes(extra.read_bytes())
        dtype = next(entry.dtype for entry in entries if entry.name == DTYPE_TENSOR)
        _write_json(partial / "config.json", config.to_dict(dtype.name))


def _group(entries: Sequence[Entry], max_file_bytes: int) -> list[list[Entry]]:
    """``entries`` in order, cut before each that would not fit into the file of those before it."""
    groups: list[list[Entry]] = []
    room = 0
    for entry in entries:
        if not groups or entry.nbytes > room:
            groups.append([])
            room = max_file_bytes
        groups[-1].append(entry)
        room -= entry.nbytes
    return groups


def _index(names: Sequence[str], groups: Sequence[Sequence[Entry]]) -> dict[str, object]:
    total = sum(entry.nbytes for group in groups for entry in group)
    places = {entry.name: name for name, group in zip(names, groups, strict=True) for entry in group}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}


@contextlib.contextmanager
def _on_disk(folder: Path, nbytes: int) -> Iterator[Path]:
    """A hidden folder beside ``folder`` that takes its place when the block ends well, and else is deleted."""
    folder = folder.resolve()  # a symbolic link that is named stays one
    partial = folder.with_name(f".{folder.name}.partial")
    with access(folder):
        check_folder_can_be_made(folder.parent)
        is_taken = folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
    if is_taken:
        raise UserError(f"{folder} exists and is not empty: name another folder, or remove it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except FileExistsError:
        raise UserError(f"{partial} is being written, or is left from a run that was killed: remove it") from None
    except OSError as fault:
        raise UserError(f"cannot write {folder}: {fault.strerror}") from None
    try:
        if nbytes > (free := shutil.disk_usage(partial).free):
            raise UserError(f"{folder} needs {nbytes / 1e9:.1f} GB; its disk has {free / 1e9:.1f} GB free")
        yield partial
        partial.rename(folder)  # onto an empty folder too
    except OSError as fault:
        raise UserError(f"cannot write {folder} ({nbytes / 1e9:.1f} GB): {fault.strerror or fault}") from fault
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _in_bucket(folder: Path, nbytes: int) -> Iterator[Path]:
    """``folder`` itself; all in it is deleted where the block does not end well."""
    with access(folder):
        if bucket_files().exists(str(folder)):
            raise UserError(f"{folder} exists and is not empty: name another folder, or remove it")
        try:
            yield folder
        except BaseException:
            with contextlib.suppress(Exception):
                bucket_files().rm(str(folder), recursive=True)
            raise


def _write_tensors(path: Path, entries: Sequence[Entry], values: Iterator[np.ndarray]) -> None:
    """A safetensors file of ``entries``, their values taken from the head of ``values``."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers 4 refuses a file without it
    position = 0
    for entry in entries:
        offsets = [position, position + entry.nbytes]
        header[entry.name] = {
            "dtype": _FORMAT_NAMES[entry.dtype],
            "shape": entry.shape,
            "data_offsets": offsets,
        }
        position = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the first tensor to 8 bytes
    with _new_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            _write_value(file, entry, next(values))  # no name here holds it while the next is made


def _write_value(file: BinaryIO, entry: Entry, value: np.ndarray) -> None:
    if value.shape != entry.shape or value.dtype != entry.dtype:
        raise ValueError(f"{entry.name} should be {entry.dtype} {entry.shape}, got {value.dtype} {value.shape}")
    file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)


def _write_json(path: Path, value: dict[str, object]) -> None:
    with _new_file(path) as file:
        file.write(json.dumps(value, indent=2).encode() + b"\n")


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """A file whose bytes are on the disk when the block ends, so that a crash after the rename finds them there."""
    with path.open("wb") as file:
        yield file
        if not is_remote(path):  # a bucket has them once the file is closed
            file.flush()
            os.fsync(file.fileno())
