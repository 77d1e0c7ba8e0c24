"""Checks of array shapes and dtypes while tests run: jaxtyping's annotations, checked by beartype."""

import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, get_args

import jaxtyping
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

jaxtyped = jaxtyping.jaxtyped


def check_once(*, typechecker: Callable[..., Any]) -> Callable[..., Any]:
    """Return a decorator that checks a function's arguments and result once for each combination of shapes and dtypes.

    A check of every call would double the time of tracing. Functions without annotations of array shapes or of trees
    of arrays are not checked, nor are the fields of dataclasses, since JAX also makes those of placeholders.
    """

    def decorate(function: Any) -> Any:
        if isinstance(function, type) or not any(map(_is_of_arrays, getattr(function, "__annotations__", {}).values())):
            return function
        checked, seen = jaxtyped(function, typechecker=typechecker), set()

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            signature = (*map(_signature, args), *((name, _signature(value)) for name, value in kwargs.items()))
            if signature in seen:
                return function(*args, **kwargs)
            result = checked(*args, **kwargs)
            seen.add(signature)
            return result

        return call

    return decorate


def _signature(argument: Any) -> tuple[Any, ...]:
    """Return what decides whether an argument passes: the types, shapes and dtypes of its arrays."""
    if isinstance(argument, Mapping):
        return tuple((name, _signature(value)) for name, value in argument.items())
    is_array = hasattr(argument, "shape") and hasattr(argument, "dtype")
    return type(argument), *((argument.shape, argument.dtype) if is_array else ())


def _is_of_arrays(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray | PyTree):
        return True
    return any(map(_is_of_arrays, get_args(annotation)))


def check_types(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check a function's arguments and result against its annotations."""
    return beartype(conf=WHOLE_TREES)(function)


def install() -> None:
    """Check the functions of ``CHECKED``, whose modules must not be imported yet."""
    jaxtyping.jaxtyped = check_once  # type: ignore[assignment]
    install_import_hook(CHECKED, f"{__name__}.{check_types.__name__}")
