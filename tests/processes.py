"""What tests, and the processes that they start, are run with."""

import os
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]

WITHOUT_TORCH = f"{ROOT}{os.pathsep}{ROOT / 'tests/without_torch'}"
"""A PYTHONPATH of processes that need no more than a user's would."""


def xla_flags(devices: int, *, quick: bool = True) -> str:
    """XLA_FLAGS for so many simulated devices; ``quick`` to compile, as most programs are run once or twice."""
    flags = [f"--xla_force_host_platform_device_count={devices}"]
    if quick:
        flags += ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
        if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # later ones end on a flag that is gone
            flags += ["--xla_cpu_use_fusion_emitters=false"]
    return " ".join(flags)
