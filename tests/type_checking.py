"""Checks of array shapes and dtypes while tests run: jaxtyping's annotations, checked by beartype."""

from collections.abc import Callable
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray, install_import_hook

CHECKED = [
    "llava_cot_jax.model",
    "llava_cot_jax.inference",
    "llava_cot_jax.search.program",
    "llava_cot_jax.search.judge",
    "llava_cot_jax.search.tournament",
    "llava_cot_jax.search.random_keys",
]


def check_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check a function's arguments and result, where it has annotations of array shapes.

    The fields of dataclasses are not checked, since JAX also makes those dataclasses of placeholders.
    """
    checked = function.__name__ != "__init__" and any(map(_is_of_arrays, function.__annotations__.values()))
    return beartype(function) if checked else function


def _is_of_arrays(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return True
    return any(map(_is_of_arrays, get_args(annotation)))


def install() -> None:
    """Check the functions of ``CHECKED``, whose modules must not be imported yet."""
    install_import_hook(CHECKED, f"{__name__}.{check_function.__name__}")
