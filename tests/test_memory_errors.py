"""Exhausted memory is one line: real allocations on the host and the device, and the texts of other devices."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_cot_jax import cli
from llava_cot_jax.errors import UserError
from llava_cot_jax.memory_errors import ADVICE, describe_exhausted_memory
from tests.processes import ROOT

EDGE = 1 << 22
"""A square of this edge has 2**44 elements: no machine has so much memory, and no address space holds four of them."""


def outer(x: jax.Array) -> jax.Array:
    return jnp.sort(x[:, None] * x[None], axis=0).sum()


@pytest.mark.parametrize(
    ("allocate", "told"),
    [
        (
            lambda: np.zeros((1 << 24, 1 << 24)),
            "2,251,799.8 GB are needed at once; the largest array is float64 [16777216",
        ),
        (lambda: bytearray(1 << 60), "out of memory"),
        (lambda: jnp.zeros((EDGE, EDGE)), "70,368.7 GB are needed at once"),
        (lambda: jax.device_put(np.broadcast_to(np.float32(1), (EDGE, EDGE))), "70,368.7 GB are needed at once"),
        (lambda: jax.jit(outer)(jnp.ones(EDGE)), "GB are needed at once"),
    ],
)
def test_what_cannot_be_allocated_is_one_line_with_its_size(allocate, told, capsys):
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: jax.block_until_ready(allocate()), command="prepare")
    error = capsys.readouterr().err
    assert (end.value.code, error.count("\n")) == (2, 1)
    assert error.startswith("error: out of memory") and told in error and error.endswith(f". {ADVICE['prepare']}\n")


TPU = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 63.80G \
of 30.75G hbm. Exceeded hbm capacity by 33.05G.

Total hbm usage >= 65.05G:
    reserved          1.25G

  Largest program allocations in hbm:

  1. Size: 2.00G
     Operator: op_name="jit(train_step)"
     Shape: f32[32,4096,4096]{1,2,0:T(8,128)}
"""
GPU = """RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4770354232 bytes.
BufferAssignment OOM Debugging.
Peak buffers:
        Buffer 1:
                Size: 6.00MiB
                Shape: bf16[128,6,256,256]
"""


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (RuntimeError(TPU), ": 68.5 GB are needed of 33.0 GB of hbm; the largest array is f32 [32, 4096, 4096]"),
        (
            RuntimeError("the total memory required by the program (20.5G) exceeds available HBM (15.75G)"),
            ": 22.0 GB are needed of 16.9 GB of HBM",
        ),
        (RuntimeError(GPU), ": 4.8 GB are needed at once; the largest array is bf16 [128, 6, 256, 256]"),
        (
            ValueError(
                "RESOURCE_EXHAUSTED: Error allocating device buffer: Attempting to allocate 196.00M. That was not "
                "possible. There are 60.94M free.; (0x0x0_HBM0)"
            ),
            ": 205.5 MB are needed at once, of which 63.9 MB are free",
        ),
        (RuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory"), ""),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Failed to allocate request for 1.00GiB (1073741824B) on device"),
            ": 1.1 GB are needed at once",
        ),
        (OSError(12, "Cannot allocate memory"), ""),
        (MemoryError(), ""),
    ],
)
def test_texts_of_devices(fault, told):
    assert describe_exhausted_memory(fault) == f"out of memory{told}"
    try:
        raise ValueError("of the library that called it") from fault
    except ValueError as outer_fault:
        assert describe_exhausted_memory(outer_fault) == f"out of memory{told}"


@pytest.mark.parametrize(
    "fault",
    [
        RuntimeError("RESOURCE_EXHAUSTED: Quota exceeded for quota metric 'Read requests'"),
        ValueError("out of memory of times past"),
        OSError(28, "No space left on device"),
        RuntimeError("INVALID_ARGUMENT: shape f32[3,4]"),
        UserError("no such file"),
    ],
)
def test_other_errors_are_others(fault):
    assert describe_exhausted_memory(fault) is None


@pytest.mark.parametrize(
    ("command", "remedies"),
    [
        ("train", ["llava-cot plan", "remat", "grad_accum_steps", "lora.rank", "loader.batch_size"]),
        ("generate", ["--quantize int8", "--num_candidates", "--mesh.tensor"]),
        ("evaluate", ["--quantize int8", "--num_candidates", "--mesh.tensor"]),
        ("rollout", ["--quantize int8", "--slots", "--continuations", "--max_new_tokens", "--mesh.tensor"]),
        ("bench", ["--quantize int8", "--workload.num_candidates"]),
        ("prepare", ["--workers"]),
        ("convert", ["tensor"]),
    ],
)
def test_each_command_names_its_own_remedies(command, remedies):
    """In a process that may have no more memory than it has when its first settings are read."""
    code = (
        "import runpy, sys, numpy as np; from llava_cot_jax import cli;"
        "cli.Parser.parse_args = lambda *_, **__: np.zeros((1 << 24, 1 << 24));"
        f"runpy.run_module('llava_cot_jax.{command}', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith("error: out of memory: 2,251,799.8 GB are needed at once; ")
    assert all(remedy in done.stderr for remedy in remedies)
