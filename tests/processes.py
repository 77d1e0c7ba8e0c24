"""What tests, and the processes that they start, are run with."""

import atexit
import json
import os
import shutil
import socket
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

WITHOUT_TORCH = f"{ROOT}{os.pathsep}{ROOT / 'tests/without_torch'}"
"""A PYTHONPATH of processes that need no more than a user's would."""


def xla_flags(devices: int, *, quick: bool = True) -> str:
    """XLA_FLAGS for so many simulated devices; ``quick`` to compile, as most programs are run once or twice."""
    flags = [f"--xla_force_host_platform_device_count={devices}"]
    if quick:
        flags += ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
        if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # later ones end on a flag that is gone
            flags += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
    return " ".join(flags)


def keep_compiled_programs() -> None:
    """Set the folder of compiled programs that the processes of this session share: an empty one, removed at its end.

    Where ``JAX_COMPILATION_CACHE_DIR`` is set already, that folder is used and kept, and later sessions are faster. jax
    finds a program in it by all that decides what is compiled: the program itself, the versions, flags and devices.
    """
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the workers of pytest-xdist inherit it
        folder = tempfile.mkdtemp(prefix="compiled-for-tests-")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
        atexit.register(shutil.rmtree, folder, ignore_errors=True)


def free_port() -> int:
    """A port at which a process may listen."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def reports_of(workers: list[subprocess.Popen[str]]) -> list[dict[str, Any]]:
    """What each process prints as JSON in its last line. None of them is left, and none may fail."""
    try:
        outputs = [worker.communicate(timeout=900) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, (_, errors) in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, errors[-3000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]
