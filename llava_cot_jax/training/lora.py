"""LoRA (Hu et al., arXiv 2106.09685): frozen weights, and low-rank adapters beside them that are trained.

A projection W [out, in] with an adapter A [rank, in], B [out, rank] gives x (W + alpha / rank B A)^T;
``layers.linear`` applies it, and ``state.losses`` multiplies B by alpha / rank before. Adapters are
parameters like others, named after the weight that they stand beside: ``...q_proj.lora_a``.
"""

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from llava_cot_jax.errors import UserError
from llava_cot_jax.model.mllama import init_params
from llava_cot_jax.model.parameters import Parameter
from llava_cot_jax.training.settings import LoraSettings
from llava_cot_jax.training.state import matching

Array = TypeVar("Array", np.ndarray, jax.Array)

PROJECTION = re.compile(r"(_proj|\.fc[12]|projector)\.weight$")
"""What the weights that go through ``layers.linear`` are named."""


def adapter_table(table: Mapping[str, Parameter], settings: LoraSettings) -> dict[str, Parameter]:
    """The declarations of all adapters by their paths: for each weight lora_a [..., rank, in], lora_b [..., out, rank].

    They are stacked and cut as their weights are; the rank is never cut. A fresh B is 0, so that a run
    starts from the model as it is, and A is drawn so that A x is about as large as x.

    Args:
        table: of the model, in either layout.
        settings: see there; of rank 0 there are none.

    Raises:
        UserError: a target that is no regular expression, or matches no projection.
    """
    weights: set[str] = set()
    for pattern in settings.targets if settings.rank else ():
        found = {path for path in matching(table, pattern, "lora.targets") if PROJECTION.search(path)}
        if not found:
            raise UserError(
                f"lora.targets: {pattern!r} matches no projection, and nothing else can carry an adapter: "
                "name some, as self_attn.q_proj or mlp"
            )
        weights |= found
    adapters: dict[str, Parameter] = {}
    for path in sorted(weights):
        projection, weight = path.removesuffix("weight"), table[path]
        adapters[projection + "lora_a"], adapters[projection + "lora_b"] = _adapter(weight, settings.rank)
    return adapters


def _adapter(weight: Parameter, rank: int) -> tuple[Parameter, Parameter]:
    """lora_a [..., rank, in] and lora_b [..., out, rank] of a weight [..., out, in]."""
    *layers, n_out, n_in = weight.shape
    *layers_axis, out_axis, in_axis = weight.axes

    def beside(name: str) -> tuple[str, ...]:
        return tuple(tensor.removesuffix("weight") + name for tensor in weight.tensors)

    a_shape, a_axes = (*layers, rank, n_in), (*layers_axis, None, in_axis)
    b_shape, b_axes = (*layers, n_out, rank), (*layers_axis, out_axis, None)
    return (
        Parameter(a_shape, a_axes, "normal", n_in**-0.5, beside("lora_a"), weight.stacked),
        Parameter(b_shape, b_axes, "zeros", 0.0, beside("lora_b"), weight.stacked),
    )


def fresh_adapters(table: Mapping[str, Parameter], seed: int, dtype: Any, mesh: Mesh | None) -> dict[str, jax.Array]:
    """The adapters of ``adapter_table`` before the first step, in ``dtype``, made where ``mesh`` holds them.

    Raises:
        UserError: the mesh does not divide one.
    """
    key = jax.random.key(seed)
    return init_params(table, key, np.dtype(dtype), mesh)


def merged(weight: Array, a: Array, b: Array, scale: float) -> Array:
    """The weight that gives what ``weight`` and its adapter give together.

    Args:
        weight: [..., out, in], numpy's or jax's; the result is the like, in its dtype.
        a: [..., rank, in].
        b: [..., out, rank].
        scale: ``LoraSettings.scale``.
    """
    with jax.default_matmul_precision("highest"):  # a TPU would multiply float32 in bfloat16
        product = b.astype(np.float32) @ a.astype(np.float32)
    return (weight.astype(np.float32) + scale * product).astype(weight.dtype)
