"""Loading of a checkpoint's weights straight into arrays that are sharded over devices, one parameter at a time."""

import math
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from llava_cot_jax.errors import UserError
from llava_cot_jax.model.checkpoint.adapter import Adapter, LowRankUpdate, read_adapter
from llava_cot_jax.model.checkpoint.adapter_settings import AdapterSettings
from llava_cot_jax.model.checkpoint.faulty_numbers import NumberCheck, find_fault, is_finite
from llava_cot_jax.model.checkpoint.reading import (
    DTYPE_TENSOR,
    StoredTensor,
    TensorSlice,
    bytes_to_read,
    check_weight_dtype,
    list_faults,
    locate_tensors,
    read_slices,
    read_tensor,
    slice_shape,
    slice_size,
)
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.low_rank import adapter_paths, declare_adapter, reads_text
from llava_cot_jax.model.parameters import Parameter, ParamLayout, parameters
from llava_cot_jax.model.sharding import check_mesh, parameter_sharding
from llava_cot_jax.progress import OnProgress


def load_params(
    folder: Path,
    config: MllamaConfig,
    *,
    layout: ParamLayout,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    adapter: AdapterSettings | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, jax.Array]:
    """Load the weights of a checkpoint as arrays by path, sharded over a mesh.

    Each process reads only the bytes of the shards on its own devices, and those of replicas once. Of narrow shards in
    a bucket it reads more, as ``reading.read_slices`` explains. No process and no device holds more than its own
    shards and the buffers of one parameter.

    Args:
        folder: Folder of a checkpoint, as ``folder.resolve_checkpoint`` returns it.
        config: Configuration that the checkpoint must match.
        layout: Layout of the parameters, which decides their paths and shapes.
        dtype: Dtype of the arrays: float32, float16 or bfloat16. None takes the dtype of the checkpoint's lm_head.
        mesh: Mesh over the devices of all processes. None places all on this process's first device.
        adapter: Adapter to merge into the weights, as ``read_adapter_settings`` returns it.
        on_progress: Called after each parameter with the number of bytes that this process has read, and is to read.

    Raises:
        UserError: ``locate_tensors`` refuses the checkpoint or ``read_adapter`` the adapter, or the mesh does not
            divide the model, or a tensor holds numbers that are not finite, or nothing but zeros.
    """
    stored = locate_tensors(folder, config)
    param_dtype = check_weight_dtype(stored[DTYPE_TENSOR].dtype if dtype is None else dtype)
    merged = read_adapter(adapter, config) if adapter else Adapter()
    stored |= merged.replaced
    if mesh is not None:
        check_mesh(config, mesh)
    loaders = {path: _ParamLoader(parameter, mesh) for path, parameter in parameters(config, layout).items()}
    total = sum(loader.bytes_to_read(stored) for loader in loaders.values())
    arrays, done, faults = {}, 0, list[str]()
    for path, loader in loaders.items():
        arrays[path], count = loader.load(stored, param_dtype, merged, faults)
        done += count
        if on_progress:
            on_progress(done, total)
    if faults:
        is_cast = any(tensor.dtype != param_dtype for tensor in stored.values())
        remedy = f"choose another dtype than {param_dtype}, or " if is_cast else ""
        source = "the checkpoint and the adapter" if adapter else "the checkpoint"
        raise UserError(f"{folder} holds no sound weights: {list_faults(faults)}: {remedy}fetch {source} again")
    return arrays


def load_verifier_adapter(
    settings: AdapterSettings, config: MllamaConfig, dtype: DTypeLike, mesh: Mesh | None
) -> dict[str, jax.Array]:
    """Load the adapter of a verifier as arrays by path, in the unrolled layout. ``lora_b`` is multiplied by its scale.

    Args:
        settings: The adapter, as ``read_adapter_settings`` returns it.
        config: Configuration of the model that it is for.
        dtype: Dtype of the arrays.
        mesh: Mesh over the devices of all processes. None places all on this process's first device.

    Raises:
        UserError: ``read_adapter`` refuses the adapter, or it changes what is not applied to text tokens alone.
    """
    adapter = read_adapter(settings, config)
    if other := [*adapter.replaced, *(name for name in adapter.updates if not reads_text(name))]:
        raise UserError(f"{settings.folder} changes {other[0]}, which a verifier's adapter cannot: train it again")
    table, arrays = parameters(config, "unrolled"), dict[str, jax.Array]()
    for name, update in adapter.updates.items():
        a, b = (read_tensor(matrix, np.dtype(np.float32)) for matrix in (update.a, update.b))
        declarations = declare_adapter(table[name], a.shape[0])
        for path, values, declared in zip(adapter_paths(name), (a, update.scale * b), declarations, strict=True):
            array = values.astype(np.float32).astype(dtype)
            if not is_finite(array):
                raise UserError(f"{settings.folder}: {path} holds numbers that are not finite: train the adapter again")
            sharding = _sharding(declared, mesh)
            arrays[path] = jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
    return arrays


def _sharding(parameter: Parameter, mesh: Mesh | None) -> Sharding:
    """Return the sharding of a parameter; without a mesh, it is on this process's first device."""
    return SingleDeviceSharding(jax.local_devices()[0]) if mesh is None else parameter_sharding(parameter, mesh)


class _ParamLoader:
    """Loads the slices of one parameter that this process's devices hold."""

    def __init__(self, parameter: Parameter, mesh: Mesh | None) -> None:
        self._parameter = parameter
        self._sharding = _sharding(parameter, mesh)
        indices = self._sharding.addressable_devices_indices_map(parameter.shape)
        self._slices: dict[jax.Device, TensorSlice] = {
            device: tuple(axis.indices(size)[:2] for axis, size in zip(index or (), parameter.shape, strict=True))
            for device, index in indices.items()
        }

    def bytes_to_read(self, stored: Mapping[str, StoredTensor]) -> int:
        """Return the number of bytes that ``load`` reads."""
        slices = {span[1:] if self._parameter.stacked else span for span in self._slices.values()}
        return sum(bytes_to_read(stored[name], slices) for name in self._parameter.tensors)

    def load(
        self,
        stored: Mapping[str, StoredTensor],
        dtype: np.dtype,
        adapter: Adapter,
        faults: list[str],
    ) -> tuple[jax.Array, int]:
        """Return the parameter as an array, and the number of bytes read for it. Append what is wrong with it."""
        parameter = self._parameter
        is_adapted = any(name in adapter.updates for name in parameter.tensors)
        read_as = np.dtype(np.float32) if is_adapted else dtype  # an adapter is added before anything is rounded
        shards = {span: _aligned_empty(slice_shape(span), read_as) for span in set(self._slices.values())}
        count = 0
        for layer, name in enumerate(parameter.tensors):
            of_layer = {span[1:]: shard[layer] for span, shard in shards.items()} if parameter.stacked else shards
            check = NumberCheck()
            count += read_slices(stored[name], of_layer, check)
            whole = sum(map(slice_size, of_layer)) == math.prod(parameter.tensor_shape)
            fault = find_fault(parameter, check, whole=whole)
            if not fault and name in adapter.updates:
                fault = _merge(adapter.updates[name], of_layer, dtype)
            if fault:
                faults.append(f"{name}{' of the adapter' if name in adapter.replaced else ''} {fault}")
        with np.errstate(over="ignore"):  # ``_merge`` has found what is too large for the dtype
            shards = {span: shard.astype(dtype, copy=False) for span, shard in shards.items()}
        on_devices = [jax.device_put(shards[span], device) for device, span in self._slices.items()]
        array = jax.make_array_from_single_device_arrays(parameter.shape, self._sharding, on_devices, dtype=dtype)
        # The buffers are freed on return. Without this wait, those of many parameters would queue for the device.
        return jax.block_until_ready(array), count


def _merge(update: LowRankUpdate, arrays: Mapping[TensorSlice, np.ndarray], dtype: np.dtype) -> str:
    """Add an adapter to slices of its projection, and return what is wrong with the sums in ``dtype``, or nothing."""
    with np.errstate(over="ignore", invalid="ignore"):
        update.add_to(arrays)
        sound = all(is_finite(values.astype(dtype, copy=False)) for values in arrays.values())
    return "" if sound else "with its adapter holds numbers that are not finite"


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an array aligned to 64 bytes, which a CPU device uses without a copy."""
    alignment = 64
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + nbytes].view(dtype).reshape(shape)
