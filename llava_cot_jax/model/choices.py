"""Names that settings and command lines choose from. This module does not import jax, which is slow."""

from typing import Literal

Dtype = Literal["float32", "bfloat16", "float16"]
"""Dtype of the parameters, on disk or on a device."""

RematPolicy = Literal["none", "dots", "full"]
"""Tensors that the forward pass of a layer saves for the backward pass: what its products and its attention need, the
results of its matrix products, or its input alone."""

MESH_AXES = ("data", "fsdp", "tensor")
"""Axes of a device mesh; ``sharding.py`` says what each of them shards."""
