"""Writing of a checkpoint anew: under published names, in another dtype, or merged with an adapter."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llava_cot_jax.errors import UserError
from llava_cot_jax.model.checkpoint.adapter import Adapter
from llava_cot_jax.model.checkpoint.auxiliary_files import list_auxiliary_files
from llava_cot_jax.model.checkpoint.faulty_numbers import NumberCheck, find_fault
from llava_cot_jax.model.checkpoint.reading import locate_tensors, read_tensor
from llava_cot_jax.model.checkpoint.writing import TensorEntry, write_checkpoint
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.parameters import parameters
from llava_cot_jax.progress import OnProgress


def convert_checkpoint(
    source: Path,
    destination: Path,
    config: MllamaConfig,
    *,
    dtype: np.dtype | None = None,
    adapter: Adapter | None = None,
    on_progress: OnProgress | None = None,
) -> None:
    """Write a checkpoint anew under published names, with one tensor in memory at a time. Copy its auxiliary files.

    Args:
        source: Folder of the checkpoint to read.
        destination: Folder to write. It must be empty or not exist.
        config: Configuration to write as config.json. Its parameters must have the shapes of the source's.
        dtype: Dtype of the weights to write. None keeps the dtype of each tensor.
        adapter: Adapter to merge into the weights.
        on_progress: Called after each tensor with the number of bytes written, and to be written.

    Raises:
        UserError: Both folders are the same, or a tensor holds nothing but zeros or numbers that are not finite, or
            ``locate_tensors`` or ``write_checkpoint`` refuses.
    """
    if os.path.realpath(destination) == os.path.realpath(source):  # works for paths in a bucket too
        raise UserError(f"{destination} is the checkpoint to be converted: name another folder for the result")
    own = locate_tensors(source, config)
    adapter = adapter or Adapter()
    stored = {**own, **adapter.replaced}
    entries = [TensorEntry(name, tensor.shape, dtype or tensor.dtype) for name, tensor in own.items()]
    total, table = sum(entry.nbytes for entry in entries), parameters(config, "unrolled")

    def checked(entry: TensorEntry, dtype: np.dtype) -> np.ndarray:
        check, tensor = NumberCheck(), stored[entry.name]
        value = read_tensor(tensor, dtype, check)
        if fault := find_fault(table[entry.name], check):
            other = f" as {dtype}: choose another dtype, or" if dtype != tensor.dtype else ":"
            whole = "adapter" if entry.name in adapter.replaced else "checkpoint"
            raise UserError(f"{tensor.file.parent}: {entry.name} {fault}{other} fetch the {whole} again")
        return value

    def values() -> Iterator[np.ndarray]:
        done = 0
        for entry in entries:
            if update := adapter.updates.get(entry.name):
                value = checked(entry, np.dtype(np.float32))
                with np.errstate(over="ignore", invalid="ignore"):  # what is written is checked
                    update.add_to({tuple((0, size) for size in value.shape): value})
                    value = value.astype(entry.dtype)
                yield value
            else:
                yield checked(entry, entry.dtype)
            done += entry.nbytes
            if on_progress:
                on_progress(done, total)

    write_checkpoint(destination, config, entries, values(), extra_files=list_auxiliary_files(source))
