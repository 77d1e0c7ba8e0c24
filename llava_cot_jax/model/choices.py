"""What may be chosen of a model by name: for settings and command lines, which must not wait for jax."""

from typing import Literal

Dtype = Literal["float32", "bfloat16", "float16"]
"""Of weights on a disk or a device."""

Checkpointing = Literal["none", "dots", "full"]
"""What the backward pass finds saved of a layer: everything, its matrix products, or its input alone."""

MESH_AXES = ("data", "fsdp", "tensor")
"""``sharding.py`` says what each of them cuts."""
