"""The weights between a published checkpoint and sharded arrays, one parameter at a time.

Arrays are kept flat, by their paths in ``parameters(config, layout)``. No process and no device
holds more than its own shards, one parameter's worth of buffers aside.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import get_args

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from llava_cot_jax.errors import UserError
from llava_cot_jax.model.checkpoint.reading import (
    DTYPE_TENSOR,
    FORMAT_DTYPES,
    Box,
    OnProgress,
    StoredTensor,
    bytes_to_read,
    extents,
    read_shards,
    verified_tensors,
)
from llava_cot_jax.model.checkpoint.writing import MAX_FILE_BYTES, Entry, write_checkpoint
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.parameters import Parameter, ParamLayout, parameters
from llava_cot_jax.model.sharding import check_mesh, parameter_sharding
from llava_cot_jax.paths import as_path


def load_arrays(
    folder: Path,
    config: MllamaConfig,
    *,
    layout: ParamLayout,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, jax.Array]:
    """The weights in ``folder`` (``finding.resolve_checkpoint``) as arrays by path, laid out on a mesh.

    Each process reads only the bytes of the shards that its devices hold, replicas once; of narrow shards
    in a bucket more (``checkpoint.read_shards``).

    Args:
        folder: of a checkpoint of float32, float16 or bfloat16 tensors.
        config: what the checkpoint must fit.
        layout: which paths and shapes (``parameters``).
        dtype: float32, float16 or bfloat16; None is that of the checkpoint's lm_head.
        mesh: over the devices of all processes; None is this process's first device.
        on_progress: called after each parameter with the bytes this process has read and is to read.

    Raises:
        UserError: anything that ``verified_tensors`` refuses, or a mesh that does not divide the model.
    """
    stored = verified_tensors(folder, config)
    held_as = _weight_dtype(stored[DTYPE_TENSOR].dtype if dtype is None else dtype)
    if mesh is not None:
        check_mesh(config, mesh)
    plan = {path: _Placement(p, mesh) for path, p in parameters(config, layout).items()}
    total = sum(placement.bytes_to_read(stored) for placement in plan.values())
    arrays, done = {}, 0
    for path, placement in plan.items():
        arrays[path], count = placement.load(stored, held_as)
        done += count
        if on_progress:
            on_progress(done, total)
    return arrays


class _Placement:
    """Which part of a parameter each of this process's devices holds."""

    def __init__(self, parameter: Parameter, mesh: Mesh | None) -> None:
        self.parameter = parameter
        self.sharding: Sharding = (
            SingleDeviceSharding(jax.local_devices()[0]) if mesh is None else parameter_sharding(parameter, mesh)
        )
        indices = self.sharding.addressable_devices_indices_map(parameter.shape)
        self.boxes: dict[jax.Device, Box] = {
            device: tuple(axis.indices(size)[:2] for axis, size in zip(index or (), parameter.shape, strict=True))
            for device, index in indices.items()
        }

    def bytes_to_read(self, stored: Mapping[str, StoredTensor]) -> int:
        boxes = {box[1:] if self.parameter.stacked else box for box in self.boxes.values()}
        return sum(bytes_to_read(stored[name], boxes) for name in self.parameter.tensors)

    def load(self, stored: Mapping[str, StoredTensor], dtype: np.dtype) -> tuple[jax.Array, int]:
        """The parameter as an array of ``dtype``, and the bytes that were read for it."""
        parameter = self.parameter
        shards = {box: _aligned_empty(extents(box), dtype) for box in set(self.boxes.values())}
        count = 0
        for layer, name in enumerate(parameter.tensors):
            parts = {box[1:]: shard[layer] for box, shard in shards.items()} if parameter.stacked else shards
            count += read_shards(stored[name], parts)
        on_devices = [jax.device_put(shards[box], device) for device, box in self.boxes.items()]
        array = jax.make_array_from_single_device_arrays(parameter.shape, self.sharding, on_devices, dtype=dtype)
        # The buffers go when this returns: without the wait those of many parameters would queue for the device.
        return jax.block_until_ready(array), count


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that a CPU device takes over as it is: it copies what is not aligned to 64 bytes."""
    alignment = 64
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def save_arrays(
    arrays: Mapping[str, jax.Array],
    config: MllamaConfig,
    folder: Path,
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    extra_files: Sequence[Path] = (),
) -> None:
    """Write weights as a checkpoint that transformers reads, gathering one tensor at a time.

    Under several processes all must call this with the same weights; the first one writes.

    Args:
        arrays: by path, in either layout, on any mesh.
        config: what they belong to.
        folder: where, on a disk or in a bucket; it must not exist, or be empty.
        max_file_bytes: as for ``write_checkpoint``.
        extra_files: files to copy along (``finding.companions`` of the checkpoint it came from).

    Raises:
        UserError: anything that ``write_checkpoint`` refuses, in every process.
        ValueError: ``arrays`` are not those of ``config`` in either layout.
    """
    folder = as_path(folder)
    table = _table_of(arrays, config)
    entries = [
        Entry(name, parameter.tensor_shape, _weight_dtype(arrays[path].dtype))
        for path, parameter in table.items()
        for name in parameter.tensors
    ]
    values = _gathered(arrays, table)
    failure: UserError | None = None
    if jax.process_index() == 0:
        try:
            write_checkpoint(folder, config, entries, values, max_file_bytes=max_file_bytes, extra_files=extra_files)
        except UserError as fault:
            failure = fault
    if jax.process_count() > 1:
        for _ in values:  # every process takes part in every gather, also when the first could not write
            pass
        written = multihost_utils.broadcast_one_to_all(np.array(failure is None))
        if not written and failure is None:
            failure = UserError(f"the first process could not write {folder}: see its message")
    if failure:
        raise failure


def _table_of(arrays: Mapping[str, jax.Array], config: MllamaConfig) -> dict[str, Parameter]:
    """The declarations of ``arrays``, in whichever layout they are."""
    shapes = {path: array.shape for path, array in arrays.items()}
    for layout in get_args(ParamLayout):
        table = parameters(config, layout)
        if shapes == {path: parameter.shape for path, parameter in table.items()}:
            return table
    raise ValueError("the arrays are not those of this configuration in either layout")


def _gathered(arrays: Mapping[str, jax.Array], table: Mapping[str, Parameter]) -> Iterator[np.ndarray]:
    """Every published tensor of ``table`` in order, whole, on the host."""
    for path, parameter in table.items():
        for layer in range(len(parameter.tensors)):
            # A fresh array each: JAX keeps what it copied to the host for as long as the array lives.
            fresh = arrays[path][layer] if parameter.stacked else arrays[path].copy()
            if fresh.is_fully_addressable:
                yield np.asarray(fresh)
            else:
                yield multihost_utils.process_allgather(fresh, tiled=True)


def _weight_dtype(dtype: DTypeLike) -> np.dtype:
    if (held_as := np.dtype(dtype)) not in FORMAT_DTYPES.values():
        names = ", ".join(known.name for known in FORMAT_DTYPES.values())
        raise UserError(f"weights of dtype {held_as.name} are not supported; one of {names}")
    return held_as
