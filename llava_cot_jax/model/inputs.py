"""Arrays that a user gives to a model: their forms, shapes and ids."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llava_cot_jax.checks import check_instance, shown
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.config import EXTRA_EMBEDDINGS, MllamaConfig

ArrayLike = jax.Array | np.ndarray


def as_arrays(inputs: Mapping[str, Any]) -> dict[str, ArrayLike]:
    """Return the arrays of a batch as JAX's or NumPy's, without those that are None.

    Lists of numbers, and arrays of other libraries on the host, become NumPy's.

    Raises:
        UserError: ``inputs`` is no mapping, a value is no array of numbers, or ids are not whole numbers.
    """
    check_instance("inputs", inputs, Mapping, "give the arrays by name, as a processor returns them")
    arrays = {}
    for name, value in inputs.items():
        if value is None:
            continue
        try:
            array = value if isinstance(value, jax.Array | np.ndarray) else np.asarray(value)
        except (TypeError, ValueError, RuntimeError):  # rows of unequal length, say, or a tensor on a device
            raise UserError(f"{name} cannot be made an array: it is {shown(value)}") from None
        if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
            raise UserError(f"{name} is {shown(value)}; it must be an array of numbers")
        if name in ("input_ids", "aspect_ratio_ids") and not jnp.issubdtype(array.dtype, jnp.integer):
            raise UserError(f"{name} is an array of {array.dtype}; ids are whole numbers")
        arrays[name] = array
    return arrays


def check_inputs(config: MllamaConfig, inputs: Mapping[str, ArrayLike | None]) -> None:
    """Check that these arrays can be inputs of a model of ``config`` together.

    Raises:
        UserError: An array lacks another that belongs to it, or has a wrong shape, or an id is beyond its table.
    """
    given = _shapes(inputs)
    if "input_ids" not in given:
        raise UserError("input_ids are missing: give the token ids of the prompts")
    if len(given["input_ids"]) != 2 or 0 in given["input_ids"]:
        raise UserError(
            f"input_ids must be [batch, tokens], with at least one token, got shape {list(given['input_ids'])}"
        )
    batch, tokens = given["input_ids"]
    if tokens > config.text.max_position_embeddings:
        raise UserError(f"{tokens} tokens are more than the context of {config.text.max_position_embeddings}")
    _check_shapes(given, {"attention_mask": (batch, tokens)})
    if "pixel_values" in given:
        _check_image_shapes(config, given, batch)
        if "cross_attention_mask" not in given:
            raise UserError("pixel_values came without cross_attention_mask: pass all that the image processor returns")
        images = given["pixel_values"][1]
        _check_shapes(given, {"cross_attention_mask": (batch, tokens, images, config.vision.max_num_tiles)})
    check_ids(config, inputs)


def check_tiles(config: MllamaConfig, inputs: Mapping[str, ArrayLike | None]) -> None:
    """Check that these arrays can be images of a model of ``config``.

    Raises:
        UserError: An array is missing or has a wrong shape, or an id is beyond its table.
    """
    given = _shapes(inputs)
    if "pixel_values" not in given:
        raise UserError("pixel_values are missing: give the tiles of the images")
    _check_image_shapes(config, given, next(iter(given["pixel_values"]), 0))
    check_ids(config, inputs)


def _shapes(inputs: Mapping[str, ArrayLike | None]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in inputs.items() if x is not None}


def _check_image_shapes(config: MllamaConfig, given: Mapping[str, tuple[int, ...]], batch: int) -> None:
    """Check the shapes of the images of a batch."""
    if "aspect_ratio_ids" not in given:
        raise UserError("pixel_values came without aspect_ratio_ids: pass all that the image processor returns")
    images = given["pixel_values"][1] if len(given["pixel_values"]) > 1 else 0
    tower = config.vision
    tiles, size = tower.max_num_tiles, tower.image_size
    expected = {
        "pixel_values": (batch, images, tiles, tower.num_channels, size, size),
        "aspect_ratio_ids": (batch, images),
        "aspect_ratio_mask": (batch, images, tiles),
    }
    _check_shapes(given, expected)


def _check_shapes(given: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in expected.items():
        if given.get(name, shape) != shape:
            raise UserError(f"{name} must have shape {list(shape)}, got {list(given[name])}")


def check_ids(config: MllamaConfig, inputs: Mapping[str, ArrayLike | None]) -> None:
    """Check that ids are those of rows of their tables, as far as this process can see them.

    JAX would take the last row for an id beyond it, and count a negative one from the end.

    Raises:
        UserError: An id has no row.
    """
    sizes = {
        "input_ids": config.text.vocab_size + EXTRA_EMBEDDINGS,
        "aspect_ratio_ids": len(config.vision.supported_aspect_ratios) + 1,
    }
    for name, rows in sizes.items():
        ids = inputs.get(name)
        if ids is None or isinstance(ids, jax.core.Tracer):
            continue
        if isinstance(ids, jax.Array) and not ids.is_fully_addressable:
            continue
        values = np.asarray(ids)
        if (wrong := values[(values < 0) | (values >= rows)]).size:
            raise UserError(f"{name} has {wrong[0]}, but this model has the ids 0 to {rows - 1}")
