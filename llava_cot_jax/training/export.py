"""Export of a run's model: its trained parameters together with those of the checkpoint that it started from."""

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
from llava_cot_jax.model.checkpoint.adapter import write_adapter
from llava_cot_jax.model.checkpoint.auxiliary_files import list_auxiliary_files
from llava_cot_jax.model.checkpoint.digest import WeightsDigest
from llava_cot_jax.model.checkpoint.folder import named_folder, read_config, resolve_checkpoint
from llava_cot_jax.model.checkpoint.reading import locate_tensors, read_tensor
from llava_cot_jax.model.checkpoint.writing import TensorEntry, write_checkpoint
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.low_rank import adapter_paths
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.model.parameters import parameters
from llava_cot_jax.progress import OnProgress
from llava_cot_jax.training.base import Base, check_same_base
from llava_cot_jax.training.checkpoints import MODEL_PART, RUN_PART, read_arrays, read_run, steps_in, stored_arrays
from llava_cot_jax.training.checksums import find_damage
from llava_cot_jax.training.layout import CHECKPOINTS, MODEL_FILES, relocated
from llava_cot_jax.training.lora import merge_adapter
from llava_cot_jax.training.settings import LoraSettings
from llava_cot_jax.training.state import TrainState

EXPORT_CHUNK_BYTES = 1 << 30
"""Number of bytes of a checkpoint that are in memory at once. A larger parameter is read alone."""


def merged_arrays(state: TrainState, lora: LoraSettings, dtype: DTypeLike) -> dict[str, jax.Array]:
    """Return the model of a state in ``dtype``, by path in the stacked layout, with its adapters merged.

    Those for the verifier's question alone are left out.
    """
    held = {**state.frozen, **state.trained}
    found: dict[str, jax.Array] = {}
    for path, array in held.items():
        a, b = adapter_paths(path)
        if a in held and lora.tokens == "all":
            array = merge_adapter(array, held[a], held[b], lora.scale)
        if not path.endswith((".lora_a", ".lora_b")):
            found[path] = array.astype(dtype)
    return found


class RunExport:
    """Model of a run at one of its steps, however many processes wrote it.

    At most ``EXPORT_CHUNK_BYTES`` of it, or one parameter, are in memory at once.

    Attributes:
        config: Configuration of the model.
        step: Step whose checkpoint is read.
        for_verifier: Whether the run trained an adapter for the verifier's question alone.

    Args:
        folder: Folder of the run.
        step: Step to export; None is the latest.
        base: Present place of the checkpoint that the run started from, if it has moved.

    Raises:
        UserError: There is no checkpoint, or none of this step, or it is damaged.
    """

    def __init__(self, folder: Path, step: int | None = None, base: str | None = None) -> None:
        steps = steps_in(folder / CHECKPOINTS)
        if not steps:
            raise UserError(f"{folder} has no whole checkpoint yet: let the run reach its first one")
        self.step = steps[-1] if step is None else step
        if self.step not in steps:
            raise UserError(f"{folder} has no checkpoint of step {step}, only of {', '.join(map(str, steps))}")
        self._auxiliary_folder = folder / MODEL_FILES
        self._checkpoint = folder / CHECKPOINTS / str(self.step)
        self.config = read_config(self._auxiliary_folder)
        if damage := find_damage(self._checkpoint, (MODEL_PART, RUN_PART)):
            others = ", ".join(str(other) for other in steps if other != self.step) or "none"
            raise UserError(f"{self._checkpoint} is damaged: {damage}; take another one by --step: {others}")
        description = read_run(self._checkpoint)
        self._settings = relocated(description["settings"], folder)
        self._lora = LoraSettings(**self._settings["lora"])
        self.for_verifier = self._lora.tokens == "probe"
        self._probe_digest = description.get("probe")
        self._started_from = Base.of(description)
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
            destination: Folder to write. It must be empty or not exist.
            config: Configuration to write as config.json, with the shapes of the run's.
            dtype: Dtype of the weights. By default, that of the trained arrays if they all have the same, or float32.
            on_progress: Function that is called after each tensor with the bytes written and to be written in all.

        Raises:
            UserError: The run's adapters are for the verifier's question alone. Or the checkpoint that the run started
                from is needed, and gone or replaced by another. Or ``write_checkpoint`` refuses.
        """
        if self.for_verifier:
            raise UserError(
                "the run's adapter is for the verifier's question alone, and merged it would change every answer: "
                "write it by --for peft, and answer with --verifier_adapter"
            )
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

        write_checkpoint(
            destination, config, entries, values(), extra_files=list_auxiliary_files(self._auxiliary_folder)
        )

    def write_adapter(self, destination: Path, dtype: np.dtype | None = None) -> str:
        """Write the adapters of the run in the form of the PEFT library, and return the name of their base model.

        Args:
            destination: Folder to write. It must be empty or not exist.
            dtype: Dtype of the matrices. By default, that in which the run trained them.

        Raises:
            UserError: The run trained no adapters or started from random weights, or ``destination`` cannot be written.
        """
        lora = self._lora
        if not lora.rank:
            raise UserError("--for peft is for a run with adapters (lora.rank), and this one trained whole parameters")
        if self._settings["random_init"]:
            raise UserError(
                "--for peft needs a base checkpoint, and this run started from random weights: convert it whole"
            )
        matrices: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        held = read_arrays(self._checkpoint, list(stored_arrays(self._checkpoint)))
        for path, parameter in parameters(self.config, "stacked").items():
            a_path, b_path = adapter_paths(path)
            if a_path in held:
                a, b = (held[name].astype(dtype or held[name].dtype) for name in (a_path, b_path))
                pairs = zip(a, b, strict=True) if parameter.stacked else [(a, b)]
                matrices |= zip(parameter.tensors, pairs, strict=True)
        base = self._base or self._settings["checkpoint"]
        folder = named_folder(base)
        base = base if folder is None else str(folder)
        write_adapter(
            destination,
            base,
            lora.alpha,
            matrices,
            for_verifier=self.for_verifier,
            probe_digest=self._probe_digest,
        )
        return base

    def _tensors(self, trained: Mapping[str, Any]) -> Iterator[np.ndarray]:
        """Yield every published tensor, in the order of the stacked layout."""
        table, scale = parameters(self.config, "stacked"), self._lora.scale
        frozen = self._frozen() if table.keys() - trained.keys() else None
        if frozen is None and self._base:
            raise UserError("--base is of no use here: the run trained every parameter; leave it out")
        for group in _groups(table, trained):
            held = read_arrays(self._checkpoint, wanted) if (wanted := _stored(group, trained)) else {}
            for path in group:
                parameter, (a, b) = table[path], (held.get(name) for name in adapter_paths(path))
                for layer, name in enumerate(parameter.tensors):
                    index = layer if parameter.stacked else ...
                    if path in held:
                        value = held[path][index]
                    else:
                        assert frozen is not None
                        value = frozen(name)
                    yield value if a is None or b is None else merge_adapter(value, a[index], b[index], scale)

    def _frozen(self) -> Callable[[str], np.ndarray]:
        """Return a function that reads a published tensor of the model that the run started from, by name."""
        if self._settings["random_init"]:
            model = Mllama(self.config, rngs=nnx.Rngs(self._settings["seed"]))
            initial: dict[str, Any] = flatten_dict(model.params, sep=".")
            return lambda name: np.asarray(initial[name])
        base = self._base or self._settings["checkpoint"]
        try:
            folder = resolve_checkpoint(base)
        except UserError as fault:
            raise UserError(
                f"the checkpoint that the run started from is needed too: {fault}; say where it is by --base"
            ) from None
        stored = locate_tensors(folder, self.config)
        with WeightsDigest(folder) as digest:
            found = Base.at(base, folder, digest.result())
        check_same_base(self._started_from, found, "say by --base where the weights are that it started from")
        return lambda name: read_tensor(stored[name], stored[name].dtype)


def _groups(table: Mapping[str, Any], trained: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield the paths of ``table`` in order, in groups of at most ``EXPORT_CHUNK_BYTES``, since a read has a cost."""
    group: list[str] = []
    room = EXPORT_CHUNK_BYTES
    for path in table:
        size = sum(math.prod(trained[name].shape) * trained[name].dtype.itemsize for name in _stored([path], trained))
        if group and size > room:
            yield group
            group, room = [], EXPORT_CHUNK_BYTES
        group.append(path)
        room -= size
    yield group


def _stored(paths: list[str], trained: Mapping[str, Any]) -> list[str]:
    """Return the paths of those parameters, and of their adapters, that a checkpoint holds."""
    return [name for path in paths for name in (path, *adapter_paths(path)) if name in trained]
