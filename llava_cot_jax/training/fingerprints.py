"""Fingerprints of everything that each process of a run reads for itself, for ``Lifeline.agree``."""

import hashlib
import json
import math
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax

from llava_cot_jax.data.loader import Loader
from llava_cot_jax.model.checkpoint.auxiliary_files import list_auxiliary_files
from llava_cot_jax.model.checkpoint.reading import locate_tensors
from llava_cot_jax.paths import is_remote
from llava_cot_jax.training.initial_model import InitialModel
from llava_cot_jax.training.run_folder import PACKAGES, flat_settings
from llava_cot_jax.training.settings import TrainSettings

HOSTS_OWN_SETTINGS = {"data", "validation_data", "checkpoint", "loader.num_workers", "loader.num_threads"}
"""Settings that may differ between hosts: paths, whose contents are compared, and what a host has processors for."""

OTHER_PACKAGES = ("transformers", "tokenizers", "pillow", "libtpu", "jax-cuda13-plugin")
"""Packages whose versions are compared besides those that each checkpoint stores."""

HOSTS_OWN_JAX_VARIABLES = re.compile(
    "CACHE|COORDINATOR|PROCESS|PARTITION_INDEX|SLICE_INDEX|LOCAL_DEVICE|LOG|DUMP|DEBUG|TRACEBACK|PROFIL|PROXY"
)
"""Environment variables of jax, by a part of their names, that may differ between hosts.

They say where a process is, keeps its programs and reports. All others may change what a program computes.
"""

FLAG_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
"""Environment variables of flags for the compiler, among which those of its dumps may differ."""

_SAMPLE_BYTES = 256


def start_fields(settings: TrainSettings, accept_changes: bool) -> dict[str, str]:
    """Return the settings, versions, source files and compiler flags of this process, by name."""
    given = flat_settings(asdict(settings.with_absolute_paths()))
    fields = {name: str(value) for name, value in given.items() if not _is_hosts_own(name)}
    fields["accept_changes"] = str(accept_changes)
    fields["the version of python"] = platform.python_version()
    fields |= {f"the version of {name}": _version(name) for name in (*PACKAGES, *OTHER_PACKAGES)}
    package = Path(__file__).parents[1]
    sources = sorted(path for path in package.rglob("*") if path.suffix in (".py", ".yaml"))
    fields |= {f"the digest of {path.relative_to(package.parent)}": _digest(path.read_bytes()) for path in sources}
    jax_variables = (name for name in os.environ if name.startswith("JAX_"))
    fields |= {name: os.environ[name] for name in jax_variables if not HOSTS_OWN_JAX_VARIABLES.search(name)}
    for variable in FLAG_VARIABLES:
        for flag in os.environ.get(variable, "").split():
            name, _, value = flag.partition("=")
            if not name.startswith("--xla_dump"):
                fields[f"{name} in {variable}"] = value or "set"
    return fields


def _is_hosts_own(name: str) -> bool:
    return name in HOSTS_OWN_SETTINGS or name.startswith("data.")  # several data sets, by their paths


def model_fields(initial_model: InitialModel, steps: list[int]) -> dict[str, str]:
    """Return the files of the model, its weights, this process's devices and the checkpoints that it sees, by name.

    Args:
        initial_model: Model that the run starts from.
        steps: Steps of the checkpoints in the folder of the run.
    """
    auxiliary = list_auxiliary_files(initial_model.folder)
    fields = {f"the digest of the model's {path.name}": _digest(path.read_bytes()) for path in auxiliary}
    fields["the model's configuration"] = _digest(json.dumps(initial_model.config.to_dict("float32")).encode())
    if initial_model.has_weights:
        fields["the digest of the weights"] = _weights(initial_model)
    fields["the number of devices of a process"] = str(jax.local_device_count())
    fields["the kind of devices"] = jax.local_devices()[0].device_kind
    fields["the checkpoints in the output"] = ", ".join(map(str, steps)) or "none"
    return fields


def data_fields(loaders: Mapping[str, Loader | None]) -> dict[str, str]:
    """Return the fingerprints of the batches and of the rows' lengths of each split, by name.

    Args:
        loaders: Loaders by the name of their split.
    """
    fields = {}
    for split, loader in loaders.items():
        if loader:
            fields[f"the fingerprint of the data, split {split}"] = loader.fingerprint
            fields[f"the lengths of the data's rows, split {split}"] = _digest(loader.index.lengths.tobytes())
    return fields


def _weights(initial_model: InitialModel) -> str:
    """Return a digest of the names, dtypes and shapes of all tensors, and of a few bytes from the middle of each.

    In a bucket, which all hosts read, only names, dtypes and shapes count.
    """
    found = hashlib.sha256()
    tensors = locate_tensors(initial_model.folder, initial_model.config).values()
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        found.update(f"{tensor.name} {tensor.dtype_name} {tensor.shape}".encode())
        if not is_remote(tensor.file):
            size = math.prod(tensor.shape) * tensor.dtype.itemsize
            with tensor.file.open("rb") as stream:
                stream.seek(tensor.offset + size // 2)
                found.update(stream.read(min(_SAMPLE_BYTES, size - size // 2)))
    return found.hexdigest()[:16]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
