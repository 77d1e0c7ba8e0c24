"""Memory that a training step on a CPU uses again, by the page faults of a process."""

import os
import platform
import subprocess
import sys

import pytest

from llava_cot_jax.training.host_memory import computes_on_cpu

PROGRAM = """
import resource, sys
from llava_cot_jax.training.host_memory import computes_on_cpu, keep_freed_memory

assert computes_on_cpu()
if sys.argv[1] == "kept":
    assert keep_freed_memory()
import jax, jax.numpy as jnp

@jax.jit
def step(x):  # its temporary has 64 MiB, or 16,384 pages
    return jnp.sin(jnp.outer(x, x)) @ jnp.ones((4096, 8))

x = jnp.ones(4096)
for _ in range(40):  # until the heap has its final size
    step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(12):
    step(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_temporaries_of_a_step_are_faulted_in_once():
    faults = {}
    for name in ("given back", "kept"):
        environment = {key: value for key, value in os.environ.items() if "MALLOC" not in key.upper()}
        command = [sys.executable, "-c", PROGRAM, name]
        environment |= {"JAX_PLATFORMS": "cpu"}
        faults[name] = int(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)
    # Of twelve steps, all fault in their temporary anew, or two at the most: the heap may still grow by one.
    assert faults["kept"] < 2.5 * 16384 and faults["given back"] > 11.5 * 16384


@pytest.mark.parametrize(("platforms", "is_cpu"), [("cpu", True), ("cpu,cuda", True), ("cuda,cpu", False)])
def test_the_platform_that_is_asked_for(monkeypatch, platforms, is_cpu):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert computes_on_cpu() == is_cpu
