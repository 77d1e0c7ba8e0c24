"""Compilation for TPUs on a machine without one: the memory of a program, what it sends, and whether it fits."""

import functools
import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import jax

from llava_cot_jax import cli
from llava_cot_jax.files import cache_folder, keeping_in_cache, read_json, write_json
from llava_cot_jax.planning.collectives import Collective, find_collectives
from llava_cot_jax.planning.slices import Slice

COMPILER = ("jax", "jaxlib", "libtpu")
"""Packages whose versions a compiled program depends on."""

FORMAT = 2
"""Version of the format of cached results."""


@dataclass(frozen=True)
class CompiledProgram:
    """Figures of a program from the TPU compiler. All sizes are bytes per device.

    Attributes:
        arguments: Bytes of the arguments.
        results: Bytes of the results.
        aliased: Bytes of those results that take the place of arguments.
        temporaries: Bytes of temporaries at the peak.
        code: Bytes of the program's code.
        seconds: Seconds that compiling took.
        collectives: Collectives of the program; None where the compiler cannot print the program.
        error: Error of the compiler where it could not compile the program; None where it could. All sizes are 0
            where there is an error.
    """

    arguments: int = 0
    results: int = 0
    aliased: int = 0
    temporaries: int = 0
    code: int = 0
    seconds: float = 0.0
    collectives: tuple[Collective, ...] | None = None
    error: str | None = None

    @property
    def bytes(self) -> int:
        """Bytes of a device's memory without those of the program's code."""
        return self.arguments + self.results - self.aliased + self.temporaries

    def headroom(self, slice_: Slice) -> int:
        """Bytes of a device's memory that the program and its code leave free; negative where it does not fit."""
        return -1 if self.error else slice_.generation.usable_hbm_bytes - self.bytes - self.code


def compiler_versions() -> dict[str, str]:
    """Return the versions of the packages that a compiled program depends on."""
    return {name: version(name) for name in COMPILER}


def compile_for(
    slice_: Slice, mesh: Mapping[str, int], lower: Callable[[], jax.stages.Lowered], name: str
) -> CompiledProgram:
    """Compile a program for a slice, or return the cached figures of the same text, slice, mesh and versions.

    Args:
        slice_: Slice to compile for.
        mesh: Number of devices along each mesh axis.
        lower: Function that lowers the program.
        name: Name of the program, which is shown while it compiles.
    """
    lowered = lower()
    context = json.dumps([FORMAT, compiler_versions(), slice_.name, dict(mesh)])
    key = hashlib.sha256((context + lowered.as_text()).encode()).hexdigest()[:32]
    folder = cache_folder("plans")
    cached = folder / f"{key}.json" if folder else None
    if cached and cached.is_file():
        return _from_json(read_json(cached))
    with cli.status(f"compiling {name} for {slice_.name}: this takes minutes"):
        program = cli.run_interruptible(functools.partial(_compile, lowered, mesh))
    if cached:
        with keeping_in_cache(cached.parent, "plans"):
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_json(cached, asdict(program), shared=True)
    return program


def _compile(lowered: jax.stages.Lowered, mesh: Mapping[str, int]) -> CompiledProgram:
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return CompiledProgram(seconds=time.perf_counter() - began, error=_summarize_error(str(error)))
    seconds = time.perf_counter() - began
    memory: Any = compiled.memory_analysis()
    return CompiledProgram(
        arguments=memory.argument_size_in_bytes,
        results=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        seconds=seconds,
        collectives=_read_collectives(compiled, mesh),
    )


def _read_collectives(compiled: jax.stages.Compiled, mesh: Mapping[str, int]) -> tuple[Collective, ...] | None:
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:  # some programs for v5p: libtpu 0.0.52 writes what jaxlib 0.10.2 does not read
        return None
    return tuple(find_collectives(text or "", mesh))


def _summarize_error(error: str) -> str:
    """Return a compiler error as one short line."""
    found = re.search(r"the total memory required.*?\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", error)
    return f"needs more than {found[1]} of {found[2]} GiB" if found else " ".join(error.split())[:300]


def _from_json(fields: dict[str, Any]) -> CompiledProgram:
    collectives = fields.pop("collectives")
    return CompiledProgram(**fields, collectives=collectives and tuple(Collective(**each) for each in collectives))
