"""Saving of sharded arrays as a checkpoint that transformers reads, gathering one tensor at a time."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import get_args

import jax
import numpy as np
from jax.experimental import multihost_utils

from llava_cot_jax.errors import UserError
from llava_cot_jax.model.checkpoint.reading import check_weight_dtype
from llava_cot_jax.model.checkpoint.writing import MAX_FILE_BYTES, TensorEntry, write_checkpoint
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.parameters import Parameter, ParamLayout, parameters
from llava_cot_jax.paths import as_path


def save_params(
    arrays: Mapping[str, jax.Array],
    config: MllamaConfig,
    folder: Path,
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    extra_files: Sequence[Path] = (),
) -> None:
    """Write weights as a checkpoint that transformers reads, gathering one tensor at a time.

    Where there are several processes, all must call this with the same weights. The first one writes.

    Args:
        arrays: Weights by path, in either layout, on any mesh.
        config: Configuration of the model.
        folder: Folder to write, on a disk or in a bucket. It must be empty or not exist.
        max_file_bytes: Largest number of bytes of tensors in a file, as for ``write_checkpoint``.
        extra_files: Files to copy too, such as those that ``list_auxiliary_files`` finds in the original checkpoint.

    Raises:
        UserError: ``write_checkpoint`` refuses. Every process raises it.
        ValueError: ``arrays`` do not match ``config`` in either layout.
    """
    folder = as_path(folder)
    table = _table_of(arrays, config)
    entries = [
        TensorEntry(name, parameter.tensor_shape, check_weight_dtype(arrays[path].dtype))
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
        for _ in values:  # every process must take part in every gather, even if the first could not write
            pass
        written = multihost_utils.broadcast_one_to_all(np.array(failure is None))
        if not written and failure is None:
            failure = UserError(f"the first process could not write {folder}: see its message")
    if failure:
        raise failure


def _table_of(arrays: Mapping[str, jax.Array], config: MllamaConfig) -> dict[str, Parameter]:
    """Return the declarations of the arrays, in the layout that they have."""
    shapes = {path: array.shape for path, array in arrays.items()}
    for layout in get_args(ParamLayout):
        table = parameters(config, layout)
        if shapes == {path: parameter.shape for path, parameter in table.items()}:
            return table
    raise ValueError("the arrays do not match this configuration in either layout")


def _gathered(arrays: Mapping[str, jax.Array], table: Mapping[str, Parameter]) -> Iterator[np.ndarray]:
    """Yield every published tensor of ``table`` in order, whole, on the host."""
    for path, parameter in table.items():
        for layer in range(len(parameter.tensors)):
            # A new array for each, because JAX keeps the copy on the host for as long as the array lives.
            tensor = arrays[path][layer] if parameter.stacked else arrays[path].copy()
            if tensor.is_fully_addressable:
                yield np.asarray(tensor)
            else:
                yield multihost_utils.process_allgather(tensor, tiled=True)
