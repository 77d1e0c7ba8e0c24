"""TPU slices by their names, and their chips as the TPU compiler knows them where there is no TPU."""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from llava_cot_jax.costs.chips import CHIPS, GIB, Chip
from llava_cot_jax.errors import UserError

if TYPE_CHECKING:
    import jax

MARGIN = 0.03
"""The share of a device's memory that a prediction must leave over before it is taken for a fit."""


@dataclass(frozen=True)
class Generation:
    """A generation of TPUs that can be planned for.

    Attributes:
        name: as in ``v5e:2x4``.
        chip: its figures.
        usable: bytes of a device's memory that the compiler gives to programs, as its own errors say.
        shapes: the slices that are offered up to 256 chips (cloud.google.com/tpu/docs), the smallest first.
        counts_cores: whether the number in an accelerator type as ``v5p-8`` counts cores, two a chip.
    """

    name: str
    chip: Chip
    usable: int
    shapes: tuple[tuple[int, ...], ...]
    counts_cores: bool = False


_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_CUBIC = ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8))

GENERATIONS = {
    name: Generation(name, next(chip for chip in CHIPS if chip.name == f"TPU {name}"), int(usable * GIB), shapes, cores)
    for name, usable, shapes, cores in (
        ("v5e", 15.75, _FLAT, False),
        ("v5p", 95.73, _CUBIC, True),
        ("v6e", 31.24, _FLAT, False),
    )
}


@dataclass(frozen=True)
class Slice:
    """Chips that are connected with one another; several such slices reach each other over the network.

    Attributes:
        generation: of the chips.
        shape: chips along each dimension of a slice.
        count: slices.
    """

    generation: Generation
    shape: tuple[int, ...]
    count: int = 1

    @property
    def chips(self) -> int:
        """Of all slices."""
        return math.prod(self.shape) * self.count

    @property
    def name(self) -> str:
        """As ``parse`` takes it."""
        return f"{f'{self.count}*' if self.count > 1 else ''}{self.generation.name}:{'x'.join(map(str, self.shape))}"

    @property
    def accelerator_type(self) -> str:
        """As gcloud takes it."""
        each = math.prod(self.shape) * (2 if self.generation.counts_cores else 1)
        return f"{f'{self.count}*' if self.count > 1 else ''}{self.generation.name}-{each}"

    def devices(self) -> "Sequence[jax.Device]":
        """The chips, as a program can be compiled for them; the process must have called ``prepare``.

        Raises:
            UserError: no TPU compiler is installed, or it does not know the slice.
        """
        if find_spec("libtpu") is None:
            raise UserError(
                "compiling for a TPU takes its compiler: pip install 'llava_cot_jax[plan]', or --compile false"
            )
        import jax
        from jax.experimental import topologies  # loads the compiler

        alone = {"chips_per_host_bounds": [1, 1, 1]} if math.prod(self.shape) == 1 else {}
        several = {"num_slices": self.count} if self.count > 1 else {}
        shape = f"{self.generation.name}:{'x'.join(map(str, self.shape))}"
        try:
            found = topologies.get_topology_desc(platform="tpu", topology_name=shape, **alone, **several)
        except (jax.errors.JaxRuntimeError, RuntimeError, NotImplementedError) as fault:
            raise UserError(f"the TPU compiler does not know {self.name}: {fault}") from None
        return found.devices


def parse(text: str) -> Slice:
    """A slice by its topology (``v5e:4x8``), by its accelerator type (``v5e-32``), or several (``2*v5e:4x8``).

    Raises:
        UserError: there is no such slice.
    """
    found = re.fullmatch(r"(?:(\d+)\*)?(\w+)(?::(\d+(?:x\d+)+)|-(\d+))", text)
    generation = GENERATIONS.get({"v5litepod": "v5e"}.get(found[2], found[2])) if found else None
    if found is None or generation is None:
        known = ", ".join(GENERATIONS)
        raise UserError(f"{text!r} is no slice: write one as v5e:4x8, v5e-32 or 2*v5e:4x8; known are {known}")
    count = int(found[1] or 1)
    if found[3]:
        shape = tuple(map(int, found[3].split("x")))
    else:
        chips = int(found[4]) // (2 if generation.counts_cores else 1)
        shape = next((shape for shape in generation.shapes if math.prod(shape) == chips), ())
    if shape not in generation.shapes or count < 1:
        names = ", ".join(Slice(generation, shape).name for shape in generation.shapes)
        raise UserError(f"{text!r} is no slice that is offered; those of {generation.name} are {names}")
    return Slice(generation, shape, count)


def prepare() -> None:
    """Let this process load the TPU compiler beside a CPU: call it before jax makes any device."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    os.environ.pop("TPU_ACCELERATOR_TYPE", None)  # the slice that is asked for says it
    import jax

    jax.config.update("jax_platforms", "cpu")  # where jax has been imported before
