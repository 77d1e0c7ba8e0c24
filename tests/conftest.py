"""Fixtures, and settings of all tests: eight simulated CPU devices, no network, checks of array shapes.

Of the devices, commands use one, as programs for several compile slowly, unless a test takes ``all_devices``.

The settings come before anything imports jax, a hub client or the package.
"""

import os
import signal

from tests.processes import WITHOUT_TORCH, keep_compiled_programs, xla_flags

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = xla_flags(devices=8)
os.environ["HF_HUB_OFFLINE"] = "1"
# Threads of torch wait for each other busily, ten times as long as they compute where another process has the cores.
os.environ["OMP_NUM_THREADS"] = "1"
keep_compiled_programs()
# A shell starts jobs in the background with Ctrl-C ignored, and they and their children would not hear it in the tests.
signal.signal(signal.SIGINT, signal.default_int_handler)

from tests import type_checking

type_checking.install()

import base64
import gc
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import hypothesis
import jax
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from llava_cot_jax.model import sharding
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.processing.tokenizer import SPECIAL_TOKENS
from tests.training.small_run import write_small

hypothesis.settings.register_profile("the same examples every time", derandomize=True, database=None)
hypothesis.settings.load_profile("the same examples every time")

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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is beyond the suite, unless ``-m`` or an id names it.

    Files with slow tests come first, so that no process is left with a long file at the end.
    """
    if "exhaustive" not in config.option.markexpr:
        ids = [given.split("::", 1) for given in config.args if "::" in given]

        def is_beyond(item: pytest.Item) -> bool:
            _, test = item.nodeid.split("::", 1)
            named = any(item.path == Path(file).resolve() and test.startswith(name) for file, name in ids)
            return item.get_closest_marker("exhaustive") is not None and not named

        config.hook.pytest_deselected(items=[*filter(is_beyond, items)])
        items[:] = [item for item in items if not is_beyond(item)]
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Fewer and shorter collections: what is imported by then is no garbage, and tracing makes little of it."""
    gc.freeze()
    gc.set_threshold(50_000)


@pytest.fixture(scope="session", autouse=True)
def _processes_are_those_of_a_user() -> Iterator[None]:
    """Processes that tests start have no torch, and one device."""
    assert jax.device_count() == 8  # jax has read its flags in this process
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", WITHOUT_TORCH)
        patch.setenv("XLA_FLAGS", xla_flags(devices=1))
        yield


DEFAULT_MESH = sharding.default_mesh


@pytest.fixture(scope="session", autouse=True)
def _commands_take_one_device() -> Iterator[None]:
    """Commands without a mesh use one device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "default_mesh", lambda config: None)
        yield


@pytest.fixture
def all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands without a mesh use all eight devices, as they do outside of tests."""
    monkeypatch.setattr(sharding, "default_mesh", DEFAULT_MESH)


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


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint for the shapes world, of few layers and random weights: where the answers may be anything."""
    return write_small(tmp_path_factory.mktemp("untrained") / "small")


@pytest.fixture
def batch(reference) -> dict[str, np.ndarray]:
    """Three rows: one image, none, two."""
    return {name: reference[name].copy() for name in INPUTS}


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cache folder of the lengths that runs count: one for all workers, as the count of a data set takes seconds."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    """Llama 3's own vocabulary, from Meta's package, with the special tokens of Llama 3.2 Vision."""
    reason = "the published tokenizer comes with the package llama-models: pip install llama-models==0.3.0"
    package = Path(pytest.importorskip("llama_models", reason=reason).__file__).parent
    lines = (package / "llama3" / "tokenizer.model").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    # 128011 and on, but for the last: the reserved tokens from 3 to 247.
    special = [*SPECIAL_TOKENS, *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)), "<|image|>"]
    converter = TikTokenConverter(vocab_file="given", extra_special_tokens=special)
    converter.load_tiktoken_bpe = lambda _: ranks
    folder = tmp_path_factory.mktemp("published")
    PreTrainedTokenizerFast(tokenizer_object=converter.converted(), bos_token=SPECIAL_TOKENS[0]).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(MllamaConfig.llama32_11b().to_dict("bfloat16")))
    return Processor.from_pretrained(folder)


@pytest.fixture
def warnings_of(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What the package warns of, also after a command has run in this process, which prints it instead."""
    monkeypatch.setattr(logging.getLogger("llava_cot_jax"), "propagate", True)
    return caplog


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs_are_let_go():
    """After each file: some thousand of them in one process are more memory mappings than Linux allows."""
    yield
    jax.clear_caches()
