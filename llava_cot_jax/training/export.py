"""From a run to a model on its own: what was trained, put into the checkpoint that the run started from."""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.typing import DTypeLike

from llava_cot_jax.errors import UserError
from llava_cot_jax.model.checkpoint.auxiliary_files import list_auxiliary_files
from llava_cot_jax.model.checkpoint.folder import read_config, resolve_checkpoint
from llava_cot_jax.model.checkpoint.reading import locate_tensors
from llava_cot_jax.model.checkpoint.writing import TensorEntry, read_tensor, write_checkpoint
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.model.parameters import parameters
from llava_cot_jax.paths import BUNDLED_MODEL
from llava_cot_jax.progress import OnProgress
from llava_cot_jax.training import checkpoints
from llava_cot_jax.training.checkpoints import read_arrays, read_run, steps_in, stored_arrays
from llava_cot_jax.training.checksums import find_damage
from llava_cot_jax.training.layout import CHECKPOINTS, MODEL, relocated
from llava_cot_jax.training.lora import merged
from llava_cot_jax.training.settings import LoraSettings
from llava_cot_jax.training.state import State

READ_BYTES = 1 << 30
"""Of a checkpoint, in memory at a time; a larger parameter is there alone."""


def merged_arrays(state: State, lora: LoraSettings, dtype: DTypeLike) -> dict[str, jax.Array]:
    """The model of a state by the paths of the stacked layout, its adapters merged, in ``dtype``."""
    held = {**state.frozen, **state.trained}
    found: dict[str, jax.Array] = {}
    for path, array in held.items():
        a, b = _adapter_paths(path)
        if a in held:
            array = merged(array, held[a], held[b], lora.scale)
        if not path.endswith((".lora_a", ".lora_b")):
            found[path] = array.astype(dtype)
    return found


class RunExport:
    """The model of a run at one of its steps, however many processes wrote it.

    A gigabyte of it, or one parameter, is in memory at a time.

    Attributes:
        config: the model's configuration.
        step: whose checkpoint is read.

    Args:
        folder: of the run.
        step: None is the newest.
        base: the checkpoint that the run started from, where it is no longer where the run found it; None is
            what the run stored.

    Raises:
        UserError: no such step, or none at all, or it is damaged.
    """

    def __init__(self, folder: Path, step: int | None = None, base: str | None = None) -> None:
        steps = steps_in(folder / CHECKPOINTS)
        if not steps:
            raise UserError(f"{folder} has no whole checkpoint yet: let the run reach its first one")
        self.step = steps[-1] if step is None else step
        if self.step not in steps:
            raise UserError(f"{folder} has no checkpoint of step {step}, only of {', '.join(map(str, steps))}")
        self._companions = folder / MODEL
        self._checkpoint = folder / CHECKPOINTS / str(self.step)
        self.config = read_config(self._companions)
        if damage := find_damage(self._checkpoint, (checkpoints.MODEL, checkpoints.RUN)):
            others = ", ".join(str(other) for other in steps if other != self.step) or "none"
            raise UserError(f"{self._checkpoint} is damaged: {damage}; take another one by --step: {others}")
        self._settings = relocated(read_run(self._checkpoint)["settings"], folder)
        self._base = base

    def write(
        self,
        destination: Path,
        config: MllamaConfig,
        *,
        dtype: np.dtype | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        """Write a checkpoint in Hugging Face form.

        Args:
            destination: the folder to make; it must not exist, or be empty.
            config: what to write as config.json; of the shapes of the run's.
            dtype: of the weights; None is float32, or bfloat16 where all that was trained is.
            on_progress: called after each tensor.

        Raises:
            UserError: what the run started from is gone, or anything that ``write_checkpoint`` refuses.
        """
        trained = stored_arrays(self._checkpoint)
        dtypes = {np.dtype(array.dtype) for array in trained.values()}
        written = dtype or (dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32))
        table = parameters(self.config, "stacked")
        entries = [TensorEntry(name, p.tensor_shape, written) for p in table.values() for name in p.tensors]
        total = sum(entry.nbytes for entry in entries)

        def values() -> Iterator[np.ndarray]:
            done = 0
            for entry, value in zip(entries, self._tensors(trained), strict=True):
                yield value.astype(written)
                done += entry.nbytes
                if on_progress:
                    on_progress(done, total)

        write_checkpoint(destination, config, entries, values(), extra_files=list_auxiliary_files(self._companions))

    def _tensors(self, trained: Mapping[str, Any]) -> Iterator[np.ndarray]:
        """Every published tensor, in the order of the stacked layout."""
        table, scale = parameters(self.config, "stacked"), LoraSettings(**self._settings["lora"]).scale
        frozen = self._frozen() if table.keys() - trained.keys() else None
        if frozen is None and self._base:
            raise UserError("--base is of no use here: the run trained every parameter; leave it out")
        for group in _groups(table, trained):
            held = read_arrays(self._checkpoint, wanted) if (wanted := _stored(group, trained)) else {}
            for path in group:
                parameter, (a, b) = table[path], (held.get(name) for name in _adapter_paths(path))
                for layer, name in enumerate(parameter.tensors):
                    part = layer if parameter.stacked else ...
                    if path in held:
                        value = held[path][part]
                    else:
                        assert frozen is not None
                        value = frozen(name)
                    yield value if a is None or b is None else merged(value, a[part], b[part], scale)

    def _frozen(self) -> Callable[[str], np.ndarray]:
        """Reads a published tensor of what the run started from."""
        if self._settings.get("random_init", self._settings["checkpoint"] == BUNDLED_MODEL):
            model = Mllama(self.config, rngs=nnx.Rngs(self._settings["seed"]))
            initial: dict[str, Any] = flatten_dict(model.params, sep=".")
            return lambda name: np.asarray(initial[name])
        base = self._base or self._settings["checkpoint"]
        try:
            folder = resolve_checkpoint(base)
        except UserError as fault:
            raise UserError(f"what the run started from is needed too: {fault}; say where it is by --base") from None
        stored = locate_tensors(folder, self.config)
        return lambda name: read_tensor(stored[name], stored[name].dtype)


def _groups(table: Mapping[str, Any], trained: Mapping[str, Any]) -> Iterator[list[str]]:
    """The paths of ``table``, in order, so many at a time as ``READ_BYTES`` allows: a read has its own cost."""
    group: list[str] = []
    room = READ_BYTES
    for path in table:
        size = sum(math.prod(trained[name].shape) * trained[name].dtype.itemsize for name in _stored([path], trained))
        if group and size > room:
            yield group
            group, room = [], READ_BYTES
        group.append(path)
        room -= size
    yield group


def _stored(paths: list[str], trained: Mapping[str, Any]) -> list[str]:
    """Of these parameters and their adapters, those that a checkpoint holds."""
    return [name for path in paths for name in (path, *_adapter_paths(path)) if name in trained]


def _adapter_paths(path: str) -> tuple[str, str]:
    """Of the adapter of a weight."""
    projection = path.removesuffix("weight")
    return projection + "lora_a", projection + "lora_b"
