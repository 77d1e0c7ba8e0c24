"""Weights in int8 for decoding, which reads every weight at every step: half the bytes of bfloat16.

Each output of a projection has a scale of its own, its largest weight over 127: ``weight`` int8 [out, in], ``scale``
float32 [out]. Activations, norms, the embedding, the vision tower and the KV caches keep their dtype.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

INT8_MAX = 127


def is_quantized(path: str) -> bool:
    """Whether the parameter at ``path`` is held in int8: the projections of the text layers, and lm_head."""
    return path.startswith("language_model.") and path.endswith(("_proj.weight", "lm_head.weight"))


def quantize(weight: Float[Array, "out in"]) -> tuple[Int8[Array, "out in"], Float[Array, " out"]]:
    """Return a weight in int8, and the float32 scale of each output."""
    exact = weight.astype(jnp.float32)
    scale = jnp.abs(exact).max(axis=-1) / INT8_MAX
    steps = jnp.round(exact / jnp.where(scale > 0, scale, 1)[:, None])
    return steps.astype(jnp.int8), scale


def quantize_params(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Quantize the parameters for which ``is_quantized`` holds, and add their scales.

    Args:
        arrays: Parameters in the unrolled layout, by their paths. They are removed one by one, so that each is freed
            once it is quantized.
    """
    out: dict[str, jax.Array] = {}
    for path in list(arrays):
        array = arrays.pop(path)
        if is_quantized(path):
            out[path], out[path.removesuffix("weight") + "scale"] = jax.block_until_ready(jax.jit(quantize)(array))
        else:
            out[path] = array
    return out
