"""TPU slices by their names, and their chips as devices that programs can be compiled for without a TPU."""

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

HBM_MARGIN = 0.03
"""Share of a device's memory that a prediction must leave free before the program is taken to fit."""


@dataclass(frozen=True)
class TpuGeneration:
    """A generation of TPUs that can be planned for.

    Attributes:
        name: Name as in ``v5e:2x4``.
        chip: Figures of its chip.
        usable_hbm_bytes: Bytes of a device's HBM that the compiler gives to programs, as its own errors say.
        shapes: Shapes of the slices with up to 256 chips that are offered (cloud.google.com/tpu/docs), smallest first.
        counts_cores: Whether the number in an accelerator type, as in ``v5p-8``, counts cores, of which a chip has two.
    """

    name: str
    chip: Chip
    usable_hbm_bytes: int
    shapes: tuple[tuple[int, ...], ...]
    counts_cores: bool = False


_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_CUBIC = ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8))

GENERATIONS = {
    name: TpuGeneration(name, next(chip for chip in CHIPS if chip.name == f"TPU {name}"), int(gib * GIB), shapes, cores)
    for name, gib, shapes, cores in (
        ("v5e", 15.75, _FLAT, False),
        ("v5p", 95.73, _CUBIC, True),
        ("v6e", 31.24, _FLAT, False),
    )
}


@dataclass(frozen=True)
class Slice:
    """One or several equal slices: chips connected over ICI, and slices connected over DCN.

    Attributes:
        generation: Generation of the chips.
        shape: Number of chips along each dimension of a slice.
        num_slices: Number of slices.
    """

    generation: TpuGeneration
    shape: tuple[int, ...]
    num_slices: int = 1

    @property
    def chips(self) -> int:
        """Number of chips in all slices."""
        return math.prod(self.shape) * self.num_slices

    @property
    def name(self) -> str:
        """Name as in ``v5e:4x8`` or ``2*v5e:4x8``, which ``parse_topology`` takes."""
        return f"{self._multiplier}{self.generation.name}:{'x'.join(map(str, self.shape))}"

    @property
    def accelerator_type(self) -> str:
        """Accelerator type as in ``v5e-32`` or ``2*v5e-32``, which gcloud takes."""
        each = math.prod(self.shape) * (2 if self.generation.counts_cores else 1)
        return f"{self._multiplier}{self.generation.name}-{each}"

    @property
    def _multiplier(self) -> str:
        return f"{self.num_slices}*" if self.num_slices > 1 else ""

    def devices(self) -> "Sequence[jax.Device]":
        """Return the chips as devices that a program can be compiled for.

        The process must have called ``enable_tpu_compiler``.

        Raises:
            UserError: No TPU compiler is installed, or it does not know the slice.
        """
        if find_spec("libtpu") is None:
            raise UserError(
                "compiling for a TPU takes its compiler: pip install 'llava_cot_jax[plan]', or --compile false"
            )
        import jax
        from jax.experimental import topologies  # loads the compiler

        alone = {"chips_per_host_bounds": [1, 1, 1]} if math.prod(self.shape) == 1 else {}
        several = {"num_slices": self.num_slices} if self.num_slices > 1 else {}
        shape = f"{self.generation.name}:{'x'.join(map(str, self.shape))}"
        try:
            found = topologies.get_topology_desc(platform="tpu", topology_name=shape, **alone, **several)
        except (jax.errors.JaxRuntimeError, RuntimeError, NotImplementedError) as fault:
            raise UserError(f"the TPU compiler does not know {self.name}: {fault}") from None
        return found.devices


def parse_topology(text: str) -> Slice:
    """Parse a topology (``v5e:4x8``), an accelerator type (``v5e-32``), or several of either (``2*v5e:4x8``).

    Raises:
        UserError: There is no such slice.
    """
    found = re.fullmatch(r"(?:(\d+)\*)?(\w+)(?::(\d+(?:x\d+)+)|-(\d+))", text)
    generation = GENERATIONS.get({"v5litepod": "v5e"}.get(found[2], found[2])) if found else None
    if found is None or generation is None:
        known = ", ".join(GENERATIONS)
        raise UserError(f"{text!r} is no slice: write it as v5e:4x8, v5e-32 or 2*v5e:4x8; known generations: {known}")
    count = int(found[1] or 1)
    if found[3]:
        shape = tuple(map(int, found[3].split("x")))
    else:
        chips = int(found[4]) // (2 if generation.counts_cores else 1)
        shape = next((shape for shape in generation.shapes if math.prod(shape) == chips), ())
    if shape not in generation.shapes or count < 1:
        names = ", ".join(Slice(generation, shape).name for shape in generation.shapes)
        raise UserError(f"{text!r} is no slice that is offered; slices of {generation.name}: {names}")
    return Slice(generation, shape, count)


def enable_tpu_compiler() -> None:
    """Let this process load the TPU compiler on a machine with a CPU only. Call it before jax creates its devices."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    os.environ.pop("TPU_ACCELERATOR_TYPE", None)  # the topology that is asked for decides it
    import jax

    jax.config.update("jax_platforms", "cpu")  # where jax has been imported before
