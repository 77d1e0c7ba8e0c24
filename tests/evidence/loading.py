"""Measure how fast a checkpoint is loaded as sharded arrays, compared with a plain read of its files, and its memory.

    python tests/evidence/loading.py | tee tests/evidence/loading.txt

The script writes a checkpoint of the published widths with few layers to a temporary folder (4.7 GB; the embedding and
lm_head are as large as the 11B's, 1.05 GB each), and loads it onto 8 simulated CPU devices. Every figure is that of a
fresh process with a warm page cache.
"""

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import numpy as np

REPEATS = 5
MESHES = {"fsdp=8": (1, 8, 1), "2x2x2": (2, 2, 2), "tensor=8": (1, 1, 8)}
STACKED = "fsdp=8, stacked"
STARTED, KNOWN_AGAIN = "start of a run", "the same, digest"
"""Load of the weights and first state of a training run with adapters, without and with the digest of the weights."""
PLAIN, PASSING = "plain read", "read, not kept"
"""Reads in blocks of 8 MiB: into memory of the size of the file, and into memory of the size of a block."""


def main(kinds: list[str]) -> None:
    from llava_cot_jax.model.checkpoint.writing import TensorEntry, write_checkpoint
    from llava_cot_jax.model.config import MllamaConfig, TextConfig, VisionConfig
    from llava_cot_jax.model.parameters import parameters

    print(f"{datetime.date.today()}  Python {platform.python_version()}  " + _versions("jax", "numpy", "safetensors"))
    print(f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores")
    text = TextConfig(num_hidden_layers=5, cross_attention_layers=(3,))
    vision = VisionConfig(num_hidden_layers=4, num_global_layers=1, intermediate_layers_indices=(0, 1, 2, 2, 3))
    config = MllamaConfig(vision=vision, text=text)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "checkpoint"
        bfloat16 = np.dtype("bfloat16")
        entries = [TensorEntry(name, p.shape, bfloat16) for name, p in parameters(config, "unrolled").items()]
        # The writer asks for one value at a time. The bytes do not matter here.
        noise = np.random.default_rng(0).integers(0, 0x7F80, max(e.nbytes for e in entries) // 2, np.uint16)
        values = (noise[: e.nbytes // 2].view(bfloat16).reshape(e.shape) for e in entries)
        write_checkpoint(folder, config, entries, values)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        largest = max(e.nbytes for e in entries)
        print(f"checkpoint: {size / 1e9:.2f} GB in bfloat16, largest tensor {largest / 1e9:.2f} GB")
        runs: dict[str, list[dict[str, float]]] = {}
        order = random.Random(0)
        kinds = kinds or [PLAIN, PASSING, *MESHES, STACKED, STARTED, KNOWN_AGAIN]
        for _ in range(REPEATS):
            # Memory that another process has just freed is cheaper than fresh memory, so the order is random.
            for what in order.sample(kinds, len(kinds)):
                runs.setdefault(what, []).append(_measured(folder, what))
    print(f"\nmedian of {REPEATS} (fastest to slowest)")
    for what in kinds:
        results = runs[what]
        seconds = sorted(result["seconds"] for result in results)
        median = statistics.median(seconds)
        line = f"{what:16} {median:6.2f} s ({seconds[0]:.2f} to {seconds[-1]:.2f})  {size / median / 1e9:5.2f} GB/s"
        if what not in (PLAIN, PASSING) and PLAIN in kinds:
            plain = statistics.median(result["seconds"] for result in runs[PLAIN])
            beyond = max(result["beyond"] for result in results)
            line += f"  {plain / median:4.0%} of a plain read; peak memory beyond the arrays {beyond / 1e6:5.0f} MB"
        print(line)


def _versions(*packages: str) -> str:
    return "  ".join(f"{package} {version(package)}" for package in packages)


def _measured(folder: Path, what: str) -> dict[str, float]:
    """Return one measurement, made in a process of its own."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, __file__, "--measure", str(folder), what]
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def measure(folder: Path, what: str) -> dict[str, float]:
    """Measure seconds and, of a load, the peak memory in bytes beyond the arrays and what was there before."""
    import jax

    from llava_cot_jax.model.checkpoint.digest import WeightsDigest
    from llava_cot_jax.model.checkpoint.folder import read_config
    from llava_cot_jax.model.checkpoint.sharded_loading import load_params
    from llava_cot_jax.model.sharding import make_mesh
    from llava_cot_jax.training.program import make_program
    from llava_cot_jax.training.settings import LoraSettings, TrainSettings

    if what in (PLAIN, PASSING):
        return {"seconds": _plain_read(folder / "model.safetensors", keep=what == PLAIN)}
    config = read_config(folder)
    stacked = what in (STACKED, STARTED, KNOWN_AGAIN)
    mesh = make_mesh(*MESHES["fsdp=8" if stacked else what])
    jax.block_until_ready(jax.device_put(0.0, jax.devices()[0]))  # the backend starts before the clock does
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _memory("VmRSS")
    start = time.perf_counter()
    arrays = load_params(folder, config, layout="stacked" if stacked else "unrolled", mesh=mesh)
    if what in (STARTED, KNOWN_AGAIN):
        with WeightsDigest(folder) if what == KNOWN_AGAIN else nullcontext() as digest:
            settings = TrainSettings("run", str(folder), "data", lora=LoraSettings(rank=16))
            int(make_program(settings, config, mesh, steps=1, steps_per_epoch=1).init_state(dict(arrays)).step)
            if digest:
                digest.result()
    seconds = time.perf_counter() - start
    # Replicas on simulated devices share one buffer, so each distinct shard counts once.
    buffers = {
        shard.data.unsafe_buffer_pointer(): shard.data.nbytes for x in arrays.values() for shard in x.addressable_shards
    }
    return {"seconds": seconds, "beyond": _memory("VmHWM") - before - sum(buffers.values())}


def _plain_read(path: Path, keep: bool) -> float:
    """Return the seconds to read a file in blocks, into fresh memory of its size or always into the same block."""
    block = 8 << 20
    start = time.perf_counter()
    buffer = bytearray(block) if not keep else np.empty(path.stat().st_size, np.uint8).data
    with path.open("rb", buffering=0) as file:
        place = 0
        while count := file.readinto(buffer[place : place + block] if keep else buffer):
            place += count
    return time.perf_counter() - start


def _memory(field: str) -> int:
    """Return VmRSS (resident memory) or VmHWM (its peak) of this process in bytes, as the kernel counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "KIND"), help="Measure one kind of load, or a read.")
    parser.add_argument("--kinds", nargs="*", default=[], help="Kinds to measure. By default, all are.")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(Path(options.measure[0]), options.measure[1])))
    else:
        main(options.kinds)
