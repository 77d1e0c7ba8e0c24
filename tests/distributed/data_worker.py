"""One process of several that stream the same batches; writes what its devices got as JSON.

python data_worker.py PROCESS PROCESSES PORT SCRATCH MOST_WORKERS
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llava_cot_jax.data.loader import Loader
from llava_cot_jax.data.settings import ChatSettings, LoaderSettings
from tests.data.rows import Noise, demo_processor

DEVICES = 4
BATCH = 8
RANGES = [(0, 24), (7, 15)]  # two epochs of 12 batches; the second from the middle of one into the next
ORDERS = {"in order": [0, 1, 2, 3], "interleaved": [0, 2, 1, 3]}


class Counted(Noise):
    """Notes the rows that this process reads."""

    read: list[int] = []  # noqa: RUF012 - shared on purpose

    def __getitem__(self, index):
        Counted.read.append(index)
        return super().__getitem__(index)


def shards(batch: dict[str, jax.Array]) -> dict[str, str]:
    """The digest of each shard that this process holds, by array and place."""
    return {
        f"{name} {[s.indices(n)[:2] for s, n in zip(shard.index, array.shape, strict=True)]}": hashlib.sha256(
            np.asarray(shard.data).tobytes() + str((shard.data.dtype, shard.data.shape)).encode()
        ).hexdigest()
        for name, array in batch.items()
        for shard in array.addressable_shards
    }


def main() -> None:
    process, processes, port = map(int, sys.argv[1:4])
    if processes > 1:
        jax.distributed.initialize(f"localhost:{port}", processes, process)
    assert jax.device_count() == DEVICES and jax.local_device_count() == DEVICES // processes
    scratch, all_workers = Path(sys.argv[4]), range(int(sys.argv[5]) + 1)
    found: dict[str, Any] = {}
    for order, places in ORDERS.items():
        devices = np.array(jax.devices())[places].reshape(2, 2, 1)
        mesh = Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
        sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        for workers in all_workers if order == "in order" else (0,):
            settings = LoaderSettings(batch_size=BATCH, pad_to_multiple_of=16, num_workers=workers, num_threads=2)
            loader = Loader(Counted(100), demo_processor(), ChatSettings(), settings, sharding, cache=scratch / "cache")
            assert loader.batches_per_epoch == 12
            for start, stop in RANGES if workers < 2 else RANGES[:1]:  # a worker takes seconds to start
                Counted.read.clear()
                batches = [shards(batch) for batch in loader.batches(start, stop)]
                found[f"{order}, {workers} workers, {start} to {stop}"] = batches
                found[f"{order}, {workers} workers, {start} to {stop}: read"] = len(Counted.read)
    (scratch / f"{process} of {processes}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
