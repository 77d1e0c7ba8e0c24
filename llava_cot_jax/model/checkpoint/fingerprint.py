"""Fingerprint of a checkpoint, by which the processes of a run find out quickly whether they have the same one."""

import hashlib
import json
import math
from pathlib import Path

from llava_cot_jax.files import short_digest
from llava_cot_jax.model.checkpoint.adapter_settings import read_adapter_settings
from llava_cot_jax.model.checkpoint.auxiliary_files import list_auxiliary_files
from llava_cot_jax.model.checkpoint.forms import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from llava_cot_jax.model.checkpoint.reading import locate_tensors
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.paths import bucket_filesystem, is_remote

_SAMPLE_BYTES = 256


def checkpoint_fields(folder: Path, config: MllamaConfig, has_weights: bool = True) -> dict[str, str]:
    """Return digests of the files of a checkpoint, of its configuration and of samples of its weights, by name.

    Args:
        folder: Folder of the checkpoint.
        config: Configuration of the model.
        has_weights: Whether the weights are read from the folder.
    """
    fields = {
        f"the digest of the model's {path.name}": short_digest(path.read_bytes())
        for path in list_auxiliary_files(folder)
    }
    fields["the model's configuration"] = short_digest(json.dumps(config.to_dict("float32")).encode())
    if has_weights:
        fields["the digest of the weights"] = weights_digest(folder, config)
    return fields


def adapter_digest(path_or_hub_id: str, *, for_verifier: bool = False) -> str:
    """Return a digest of the files of an adapter; of those in a bucket, their sizes.

    Args:
        path_or_hub_id: The adapter, as ``read_adapter_settings`` takes it.
        for_verifier: Whether it acts on the verifier's question alone.

    Raises:
        UserError: There is no such adapter.
    """
    folder = read_adapter_settings(path_or_hub_id, for_verifier=for_verifier).folder
    found = hashlib.sha256()
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if is_remote(folder):
            found.update(str(bucket_filesystem().size(str(folder / name))).encode())
            continue
        with (folder / name).open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:16]


def weights_digest(folder: Path, config: MllamaConfig) -> str:
    """Return a digest of the names, dtypes and shapes of all tensors, and of a few bytes from the middle of each.

    In a bucket, which all hosts read, only names, dtypes and shapes count.
    """
    found = hashlib.sha256()
    tensors = locate_tensors(folder, config).values()
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        found.update(f"{tensor.name} {tensor.dtype_name} {tensor.shape}".encode())
        if not is_remote(tensor.file):
            size = math.prod(tensor.shape) * tensor.dtype.itemsize
            with tensor.file.open("rb") as stream:
                stream.seek(tensor.offset + size // 2)
                found.update(stream.read(min(_SAMPLE_BYTES, size - size // 2)))
    return found.hexdigest()[:16]
