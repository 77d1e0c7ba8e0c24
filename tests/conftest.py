"""Eight simulated CPU devices, and no network: set before anything imports jax or a hub client."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llava_cot_jax.model.config import MllamaConfig

TINY = Path(__file__).parent / "fixtures" / "mllama_tiny"
"""A random checkpoint (Meta's shapes in small) and, in reference.npz, what it must give under each convention."""

INPUTS = (
    "input_ids",
    "pixel_values",
    "aspect_ratio_ids",
    "aspect_ratio_mask",
    "cross_attention_mask",
    "attention_mask",
)


@pytest.fixture(scope="session")
def tiny() -> Path:
    return TINY


@pytest.fixture(scope="session")
def reference() -> Mapping[str, np.ndarray]:
    with np.load(TINY / "reference.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def small() -> MllamaConfig:
    """The tiny checkpoint's configuration with three text layers and three vision layers: quick to compile."""
    config = MllamaConfig.from_pretrained(TINY)
    text = replace(config.text, num_hidden_layers=3, cross_attention_layers=(1,), initializer_range=0.2)
    vision = replace(config.vision, num_hidden_layers=3, num_global_layers=1, intermediate_layers_indices=(1,))
    return replace(config, text=text, vision=replace(vision, initializer_range=0.2))


@pytest.fixture
def batch(reference) -> dict[str, np.ndarray]:
    """Three rows: one image, none, two."""
    return {name: reference[name].copy() for name in INPUTS}


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of what runs compile and count, for processes of their own."""
    return tmp_path_factory.mktemp("cache")
