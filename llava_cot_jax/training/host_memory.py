"""Memory of the process that a training step on a CPU takes its temporaries from."""

import ctypes
import os
import platform
from pathlib import Path

from llava_cot_jax.tpu_chips import count_tpu_chips

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
"""Parameters of glibc's ``mallopt`` (malloc.h): freed bytes at the heap's end above which they go back to the system,
the largest number of blocks that are mapped one by one, and of heaps that threads allocate from."""

_GPUS = ("/dev/nvidiactl", "/dev/kfd")
"""Devices of the drivers of NVIDIA's and AMD's GPUs."""


def keep_freed_memory() -> bool:
    """Let this process keep memory that is freed, for its next allocations. Return whether it does.

    XLA allocates the temporaries of a program anew in each call, and glibc maps blocks of their size one by one, and
    gives each back to the system when it is freed. On a CPU, each training step would so fault in all of its pages
    again, which takes a quarter of its time where the machine is a virtual one. This has an effect on threads that do
    not run yet, and so comes before the first use of jax's devices. Other C libraries than glibc are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(_M_ARENA_MAX, 1), mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, -1)])


def computes_on_cpu() -> bool:
    """Return whether jax will compute on the CPU, as far as can be told before its devices are there."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms.partition(",")[0] == "cpu"
    return not count_tpu_chips() and not any(Path(device).exists() for device in _GPUS)
