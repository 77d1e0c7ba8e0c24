"""Parameters of a model before any training, drawn where they will be held."""

import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from llava_cot_jax.model.parameters import Initializer, Parameter, initial_values
from llava_cot_jax.model.sharding import parameter_sharding, without_surroundings


def init_params(
    table: Mapping[str, Parameter], key: PRNGKeyArray, dtype: Any, mesh: Mesh | None
) -> dict[str, jax.Array]:
    """Return the initial arrays of the parameters in ``table``, by their paths, sharded over ``mesh``.

    The random draw of a tensor is keyed by its name, so it is the same in either layout.

    Raises:
        UserError: The mesh does not divide a parameter.
    """
    with without_surroundings():
        return {path: _init_param(parameter, key, dtype, mesh) for path, parameter in table.items()}


def _init_param(parameter: Parameter, key: PRNGKeyArray, dtype: Any, mesh: Mesh | None) -> jax.Array:
    ids = np.array([zlib.crc32(tensor.encode()) for tensor in parameter.tensors], np.uint32)
    sharding = None if mesh is None else parameter_sharding(parameter, mesh)
    shape, stacked = parameter.tensor_shape, parameter.stacked
    return _initializer(shape, parameter.initializer, parameter.std, dtype, stacked, sharding)(key, ids)


@functools.cache  # a model has some thirty distinct kinds of tensor: one compilation each
def _initializer(
    shape: tuple[int, ...], initializer: Initializer, std: float, dtype: Any, stacked: bool, sharding: Any
) -> Callable[[jax.Array, np.ndarray], jax.Array]:
    def draw(key: jax.Array, ids: jax.Array) -> jax.Array:
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)
        tensors = jax.vmap(lambda key: initial_values(shape, initializer, std, key, dtype))(keys)
        return tensors if stacked else tensors[0]

    return jax.jit(draw, out_shardings=sharding)
