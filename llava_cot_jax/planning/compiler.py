"""Programs compiled for TPUs on a machine without one: what they hold, what they send, and whether they fit."""

import functools
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from llava_cot_jax import cli
from llava_cot_jax.paths import cache_folder
from llava_cot_jax.planning.collectives import Collective, collectives
from llava_cot_jax.planning.slices import Slice

COMPILER = ("jax", "jaxlib", "libtpu")
"""The packages on whose versions a compiled program depends."""

FORMAT = 1
"""Of what is kept: raised when it changes."""


@dataclass(frozen=True)
class Compiled:
    """What the TPU compiler says of a program; bytes are of one device.

    Attributes:
        arguments: of what is given to it.
        results: of what it gives back.
        aliased: of the results, what takes the place of arguments.
        temporaries: at the worst moment, besides these.
        code: of the program itself.
        seconds: that compiling it took.
        exchanges: its collectives; None where the compiler cannot print the program.
        fault: why it could not be compiled, in the compiler's words; None where it was. All else is 0 then.
    """

    arguments: int = 0
    results: int = 0
    aliased: int = 0
    temporaries: int = 0
    code: int = 0
    seconds: float = 0.0
    exchanges: tuple[Collective, ...] | None = None
    fault: str | None = None

    @property
    def bytes(self) -> int:
        """Of a device's memory, but for the program's code."""
        return self.arguments + self.results - self.aliased + self.temporaries

    def room(self, slice_: Slice) -> int:
        """Bytes of a device's memory that are left over, the program's code counted; below 0 where it does not fit."""
        return -1 if self.fault else slice_.generation.usable - self.bytes - self.code


def versions() -> dict[str, str]:
    """Of the packages that a compiled program depends on."""
    return {name: version(name) for name in COMPILER}


def compile_for(slice_: Slice, mesh: Mapping[str, int], lower: Callable[[], jax.stages.Lowered], what: str) -> Compiled:
    """Compile a program, or find what came of the very same one earlier: the same text, slice and versions.

    Args:
        slice_: that it is compiled for.
        mesh: devices along each axis.
        lower: makes the program.
        what: to tell the user that is waiting.
    """
    lowered = lower()
    about = json.dumps([FORMAT, versions(), slice_.name, dict(mesh)])
    key = hashlib.sha256((about + lowered.as_text()).encode()).hexdigest()[:32]
    kept = _folder() / f"{key}.json"
    if kept.is_file():
        return _from_json(json.loads(kept.read_text()))
    with cli.status(f"compiling {what} for {slice_.name}: this takes minutes"):
        found = cli.heard(functools.partial(_compile, lowered, mesh))
    kept.parent.mkdir(parents=True, exist_ok=True)
    beside = kept.with_suffix(f".{os.getpid()}")
    beside.write_text(json.dumps(asdict(found)))
    beside.replace(kept)
    return found


def _compile(lowered: jax.stages.Lowered, mesh: Mapping[str, int]) -> Compiled:
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as fault:
        return Compiled(seconds=time.perf_counter() - began, fault=_in_short(str(fault)))
    seconds = time.perf_counter() - began
    memory: Any = compiled.memory_analysis()
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        results=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        seconds=seconds,
        exchanges=_exchanges(compiled, mesh),
    )


def _exchanges(compiled: jax.stages.Compiled, mesh: Mapping[str, int]) -> tuple[Collective, ...] | None:
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:  # some programs for v5p: libtpu 0.0.52 writes what jaxlib 0.10.2 does not read
        return None
    return tuple(collectives(text or "", mesh))


def _in_short(fault: str) -> str:
    """The compiler's error without what follows from it."""
    found = re.search(r"the total memory required.*?\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", fault)
    return f"needs more than {found[1]} of {found[2]} GiB" if found else " ".join(fault.split())[:300]


def _from_json(kept: dict[str, Any]) -> Compiled:
    exchanges = kept.pop("exchanges")
    return Compiled(**kept, exchanges=exchanges and tuple(Collective(**each) for each in exchanges))


def _folder() -> Path:
    return cache_folder() / "plans"
