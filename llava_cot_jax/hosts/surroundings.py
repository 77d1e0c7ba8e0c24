"""Packages, source files and flags of the compiler that each process of a run brings with it."""

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from llava_cot_jax.files import short_digest

COMPARED_PACKAGES = (
    "llava_cot_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "transformers",
    "tokenizers",
    "pillow",
    "libtpu",
    "jax-cuda13-plugin",
)
"""Packages whose versions must be the same in all processes."""

HOSTS_OWN_JAX_VARIABLES = re.compile(
    "CACHE|COORDINATOR|PROCESS|PARTITION_INDEX|SLICE_INDEX|LOCAL_DEVICE|VISIBLE_DEVICES|LOG|DUMP|DEBUG|TRACEBACK|PROFIL|PROXY"
)
"""Environment variables of jax, by a part of their names, that may differ between hosts.

They say where a process is, keeps its programs and reports. All others may change what a program computes.
"""

FLAG_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
"""Environment variables of flags for the compiler, among which those of its dumps may differ."""


def surroundings() -> dict[str, str]:
    """Return the versions, source files and compiler flags of this process, by name."""
    fields = {"the version of python": platform.python_version()}
    fields |= {f"the version of {name}": package_version(name) for name in COMPARED_PACKAGES}
    package = Path(__file__).parents[1]
    sources = sorted(path for path in package.rglob("*") if path.suffix in (".py", ".yaml"))
    fields |= {f"the digest of {path.relative_to(package.parent)}": short_digest(path.read_bytes()) for path in sources}
    jax_variables = (name for name in os.environ if name.startswith("JAX_"))
    fields |= {name: os.environ[name] for name in jax_variables if not HOSTS_OWN_JAX_VARIABLES.search(name)}
    for variable in FLAG_VARIABLES:
        for flag in os.environ.get(variable, "").split():
            name, _, value = flag.partition("=")
            if not name.startswith("--xla_dump"):
                fields[f"{name} in {variable}"] = value or "set"
    return fields


def device_fields() -> dict[str, str]:
    """Return the number and the kind of this process's devices, by name."""
    import jax

    return {
        "the number of devices of a process": str(jax.local_device_count()),
        "the kind of devices": jax.local_devices()[0].device_kind,
    }


def package_version(name: str) -> str:
    """Return the version of a package, or "not installed"."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
