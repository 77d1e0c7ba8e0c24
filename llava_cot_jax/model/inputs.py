"""Arrays that a user gives to a model, in whatever form they come."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llava_cot_jax.checks import check_instance, shown
from llava_cot_jax.errors import UserError

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
