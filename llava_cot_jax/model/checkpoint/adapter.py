"""The weights of LoRA adapters in the form of the PEFT library: read and merged, or written.

A projection W [out, in] has in ``adapter_model.safetensors`` the matrices
``base_model.model.MODULE.lora_A.weight`` [rank, in] and ``base_model.model.MODULE.lora_B.weight`` [out, rank], where
MODULE is the projection's path in the model of transformers. Merged, it is W + scale B A. Tensors of any other name
are parameters that were trained whole (PEFT's ``modules_to_save`` and ``bias``), and take the place of the model's.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from llava_cot_jax.errors import UserError
from llava_cot_jax.files import write_json
from llava_cot_jax.model.checkpoint.adapter_settings import FOR_VERIFIER, MERGE_IN_PEFT, PROBE_DIGEST, AdapterSettings
from llava_cot_jax.model.checkpoint.forms import ADAPTER_CONFIG, ADAPTER_WEIGHTS, unwrap_names
from llava_cot_jax.model.checkpoint.reading import (
    SAFETENSORS_DTYPES,
    StoredTensor,
    TensorSlice,
    name_in_transformers,
    published_name,
    read_header,
    read_tensor,
)
from llava_cot_jax.model.checkpoint.writing import TensorEntry, new_folder, write_tensors
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.parameters import parameters

_LOG = logging.getLogger(__name__)

_PREFIX = "base_model.model."

_MATRIX = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
"""Pattern of the names of an adapter's matrices; ``default`` is there where PEFT did not write the file itself."""


@dataclass(frozen=True)
class LowRankUpdate:
    """Adapter of one projection.

    Attributes:
        a: Matrix A [rank, in].
        b: Matrix B [out, rank].
        scale: Factor of their product.
    """

    a: StoredTensor
    b: StoredTensor
    scale: float

    def add_to(self, arrays: Mapping[TensorSlice, np.ndarray]) -> None:
        """Add scale B A to slices of the projection, float32, by the slice that each of them is."""
        a, b = (read_tensor(matrix, np.dtype(np.float32)) for matrix in (self.a, self.b))
        for (rows, columns), values in arrays.items():
            values += np.float32(self.scale) * (b[slice(*rows)] @ a[:, slice(*columns)])


@dataclass(frozen=True)
class Adapter:
    """Adapter of a model; without arguments, one that changes nothing.

    Attributes:
        updates: Adapters of projections, by the published names of their weights.
        replaced: Tensors that take the place of the model's, by their published names.
    """

    updates: Mapping[str, LowRankUpdate] = field(default_factory=dict)
    replaced: Mapping[str, StoredTensor] = field(default_factory=dict)


def read_adapter(settings: AdapterSettings, config: MllamaConfig) -> Adapter:
    """Read which projections an adapter changes, from the header of its file, and check that it fits a model.

    Raises:
        UserError: The file is damaged or holds no tensors, or a tensor in it belongs to no parameter of the model, or
            does not fit it.
    """
    if settings.saved_by_peft and config.convention == "meta":
        _LOG.warning(
            f"{settings.folder} was saved by PEFT, and transformers, in which PEFT trains, does not compute by the "
            "convention 'meta' that is taken here: name that of its version by --convention, or convention= in Python "
            "(transformers_5 from 4.56 on)"
        )
    file = settings.folder / ADAPTER_WEIGHTS
    # With ``bias``, PEFT writes those of ``modules_to_save`` a second time, and beside them what they replace.
    stored = {tensor.name: tensor for tensor in read_header(file) if ".original_module." not in tensor.name}
    if not stored:
        raise UserError(f"{file} holds no tensors: save the adapter again")
    shapes = {name: parameter.shape for name, parameter in parameters(config, "unrolled").items()}
    matrices = {name: found for name in stored if (found := _MATRIX.fullmatch(name))}
    if unknown := sorted(name for name in stored if "lora_" in name and name not in matrices):
        raise UserError(f"{file}: {unknown[0]} is no matrix of a plain LoRA: {MERGE_IN_PEFT}")
    weights = {name: f"{matrices[name][1]}.weight" if name in matrices else name for name in stored}
    published = unwrap_names(sorted(set(weights.values())), shapes, published_name)
    pairs: dict[str, dict[str, StoredTensor]] = {}
    replaced: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        target = published[weights[name]]
        if target not in shapes:
            raise UserError(f"{file}: {name} belongs to no parameter of the model: it is another model's")
        if tensor.dtype_name not in SAFETENSORS_DTYPES:
            raise UserError(f"{file}: {name} has dtype {tensor.dtype_name}; float32, float16 or bfloat16 is needed")
        if name in matrices:
            pairs.setdefault(target, {})[matrices[name][2]] = tensor
        elif tensor.shape != shapes[target]:
            raise UserError(f"{file}: {name} has shape {list(tensor.shape)}, the model's {list(shapes[target])}")
        else:
            replaced[target] = replace(tensor, name=target)
    return Adapter({target: _update(settings, file, pair, shapes[target]) for target, pair in pairs.items()}, replaced)


def _update(
    settings: AdapterSettings, file: Path, pair: Mapping[str, StoredTensor], shape: tuple[int, ...]
) -> LowRankUpdate:
    """Return the adapter of one projection of ``shape`` from its matrices by the letters of their names."""
    if missing := {"A", "B"} - pair.keys():
        (there,) = pair.values()
        raise UserError(f"{file}: {there.name} has no lora_{missing.pop()} beside it: save the adapter again")
    a, b = pair["A"], pair["B"]
    if len(shape) != 2:
        raise UserError(f"{file}: {a.name} adapts a convolution or a vector, which is not supported: {MERGE_IN_PEFT}")
    if a.shape[1:] != shape[1:] or b.shape[:1] != shape[:1] or a.shape[:1] != b.shape[1:]:
        raise UserError(
            f"{file}: {a.name} {list(a.shape)} and its lora_B {list(b.shape)} do not fit the model's weight "
            f"{list(shape)}: give the base model that the adapter was trained on"
        )
    match = _MATRIX.fullmatch(a.name)
    assert match
    return LowRankUpdate(a, b, settings.scale(match[1].removeprefix(_PREFIX), a.shape[0]))


def write_adapter(
    folder: Path,
    base: str,
    alpha: float,
    matrices: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    for_verifier: bool = False,
    probe_digest: str | None = None,
) -> None:
    """Write an adapter that PEFT loads onto a model of transformers 5.

    Args:
        folder: Folder to write, on a disk or in a bucket. It must be empty or not exist.
        base: Path or id on the hub of the base model, for adapter_config.json.
        alpha: Scale of the output, which is divided by the rank.
        matrices: Matrices A [rank, in] and B [out, rank], of one rank, by the published name of their weight.
        for_verifier: Whether the adapter is for the verifier's question alone, which PEFT does not know of.
        probe_digest: Digest of this question, ``ProbePrompt.digest``, if it is known.

    Raises:
        UserError: ``folder`` is not empty, or it cannot be written.
    """
    modules = {name: name_in_transformers(name).removesuffix(".weight") for name in matrices}
    tensors = {
        f"{_PREFIX}{modules[name]}.lora_{letter}.weight": matrix
        for name, pair in matrices.items()
        for letter, matrix in zip("AB", pair, strict=True)
    }
    entries = [TensorEntry(name, matrix.shape, matrix.dtype) for name, matrix in tensors.items()]

    def values() -> Iterator[np.ndarray]:
        yield from tensors.values()

    with new_folder(folder, sum(entry.nbytes for entry in entries)) as partial:
        write_tensors(partial / ADAPTER_WEIGHTS, entries, values())
        write_json(
            partial / ADAPTER_CONFIG,
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": base,
                "r": next(iter(matrices.values()))[0].shape[0],
                "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
                "lora_dropout": 0.0,
                # Whole paths, because the same last names occur in the vision tower too.
                "target_modules": sorted(modules.values()),
                "rank_pattern": {},
                "alpha_pattern": {},
                "use_rslora": False,
                "use_dora": False,
                "bias": "none",
                "modules_to_save": None,
                "fan_in_fan_out": False,
                "init_lora_weights": True,
                "inference_mode": True,
                **({FOR_VERIFIER: True} if for_verifier else {}),
                **({PROBE_DIGEST: probe_digest} if probe_digest else {}),
            },
        )
