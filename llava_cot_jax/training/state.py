"""State of a training run: its arrays, their shardings, and the choice of those that are trained."""

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int32

from llava_cot_jax.errors import UserError
from llava_cot_jax.model.parameters import Parameter
from llava_cot_jax.model.sharding import parameter_sharding
from llava_cot_jax.training.optimizer import Optimizer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a run holds between two steps.

    Attributes:
        step: Number of steps done.
        trained: Arrays that training changes, by path: parameters of the model in the stacked layout, or adapters.
        frozen: Other parameters of the model, by path.
        optimizer: State of the optimizer, such as the moments of the trained arrays.
        skipped: Number of steps whose loss or gradient was not finite. They advance ``step``, but neither the
            optimizer nor the learning rate schedule.
    """

    step: Int32[Array, ""]
    trained: dict[str, jax.Array]
    frozen: dict[str, jax.Array]
    optimizer: Any
    skipped: Int32[Array, ""]

    @classmethod
    def init(
        cls,
        trained: Mapping[str, jax.Array],
        frozen: Mapping[str, jax.Array],
        optimizer: Optimizer,
        dtype: Any,
        shardings: Any = None,
    ) -> Self:
        """Make the state before the first step.

        Args:
            trained: Arrays to train, by path.
            frozen: Other parameters of the model, by path. They keep their dtypes.
            optimizer: Optimizer of the run.
            dtype: Dtype in which trained arrays and the optimizer's state are kept.
            shardings: Shardings of the state's arrays, as ``state_sharding`` returns them. By default, all new arrays
                are on one device.
        """
        kept = {path: array.astype(dtype) for path, array in trained.items()}
        zero, init_optimizer = jnp.int32(0), jax.jit(optimizer.init)
        if shardings is not None:
            zero = jax.device_put(zero, shardings.step)
            init_optimizer = jax.jit(optimizer.init, out_shardings=shardings.optimizer)
        return cls(zero, kept, dict(frozen), init_optimizer(kept), zero.copy())


def state_sharding(state: TrainState, table: Mapping[str, Parameter], mesh: Mesh) -> Any:
    """Return the shardings of a state's arrays, in a tree of its structure.

    Parameters and their moments are sharded as ``table`` declares, and everything else is on every device.

    Raises:
        UserError: The mesh does not divide a parameter.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name: Any = getattr(path[-1], "key", None)
        return parameter_sharding(table[name], mesh) if name in table else NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, state)


def frozen_paths(paths: Collection[str], patterns: Sequence[str]) -> set[str]:
    """Return the paths in which any of the regular expressions is found.

    Raises:
        UserError: A pattern is no regular expression or matches nothing, or nothing is left to train.
    """
    found = {path for pattern in patterns for path in matching_paths(paths, pattern, "frozen_params")}
    if len(found) == len(paths):
        raise UserError("every parameter is frozen: leave one to train")
    return found


def matching_paths(paths: Collection[str], pattern: str, setting: str, kind: str = "parameter") -> set[str]:
    """Return the paths in which a regular expression is found.

    Args:
        paths: Paths of parameters.
        pattern: Regular expression, which may match anywhere in a path.
        setting: Name of the setting that holds the pattern, for the error.
        kind: What the paths are of, for the error.

    Raises:
        UserError: The pattern is no regular expression, or matches nothing.
    """
    try:
        found = {path for path in paths if re.search(pattern, path)}
    except re.error as fault:
        raise UserError(f"{setting}: {pattern!r} is no regular expression: {fault}") from None
    if not found:
        raise UserError(
            f"{setting}: {pattern!r} matches no {kind}; the nearest are {', '.join(_nearest(paths, pattern))}"
        )
    return found


def _nearest(paths: Collection[str], pattern: str, count: int = 3) -> list[str]:
    """Return the names that are most like a pattern, at most one of those that differ by their numbers alone."""
    words = re.findall(r"[A-Za-z]\w*", re.sub(r"\\[A-Za-z]", "", pattern)) or [pattern]

    def likeness(path: str) -> float:
        parts = path.split(".")
        return sum(max(difflib.SequenceMatcher(None, word, part).ratio() for part in parts) for word in words)

    kinds: dict[str, str] = {}
    for path in sorted(paths, key=likeness, reverse=True):
        kinds.setdefault(re.sub(r"\d+", "", path), path)
    return list(kinds.values())[:count]
