"""Configurations of models by name, without fetching or reading any weights."""

from dataclasses import replace

from llava_cot_jax.errors import UserError
from llava_cot_jax.model.checkpoint.folder import read_config
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.convention import Convention
from llava_cot_jax.paths import checkpoint_path, is_remote, reading_errors

PUBLISHED = {
    "Llama-3.2-11B-Vision": MllamaConfig.llama32_11b,
    "Llama-3.2-11B-Vision-Instruct": MllamaConfig.llama32_11b,
    "Llama-3.2V-11B-cot": MllamaConfig.llama32_11b,
    "Llama-3.2-90B-Vision": MllamaConfig.llama32_90b,
    "Llama-3.2-90B-Vision-Instruct": MllamaConfig.llama32_90b,
}
"""Published models by the last part of their id on the hub."""


def model_config_for(name: str, convention: Convention | None = None) -> MllamaConfig:
    """Return the configuration of a checkpoint.

    Args:
        name: A folder, a bucket path, ``"shapes"``, or the id on the hub of one of ``PUBLISHED``.
        convention: Convention that the weights follow; None is the checkpoint's own.

    Raises:
        UserError: The name is none of these.
    """
    folder = checkpoint_path(name)
    with reading_errors(folder):
        is_there = is_remote(folder) or folder.is_dir()
    if is_there:
        return read_config(folder, convention)
    known = PUBLISHED.get(name.rsplit("/", 1)[-1])
    if known is None:
        raise UserError(f"{name} is no folder with a config.json, and none of shapes, {', '.join(PUBLISHED)}")
    return known() if convention is None else replace(known(), convention=convention)
