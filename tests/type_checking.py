"""Checks of arrays and of trees of arrays while tests run: jaxtyping's annotations, checked by beartype."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, get_args

from beartype import BeartypeConf, FrozenDict, beartype
from beartype.vale import IsInstance
from jaxtyping import AbstractArray, Array, PyTree, install_import_hook

CHECKED = [
    "llava_cot_jax.model",
    "llava_cot_jax.inference",
    "llava_cot_jax.search.program",
    "llava_cot_jax.search.judge",
    "llava_cot_jax.search.tournament",
    "llava_cot_jax.search.random_keys",
    "llava_cot_jax.training.loss",
]

WHOLE_TREES = BeartypeConf(
    hint_overrides=FrozenDict({Mapping[str, PyTree[Array]]: Annotated[Mapping[str, Any], IsInstance[PyTree[Array]]]})
)
"""Checks every leaf of ``parameters.Params``; by itself, beartype looks at one item of a mapping."""


def check_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check a function's arguments and result, where it has annotations of array shapes or of trees of arrays.

    The fields of dataclasses are not checked, since JAX also makes those dataclasses of placeholders.
    """
    checked = function.__name__ != "__init__" and any(map(_is_of_arrays, function.__annotations__.values()))
    return beartype(conf=WHOLE_TREES)(function) if checked else function


def _is_of_arrays(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray | PyTree):
        return True
    return any(map(_is_of_arrays, get_args(annotation)))


def install() -> None:
    """Check the functions of ``CHECKED``, whose modules must not be imported yet."""
    install_import_hook(CHECKED, f"{__name__}.{check_function.__name__}")
