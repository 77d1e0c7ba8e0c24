"""A published checkpoint on disk or in a bucket: holding its headers against the declarations, reading it.

``finding.py`` finds it. Nothing here knows of devices; ``weights.py`` makes arrays of what this reads, ``export.py``
writes.
"""

import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from llava_cot_jax.errors import UserError
from llava_cot_jax.model.checkpoint.finding import weight_files
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.parameters import parameters
from llava_cot_jax.paths import access, bucket_files, is_remote

Box = tuple[tuple[int, int], ...]
"""A part of an array: (start, stop) along each axis."""

OnProgress = Callable[[int, int], None]
"""Called after each parameter with the bytes of tensors done so far and those to do in all."""

DTYPE_TENSOR = "language_model.lm_head.weight"
"""The tensor whose dtype stands for the checkpoint's."""

FORMAT_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""The dtypes of weights, by their names in a safetensors header."""

_BLOCK_BYTES = 2 << 20
"""How much of a tensor is read at once on its way to several shards or another dtype: about a core's cache."""

_REQUEST_BYTES = 8 << 20
"""How much one request to a bucket spans: enough that its bytes take longer than the wait for the first of them."""

_REQUESTS = 16
"""Requests to a bucket at a time."""

_LONGEST_HEADER = 100_000_000
"""Bytes, by the format."""

_FAULTS_NAMED = 20

_NEWER_NAMES = {
    "lm_head.": "language_model.lm_head.",
    "model.language_model.": "language_model.model.",
    "model.vision_model.": "vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a safetensors file.

    Attributes:
        name: its published name, whichever the file uses.
        file: the file that holds it.
        offset: where its bytes begin, from the start of the file.
        shape: its shape; the bytes are in row-major order.
        format_dtype: its dtype as the file spells it, a key of ``FORMAT_DTYPES`` once verified.
    """

    name: str
    file: Path
    offset: int
    shape: tuple[int, ...]
    format_dtype: str

    @property
    def dtype(self) -> np.dtype:
        return FORMAT_DTYPES[self.format_dtype]


def read_shards(tensor: StoredTensor, shards: Mapping[Box, np.ndarray]) -> int:
    """Fill arrays with their parts of a tensor, cast to each array's dtype, reading no byte twice.

    Args:
        tensor: what to read.
        shards: C-contiguous arrays by the part of the tensor that each is to hold; parts are
            equal along axis 0 or apart.

    Returns:
        The bytes read. Of a file in a bucket that is more than the shards hold where these are narrow:
        what lies between them is read too, for a request costs more.

    Raises:
        UserError: the file ends early, or cannot be read any more.
    """
    if is_remote(tensor.file):
        return _read_from_bucket(tensor, shards)
    count = 0
    with tensor.file.open("rb", buffering=0) as file:
        for hull, boxes in _read_together(shards):
            if len(boxes) == 1 and shards[hull].dtype == tensor.dtype:
                count += _read_box(file.fileno(), tensor, hull, shards[hull])
                continue
            (first, last), *inner = hull
            rows = max(1, _BLOCK_BYTES // max(1, math.prod(extents(inner)) * tensor.dtype.itemsize))
            for start in range(first, last, rows):
                stop = min(start + rows, last)
                block = np.empty((stop - start, *extents(inner)), tensor.dtype)
                count += _read_box(file.fileno(), tensor, ((start, stop), *inner), block)
                for box in boxes:
                    part = [slice(a - low, b - low) for (a, b), (low, _) in zip(box[1:], inner, strict=True)]
                    shards[box][start - first : stop - first] = block[:, *part]
    return count


def _read_box(descriptor: int, tensor: StoredTensor, box: Box, out: np.ndarray) -> int:
    """Read the part ``box`` into ``out`` (its shape, the tensor's dtype, C-contiguous); return the bytes read.

    No other byte is asked for. A memory map is faster on short runs from a warm cache, but its pages
    count as this process's memory, and a fault of the disk under it is a SIGBUS, not an exception.
    """
    strides = [math.prod(tensor.shape[axis + 1 :]) * tensor.dtype.itemsize for axis in range(len(tensor.shape))]
    # What lies together in the file: the innermost axes that are whole, and the axis before them.
    together = len(box)
    while together > 0 and box[together - 1] == (0, tensor.shape[together - 1]):
        together -= 1
    walked = max(together - 1, 0)
    corner = sum(start * stride for (start, _), stride in zip(box, strides, strict=True))
    positions = np.array([tensor.offset + corner])
    for extent, stride in zip(out.shape[:walked], strides[:walked], strict=True):
        positions = (positions[:, None] + np.arange(extent) * stride).reshape(-1)
    runs = out.reshape(len(positions), -1).view(np.uint8)
    for run, position in zip(runs, positions.tolist(), strict=True):
        _read_run(descriptor, run.data, position, tensor.file)
    return runs.nbytes


def _read_run(descriptor: int, buffer: memoryview, position: int, file: Path) -> None:
    while buffer:
        count = os.preadv(descriptor, [buffer], position)  # at most 2 GiB a call
        if count == 0:
            raise UserError(f"{file} ended early while it was read: fetch it again")
        buffer, position = buffer[count:], position + count


def bytes_to_read(tensor: StoredTensor, boxes: Iterable[Box]) -> int:
    """How many bytes ``read_shards`` reads for these parts of a tensor."""
    if is_remote(tensor.file):
        return sum(stop - start for start, stop, _, _ in _requests(tensor, boxes))
    return sum(map(volume, boxes)) * tensor.dtype.itemsize


def _read_from_bucket(tensor: StoredTensor, shards: Mapping[Box, np.ndarray]) -> int:
    row_shape = tensor.shape[1:]
    row_bytes = math.prod(row_shape) * tensor.dtype.itemsize

    def fill(start: int, stop: int, rows: range, boxes: list[Box]) -> int:
        with access(tensor.file):
            content = _read_range(tensor.file, start, stop)
        if len(content) != stop - start:
            raise UserError(f"{tensor.file} ended early while it was read: fetch it again")
        block = np.empty(len(rows) * row_bytes, np.uint8)
        before = start - tensor.offset - rows.start * row_bytes
        block[before : before + len(content)] = np.frombuffer(content, np.uint8)
        values = block.view(tensor.dtype).reshape(len(rows), *row_shape)
        for box in boxes:
            (first, _), *inner = box
            shards[box][rows.start - first : rows.stop - first] = values[:, *(slice(*span) for span in inner)]
        return len(content)

    with ThreadPoolExecutor(_REQUESTS) as pool:
        return sum(pool.map(lambda request: fill(*request), _requests(tensor, shards)))


def _read_range(file: Path, start: int, stop: int) -> bytes:
    """The bytes of a file in a bucket from ``start`` up to ``stop``, or to its end, by one request."""
    content: bytes = bucket_files().cat_file(str(file), start, stop)
    return content


def _requests(tensor: StoredTensor, boxes: Iterable[Box]) -> Iterator[tuple[int, int, range, list[Box]]]:
    """What to ask a bucket for: a range of the file's bytes, the rows that it is of, and the boxes that have them.

    A range goes from the first byte that is wanted of the first row to the last one of the last row.
    """
    strides = [math.prod(tensor.shape[axis + 1 :]) * tensor.dtype.itemsize for axis in range(len(tensor.shape))]
    for hull, group in _by_rows(boxes):
        (first, last), *inner = hull
        begin = sum(low * stride for (low, _), stride in zip(inner, strides[1:], strict=True))
        end = sum((high - 1) * stride for (_, high), stride in zip(inner, strides[1:], strict=True))
        count = max(1, _REQUEST_BYTES // strides[0])
        for start in range(first, last, count):
            rows = range(start, min(start + count, last))
            at = [tensor.offset + row * strides[0] for row in (rows[0], rows[-1])]
            yield at[0] + begin, at[1] + end + tensor.dtype.itemsize, rows, group


def _by_rows(boxes: Iterable[Box]) -> Iterator[tuple[Box, list[Box]]]:
    """Boxes that are equal along the first axis, together, and the smallest box around them."""
    by_rows: defaultdict[tuple[int, int], list[Box]] = defaultdict(list)
    for box in boxes:
        by_rows[box[0]].append(box)
    for group in by_rows.values():
        yield tuple((min(a for a, _ in spans), max(b for _, b in spans)) for spans in zip(*group, strict=True)), group


def _read_together(boxes: Iterable[Box]) -> Iterator[tuple[Box, list[Box]]]:
    """Boxes that exactly tile a larger one, cut along other axes than the first; a box that does not, alone."""
    for hull, group in _by_rows(boxes):
        if sum(volume(box) for box in group) == volume(hull):
            yield hull, group
        else:
            yield from ((box, [box]) for box in group)


def extents(box: Box | list[tuple[int, int]]) -> tuple[int, ...]:
    """The shape of ``box``."""
    return tuple(stop - start for start, stop in box)


def volume(box: Box) -> int:
    """The elements in ``box``."""
    return math.prod(extents(box))


def verified_tensors(folder: Path, config: MllamaConfig) -> dict[str, StoredTensor]:
    """Every tensor of the model by its published name, found from the headers of the files in ``folder``.

    Raises:
        UserError: a damaged or missing file; or one line that names every tensor that is missing,
            unexpected, there twice, of another shape than ``config`` implies, or of another dtype
            than float32, float16 or bfloat16 (the first 20 of them, and a count of the rest).
    """
    with ThreadPoolExecutor(_REQUESTS) as pool:
        stored = [tensor for tensors in pool.map(_read_header, weight_files(folder)) for tensor in tensors]
    expected = {name: parameter.shape for name, parameter in parameters(config, "unrolled").items()}
    if faults := list(_faults(stored, expected)):
        more = f"; and {len(faults) - _FAULTS_NAMED} more" if len(faults) > _FAULTS_NAMED else ""
        raise UserError(f"{folder} does not hold its config.json's model: {'; '.join(faults[:_FAULTS_NAMED])}{more}")
    return {tensor.name: tensor for tensor in stored}


def _faults(stored: list[StoredTensor], expected: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """What is wrong with the stored tensors, a few words on each."""
    times = Counter(tensor.name for tensor in stored)
    yield from (f"missing {name}" for name in expected if name not in times)
    yield from (f"unexpected {name}" for name in times if name not in expected)
    for name, count in times.items():
        if count > 1:
            files = sorted({tensor.file.name for tensor in stored if tensor.name == name})
            yield f"{name} is there {count} times (in {', '.join(files)})"
    for tensor in stored:
        shape = expected.get(tensor.name, tensor.shape)
        if tensor.shape != shape:
            yield f"{tensor.name} is {list(tensor.shape)}, should be {list(shape)}"
        if tensor.format_dtype not in FORMAT_DTYPES:
            yield f"{tensor.name} is of dtype {tensor.format_dtype}"


def _read_header(file: Path) -> list[StoredTensor]:
    """The tensors of a safetensors file."""
    try:
        with access(file):
            length, header = (_header_in_bucket if is_remote(file) else _header_on_disk)(file)
    except (SafetensorError, ValueError, KeyError, TypeError) as fault:
        if isinstance(fault, UserError):
            raise
        raise UserError(f"{file} is damaged or cut short ({fault}): fetch it again") from None
    return [
        StoredTensor(
            _published_name(name), file, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]), entry["dtype"]
        )
        for name, entry in header.items()
        if name != "__metadata__"
    ]


def _header_on_disk(file: Path) -> tuple[int, dict[str, Any]]:
    """The length of a file's header, and the header.

    The library checks the file (its length, the header, no gap or overlap of tensors) but keeps the offsets to itself.
    """
    with safe_open(file, framework="numpy"), file.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        return length, json.loads(raw.read(length))


def _header_in_bucket(file: Path) -> tuple[int, dict[str, Any]]:
    """``_header_on_disk`` for a file that the library cannot open: with its checks, made here."""
    size = bucket_files().size(str(file))
    length = int.from_bytes(_read_range(file, 0, 8), "little")
    if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    header = json.loads(_read_range(file, 8, 8 + length))
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    end = 0
    for name, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        dtype = FORMAT_DTYPES.get(entry["dtype"])  # another is named later
        if start != end or (dtype and stop - start != math.prod(entry["shape"]) * dtype.itemsize):
            raise ValueError(f"{name} is not where its neighbours and shape put it")
        end = stop
    if 8 + length + end != size:
        raise ValueError(f"{size} bytes, where the header tells of {8 + length + end}")
    return length, header


def _published_name(name: str) -> str:
    for newer, published in _NEWER_NAMES.items():
        if name.startswith(newer):
            return published + name.removeprefix(newer)
    return name
