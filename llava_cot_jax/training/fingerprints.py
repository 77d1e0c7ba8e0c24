"""Fingerprints of everything that each process of a run reads for itself, for ``Lifeline.agree``."""

from collections.abc import Mapping
from dataclasses import asdict

from llava_cot_jax.data.loader import Loader
from llava_cot_jax.files import short_digest
from llava_cot_jax.hosts.surroundings import device_fields, surroundings
from llava_cot_jax.model.checkpoint.fingerprint import checkpoint_fields
from llava_cot_jax.training.initial_model import InitialModel
from llava_cot_jax.training.run_folder import flat_settings
from llava_cot_jax.training.settings import TrainSettings

HOSTS_OWN_SETTINGS = {
    "data",
    "validation_data",
    "checkpoint",
    "verifier.judge_prompts",
    "loader.num_workers",
    "loader.num_threads",
}
"""Settings that may differ between hosts: paths, whose contents are compared, and what a host has processors for."""


def start_fields(settings: TrainSettings, accept_changes: bool) -> dict[str, str]:
    """Return the settings, versions, source files and compiler flags of this process, by name."""
    given = flat_settings(asdict(settings.with_absolute_paths()))
    fields = {name: str(value) for name, value in given.items() if not _is_hosts_own(name)}
    fields["accept_changes"] = str(accept_changes)
    return fields | surroundings()


def _is_hosts_own(name: str) -> bool:
    return name in HOSTS_OWN_SETTINGS or name.startswith("data.")  # several data sets, by their paths


def model_fields(initial_model: InitialModel, steps: list[int]) -> dict[str, str]:
    """Return the files of the model, its weights, this process's devices and the checkpoints that it sees, by name.

    Args:
        initial_model: Model that the run starts from.
        steps: Steps of the checkpoints in the folder of the run.
    """
    fields = checkpoint_fields(initial_model.folder, initial_model.config, initial_model.has_weights)
    fields |= device_fields()
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
            fields[f"the lengths of the data's rows, split {split}"] = short_digest(loader.index.lengths.tobytes())
    return fields
