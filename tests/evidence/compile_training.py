"""Compile the whole training step of the configurations for their TPUs, on a machine without one: does it fit?

    pip install -e '.[plan]' && python tests/evidence/compile_training.py | tee tests/evidence/compile_training.txt

The step is the real one, splash attention included, for the longest batch (2048 tokens a row, an image of 4 tiles).
The figures come from the compiler: nothing here was run on a TPU. Names of configurations as arguments compile those.
"""

import os

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

import datetime
import importlib.metadata
import re
import sys
import time
from collections import Counter
from pathlib import Path

from jax.experimental import topologies

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from llava_cot_jax.hardware import GIB  # noqa: E402
from llava_cot_jax.model.sharding import make_mesh  # noqa: E402
from llava_cot_jax.train import read_arguments  # noqa: E402
from llava_cot_jax.training.program import make_program  # noqa: E402
from tests.training.abstract import MODELS, abstract_batch  # noqa: E402

SLICES = {
    "llava_cot_11b_lora_v5e_8": ("v5e:2x4", 16),
    "llava_cot_11b_v5e_64": ("v5e:8x8", 16),
    "llava_cot_11b_v6e_16": ("v6e:4x4", 32),
    "llava_cot_11b_v5p_16": ("v5p:2x2x2", 95),
    "llava_cot_90b_v5p_128": ("v5p:4x4x4", 95),
}
"""The slice of each configuration, and the memory of a chip in GiB."""


def compile_for(name: str, topology: str, memory: int) -> None:
    """Print what a chip holds and what moves between chips."""
    settings, _ = read_arguments(["--config", str(ROOT / f"configs/{name}.yaml")])
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    sizes = settings.mesh
    mesh = make_mesh(sizes.data, sizes.fsdp or len(devices) // (sizes.data * sizes.tensor), sizes.tensor, devices)
    config = MODELS[settings.init_from]
    program = make_program(settings, config, mesh, steps=9000, steps_per_epoch=3000)
    batch = abstract_batch(config, settings.loader.batch, settings.chat.max_length, mesh)
    began = time.perf_counter()
    shape = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    print(f"\n{name} on {topology} ({shape}), {settings.loader.batch} rows, {settings.micro_batches} micro-batches")
    try:
        compiled = program.step.lower(program.state, batch).compile()  # type: ignore[attr-defined]
    except Exception as fault:
        print("does not compile:", " ".join(str(fault).split())[:400], flush=True)
        return
    found = compiled.memory_analysis()
    arguments, temporaries = found.argument_size_in_bytes, found.temp_size_in_bytes
    used = arguments + temporaries + found.output_size_in_bytes - found.alias_size_in_bytes
    moves = Counter(re.findall(r" (all-gather|all-reduce|reduce-scatter|all-to-all)(?:-start)?\(", compiled.as_text()))
    print(f"of a chip's {memory * GIB / 1e9:.1f} GB: {used / 1e9:.2f}; arguments {arguments / 1e9:.2f}", end=", ")
    print(f"temporaries {temporaries / 1e9:.2f}, aliased {found.alias_size_in_bytes / 1e9:.2f}")
    print(f"collectives in the text of the program: {dict(moves)}; compiled in {time.perf_counter() - began:.0f} s")
    sys.stdout.flush()


def main() -> None:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "libtpu"))
    print(f"{datetime.date.today()}; {versions}; compiled for TPUs, run on none")
    for name in sys.argv[1:] or SLICES:
        compile_for(name, *SLICES[name])


if __name__ == "__main__":
    main()
