"""Traced programs, taken apart."""

from collections.abc import Iterator

from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params


def equations(program: Jaxpr) -> Iterator[JaxprEqn]:
    """Yield the equations of a program, with those of its loops and of other programs in it."""
    for equation in program.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def shapes(program: Jaxpr) -> set[tuple[int, ...]]:
    """Return the shapes of all arrays that a program computes."""
    return {x.aval.shape for equation in equations(program) for x in equation.outvars if hasattr(x.aval, "shape")}
