"""Reading of safetensors files on a disk or in a bucket: their headers, and any slices of their tensors.

Nothing here knows of devices. ``sharded_loading.py`` makes arrays from what this module reads.
"""

import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from llava_cot_jax.checks import shown
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.checkpoint.faulty_numbers import NumberCheck
from llava_cot_jax.model.checkpoint.folder import weight_files
from llava_cot_jax.model.checkpoint.forms import describe_tensors, unwrap_names
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.parameters import parameters
from llava_cot_jax.paths import bucket_filesystem, is_remote, reading_errors

TensorSlice = tuple[tuple[int, int], ...]
"""Slice of a tensor: (start, stop) along each axis."""

DTYPE_TENSOR = "language_model.lm_head.weight"
"""Name of the tensor whose dtype is taken as the checkpoint's."""

SAFETENSORS_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Dtypes that weights may have, by their names in a safetensors header."""

_BLOCK_BYTES = 2 << 20
"""Bytes of a tensor that are read at once, then cast and checked: about a core's cache."""

_REQUEST_BYTES = 8 << 20
"""Bytes per request to a bucket: enough that their transfer takes longer than the wait for the first of them."""

_REQUESTS = 16
"""Number of requests to a bucket at the same time."""

_MAX_HEADER_BYTES = 100_000_000
"""Largest header that the safetensors format allows, in bytes."""

_LFS_POINTER = b"version https://git-lfs"
"""Beginning of a file that stands for one which Git LFS has not fetched."""

_MAX_FAULTS = 20
"""Number of faults of a checkpoint that an error message names."""

_NEWER_NAMES = {
    "lm_head.": "language_model.lm_head.",
    "model.language_model.": "language_model.model.",
    "model.vision_model.": "vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
"""Prefixes of tensor names that newer versions of transformers write, with the published ones."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file.

    Attributes:
        name: Name of the tensor: the published one, or, from ``read_header``, that in the file.
        file: File that holds the tensor.
        offset: Position of the tensor's first byte in the file.
        shape: Shape of the tensor, whose elements are in row-major order.
        dtype_name: Name of the dtype in the file. For a tensor of ``locate_tensors``, a key of ``SAFETENSORS_DTYPES``.
    """

    name: str
    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype_name: str

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the tensor."""
        return SAFETENSORS_DTYPES[self.dtype_name]


_overflow_ignored = np.errstate(over="ignore")
"""Decorator by which a cast makes infinity of a number that is too large without a warning; the loader names it."""


@_overflow_ignored
def read_slices(
    tensor: StoredTensor, arrays: Mapping[TensorSlice, np.ndarray], check: NumberCheck | None = None
) -> int:
    """Read slices of a tensor into arrays, cast to each array's dtype. No byte is read twice.

    Args:
        tensor: Tensor to read.
        arrays: C-contiguous arrays to fill, by the slice that each takes. Along axis 0, two slices are equal or do not
            overlap.
        check: Check to which the numbers are added, while they are in a core's cache. None checks nothing.

    Returns:
        Number of bytes read. For a file in a bucket it exceeds that of narrow slices, because the bytes between their
        rows are read too rather than requested apart.

    Raises:
        UserError: The file is shorter than its header says, or cannot be read.
    """
    if is_remote(tensor.file):
        return _read_from_bucket(tensor, arrays, check)
    count = 0
    with tensor.file.open("rb", buffering=0) as file:
        for bounds, slices in _group_into_reads(arrays):
            in_place = len(slices) == 1 and arrays[bounds].dtype == tensor.dtype
            (first, last), *inner = bounds
            rows = max(1, _BLOCK_BYTES // max(1, math.prod(slice_shape(inner)) * tensor.dtype.itemsize))
            for start in range(first, last, rows):
                stop = min(start + rows, last)
                parts = {span: arrays[span][start - first : stop - first] for span in slices}
                shape = (stop - start, *slice_shape(inner))
                block = parts[bounds] if in_place else np.empty(shape, tensor.dtype)
                count += _read_slice(file.fileno(), tensor, ((start, stop), *inner), block)
                for span, part in parts.items():
                    if not in_place:
                        within = [slice(a - low, b - low) for (a, b), (low, _) in zip(span[1:], inner, strict=True)]
                        part[...] = block[:, *within]
                    if check:
                        check.add(part)
    return count


def read_tensor(tensor: StoredTensor, dtype: np.dtype, check: NumberCheck | None = None) -> np.ndarray:
    """Read a whole tensor, cast to ``dtype``, and add its numbers to ``check``."""
    value = np.empty(tensor.shape, dtype)
    read_slices(tensor, {tuple((0, size) for size in tensor.shape): value}, check)
    return value


def _read_slice(descriptor: int, tensor: StoredTensor, span: TensorSlice, out: np.ndarray) -> int:
    """Read a slice into ``out`` (of its shape and the tensor's dtype, C-contiguous), and return the bytes read.

    No other byte is read. A memory map would be faster on short runs from a warm cache, but its pages count as this
    process's memory, and a fault of the disk under it raises SIGBUS instead of an exception.
    """
    strides = [math.prod(tensor.shape[axis + 1 :]) * tensor.dtype.itemsize for axis in range(len(tensor.shape))]
    # The innermost axes that are read whole, and the axis before them, are contiguous in the file.
    contiguous = len(span)
    while contiguous > 0 and span[contiguous - 1] == (0, tensor.shape[contiguous - 1]):
        contiguous -= 1
    outer = max(contiguous - 1, 0)
    corner = sum(start * stride for (start, _), stride in zip(span, strides, strict=True))
    positions = np.array([tensor.offset + corner])
    for size, stride in zip(out.shape[:outer], strides[:outer], strict=True):
        positions = (positions[:, None] + np.arange(size) * stride).reshape(-1)
    runs = out.reshape(len(positions), -1).view(np.uint8)
    for run, position in zip(runs, positions.tolist(), strict=True):
        _read_run(descriptor, run.data, position, tensor.file)
    return runs.nbytes


def _read_run(descriptor: int, buffer: memoryview, position: int, file: Path) -> None:
    """Fill ``buffer`` with the bytes of a file from ``position`` on."""
    while buffer:
        count = os.preadv(descriptor, [buffer], position)  # at most 2 GiB per call
        if count == 0:
            raise UserError(f"{file} ended early while it was read: fetch it again")
        buffer, position = buffer[count:], position + count


def bytes_to_read(tensor: StoredTensor, slices: Iterable[TensorSlice]) -> int:
    """Return how many bytes ``read_slices`` reads for slices of a tensor."""
    if is_remote(tensor.file):
        return sum(stop - start for start, stop, _, _ in _requests(tensor, slices))
    return sum(map(slice_size, slices)) * tensor.dtype.itemsize


def _read_from_bucket(tensor: StoredTensor, arrays: Mapping[TensorSlice, np.ndarray], check: NumberCheck | None) -> int:
    """Do what ``read_slices`` does for a file in a bucket."""
    row_shape = tensor.shape[1:]
    row_bytes = math.prod(row_shape) * tensor.dtype.itemsize

    @_overflow_ignored
    def read(start: int, stop: int, rows: range, slices: list[TensorSlice]) -> int:
        with reading_errors(tensor.file):
            content = _read_range(tensor.file, start, stop)
        if len(content) != stop - start:
            raise UserError(f"{tensor.file} ended early while it was read: fetch it again")
        block = np.empty(len(rows) * row_bytes, np.uint8)
        before = start - tensor.offset - rows.start * row_bytes
        block[before : before + len(content)] = np.frombuffer(content, np.uint8)
        values = block.view(tensor.dtype).reshape(len(rows), *row_shape)
        for span in slices:
            (first, _), *inner = span
            part = arrays[span][rows.start - first : rows.stop - first]
            part[...] = values[:, *(slice(*ends) for ends in inner)]
            if check:
                check.add(part)
        return len(content)

    with ThreadPoolExecutor(_REQUESTS) as pool:
        return sum(pool.map(lambda request: read(*request), _requests(tensor, arrays)))


def _read_range(file: Path, start: int, stop: int) -> bytes:
    """Read the bytes of a file in a bucket from ``start`` to ``stop``, or to its end, in one request."""
    content: bytes = bucket_filesystem().cat_file(str(file), start, stop)
    return content


def _requests(
    tensor: StoredTensor, slices: Iterable[TensorSlice]
) -> Iterator[tuple[int, int, range, list[TensorSlice]]]:
    """Yield requests to a bucket: a range (start, stop) of the file's bytes, its rows, and the slices that have them.

    A range reaches from the first byte needed of its first row to the last byte needed of its last row.
    """
    strides = [math.prod(tensor.shape[axis + 1 :]) * tensor.dtype.itemsize for axis in range(len(tensor.shape))]
    for bounds, group in _group_by_rows(slices):
        (first, last), *inner = bounds
        begin = sum(low * stride for (low, _), stride in zip(inner, strides[1:], strict=True))
        end = sum((high - 1) * stride for (_, high), stride in zip(inner, strides[1:], strict=True))
        count = max(1, _REQUEST_BYTES // strides[0])
        for start in range(first, last, count):
            rows = range(start, min(start + count, last))
            first_row, last_row = (tensor.offset + row * strides[0] for row in (rows[0], rows[-1]))
            yield first_row + begin, last_row + end + tensor.dtype.itemsize, rows, group


def _group_by_rows(slices: Iterable[TensorSlice]) -> Iterator[tuple[TensorSlice, list[TensorSlice]]]:
    """Group slices that are equal along axis 0. Yield each group after its bounding slice."""
    by_rows: defaultdict[tuple[int, int], list[TensorSlice]] = defaultdict(list)
    for span in slices:
        by_rows[span[0]].append(span)
    for group in by_rows.values():
        yield tuple((min(a for a, _ in ends), max(b for _, b in ends)) for ends in zip(*group, strict=True)), group


def _group_into_reads(slices: Iterable[TensorSlice]) -> Iterator[tuple[TensorSlice, list[TensorSlice]]]:
    """Group slices that together fill their bounding slice. A slice for which that is not so is a group of its own."""
    for bounds, group in _group_by_rows(slices):
        if sum(slice_size(span) for span in group) == slice_size(bounds):
            yield bounds, group
        else:
            yield from ((span, [span]) for span in group)


def slice_shape(span: TensorSlice | list[tuple[int, int]]) -> tuple[int, ...]:
    """Return the shape of a slice."""
    return tuple(stop - start for start, stop in span)


def slice_size(span: TensorSlice) -> int:
    """Return the number of elements in a slice."""
    return math.prod(slice_shape(span))


def check_weight_dtype(dtype: DTypeLike) -> np.dtype:
    """Check that weights may have a dtype, and return it.

    Raises:
        UserError: It is not one of ``SAFETENSORS_DTYPES``.
    """
    try:
        known, name = np.dtype(dtype), np.dtype(dtype).name
    except (TypeError, UnicodeError):
        known, name = np.dtype(object), shown(dtype)
    if known not in SAFETENSORS_DTYPES.values():
        names = ", ".join(supported.name for supported in SAFETENSORS_DTYPES.values())
        raise UserError(f"weights of dtype {name} are not supported; one of {names} is needed")
    return known


def locate_tensors(folder: Path, config: MllamaConfig) -> dict[str, StoredTensor]:
    """Find every tensor of a model, by its published name, from the headers of the files in a checkpoint's folder.

    Raises:
        UserError: A file is damaged or missing. Or a tensor is missing, unexpected, stored twice, of another shape than
            ``config`` implies, or of another dtype than float32, float16 or bfloat16. The message names the first 20
            such tensors and counts the rest.
    """
    with ThreadPoolExecutor(_REQUESTS) as pool:
        stored = [tensor for tensors in pool.map(read_header, weight_files(folder)) for tensor in tensors]
    expected = {name: parameter.shape for name, parameter in parameters(config, "unrolled").items()}
    names = unwrap_names([tensor.name for tensor in stored], expected, published_name)
    stored = [replace(tensor, name=names[tensor.name]) for tensor in stored]
    if faults := list(_faults(stored, expected)):
        unexpected = (tensor.name for tensor in stored if tensor.name not in expected)
        unread = (tensor.dtype_name for tensor in stored if tensor.dtype_name not in SAFETENSORS_DTYPES)
        if known := describe_tensors(unexpected, unread):
            raise UserError(f"{folder} cannot be read: {known}")
        if stored and not any(tensor.name in expected for tensor in stored):
            raise UserError(
                f"{folder} cannot be read: none of its {len(stored)} tensors has a name of the model; the first is "
                f"{stored[0].name!r}, where {next(iter(expected))!r} is expected"
            )
        raise UserError(f"{folder} does not hold its config.json's model: {list_faults(faults)}")
    return {tensor.name: tensor for tensor in stored}


def list_faults(faults: Sequence[str]) -> str:
    """Return a list of faults in one line: the first 20, and how many more there are."""
    more = f"; and {len(faults) - _MAX_FAULTS} more" if len(faults) > _MAX_FAULTS else ""
    return "; ".join(faults[:_MAX_FAULTS]) + more


def _faults(stored: list[StoredTensor], expected: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Yield a few words on each fault of the stored tensors."""
    times = Counter(tensor.name for tensor in stored)
    yield from (f"missing {name}" for name in expected if name not in times)
    yield from (f"unexpected {name}" for name in times if name not in expected)
    for name, count in times.items():
        if count > 1:
            files = sorted({tensor.file.name for tensor in stored if tensor.name == name})
            yield f"{name} is stored {count} times (in {', '.join(files)})"
    for tensor in stored:
        shape = expected.get(tensor.name, tensor.shape)
        if tensor.shape != shape:
            yield f"{tensor.name} has shape {list(tensor.shape)}, should have {list(shape)}"
        if tensor.dtype_name not in SAFETENSORS_DTYPES:
            yield f"{tensor.name} has dtype {tensor.dtype_name}"


def read_header(file: Path) -> list[StoredTensor]:
    """Return the tensors of a safetensors file, by the names that the file uses.

    Raises:
        UserError: The file is missing, damaged or cut short.
    """
    try:
        with reading_errors(file):
            length, header = (_header_in_bucket if is_remote(file) else _header_on_disk)(file)
    except (SafetensorError, ValueError, KeyError, TypeError) as fault:
        if isinstance(fault, UserError):
            raise
        with reading_errors(file), file.open("rb") as content:
            if content.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise UserError(f"{file} is a pointer of Git LFS, not the weights: run `git lfs pull` there") from None
        raise UserError(f"{file} is damaged or cut short ({fault}): fetch it again") from None
    return [
        StoredTensor(name, file, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]), entry["dtype"])
        for name, entry in header.items()
        if name != "__metadata__"
    ]


def _header_on_disk(file: Path) -> tuple[int, dict[str, Any]]:
    """Return the length of a file's header in bytes, and the header.

    The safetensors library checks the file (its length, its header, that tensors neither overlap nor leave a gap), but
    does not reveal the offsets.
    """
    with safe_open(file, framework="numpy"), file.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        return length, json.loads(raw.read(length))


def _header_in_bucket(file: Path) -> tuple[int, dict[str, Any]]:
    """Do what ``_header_on_disk`` does for a file in a bucket, which the library cannot open, with the same checks."""
    size = bucket_filesystem().size(str(file))
    length = int.from_bytes(_read_range(file, 0, 8), "little")
    if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
        raise ValueError(f"a header of {length} bytes in a file of {size} bytes")
    header = json.loads(_read_range(file, 8, 8 + length))
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    end = 0
    for name, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        dtype = SAFETENSORS_DTYPES.get(entry["dtype"])  # ``_faults`` names any other
        if start != end or (dtype and stop - start != math.prod(entry["shape"]) * dtype.itemsize):
            raise ValueError(f"the offsets of {name} do not match its shape or the tensor before it")
        end = stop
    if 8 + length + end != size:
        raise ValueError(f"it has {size} bytes, but by its header {8 + length + end}")
    return length, header


def published_name(name: str) -> str:
    """Return the published name of a tensor, whichever version of transformers wrote it."""
    for newer, published in _NEWER_NAMES.items():
        if name.startswith(newer):
            return published + name.removeprefix(newer)
    return name


def name_in_transformers(name: str) -> str:
    """Return the name that a tensor of this published name has in a model of transformers 5 in memory."""
    for newer, published in _NEWER_NAMES.items():
        if name.startswith(published):
            return newer + name.removeprefix(published)
    return name
