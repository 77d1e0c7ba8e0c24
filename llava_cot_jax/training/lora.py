"""LoRA (Hu et al., arXiv 2106.09685, section 4.1): low-rank adapters that are trained beside frozen weights.

A projection W [out, in] with an adapter A [rank, in], B [out, rank] gives x (W + alpha / rank B A)^T.
``layers.linear`` applies it, after ``step.loss_sums`` has multiplied B by alpha / rank. Adapters are parameters like
others, named after the weight that they stand beside: ``...q_proj.lora_a``.
"""

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from llava_cot_jax.model.fresh_parameters import init_params
from llava_cot_jax.model.low_rank import adapter_paths, declare_adapter, reads_text
from llava_cot_jax.model.parameters import Parameter
from llava_cot_jax.training.settings import LoraSettings
from llava_cot_jax.training.state import matching_paths

AnyArray = TypeVar("AnyArray", np.ndarray, jax.Array)

PROJECTION = re.compile(r"(_proj|\.fc[12]|projector)\.weight$")
"""Pattern of the names of weights that ``layers.linear`` applies."""


def adapter_table(table: Mapping[str, Parameter], settings: LoraSettings) -> dict[str, Parameter]:
    """Return the declarations of all adapters, by path: lora_a [..., rank, in] and lora_b [..., out, rank] per weight.

    They are stacked and sharded as their weights are; the rank is never sharded. B starts at 0, so that a run starts
    from the model as it is, and A is drawn so that A x is about as large as x.

    Args:
        table: Declarations of the model's parameters, in either layout.
        settings: Settings of LoRA. With rank 0 there are no adapters. Those for the verifier's question alone are only
            on projections of text tokens.

    Raises:
        UserError: A target is no regular expression, or matches no projection.
    """
    projections = [path for path in table if PROJECTION.search(path) and (settings.tokens == "all" or reads_text(path))]
    kind = "projection, and nothing else can carry an adapter"
    weights: set[str] = set()
    for pattern in settings.targets if settings.rank else ():
        weights |= matching_paths(projections, pattern, "lora.targets", kind)
    adapters: dict[str, Parameter] = {}
    for path in sorted(weights):
        a_path, b_path = adapter_paths(path)
        adapters[a_path], adapters[b_path] = declare_adapter(table[path], settings.rank)
    return adapters


def init_adapters(table: Mapping[str, Parameter], seed: int, dtype: Any, mesh: Mesh | None) -> dict[str, jax.Array]:
    """Return the adapters before the first step, by path, in ``dtype``, made where ``mesh`` holds them.

    Args:
        table: Declarations of the adapters, as ``adapter_table`` returns them.
        seed: Seed of the random values.
        dtype: Dtype of the adapters.
        mesh: Mesh to shard them over. By default, they are on one device.

    Raises:
        UserError: The mesh does not divide an adapter.
    """
    return init_params(table, jax.random.key(seed), np.dtype(dtype), mesh)


def merge_adapter(weight: AnyArray, a: AnyArray, b: AnyArray, scale: float) -> AnyArray:
    """Return the weight that has the effect of ``weight`` and its adapter together, in the dtype of ``weight``.

    Args:
        weight: Weight [..., out, in], an array of NumPy or JAX, as the result is.
        a: Matrix lora_a [..., rank, in] of the adapter.
        b: Matrix lora_b [..., out, rank] of the adapter.
        scale: Factor of the adapter's output, ``LoraSettings.scale``.
    """
    with jax.default_matmul_precision("highest"):  # a TPU would multiply float32 in bfloat16
        product = b.astype(np.float32) @ a.astype(np.float32)
    return (weight.astype(np.float32) + scale * product).astype(weight.dtype)
