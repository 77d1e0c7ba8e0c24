"""Weights in int8 for decoding, which reads every weight at every step: half the bytes of bfloat16.

A projection's row (an output) is cut into 127 steps up to its largest weight: ``weight`` int8 [out, in], ``scale``
float32 [out]. Activations, norms, the embedding, the vision tower and the caches stay as they are.
"""

import jax
import jax.numpy as jnp

STEPS = 127


def is_quantized(path: str) -> bool:
    """Whether int8 holds the parameter of this path: the projections of the text layers, and lm_head."""
    return path.startswith("language_model.") and path.endswith(("_proj.weight", "lm_head.weight"))


def quantize(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``weight`` [out, in] as int8 of that shape and a float32 scale [out]."""
    exact = weight.astype(jnp.float32)
    scale = jnp.abs(exact).max(axis=-1) / STEPS
    steps = jnp.round(exact / jnp.where(scale > 0, scale, 1)[:, None])
    return steps.astype(jnp.int8), scale


def quantized(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Unrolled weights by their paths, with those of ``is_quantized`` in int8 and their scales beside them.

    ``arrays`` is emptied on the way, so that a weight is freed once its int8 stands.
    """
    out: dict[str, jax.Array] = {}
    for path in list(arrays):
        array = arrays.pop(path)
        if is_quantized(path):
            out[path], out[path.removesuffix("weight") + "scale"] = jax.block_until_ready(jax.jit(quantize)(array))
        else:
            out[path] = array
    return out
