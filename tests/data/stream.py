"""Program that streams endless batches from two worker processes and prints their ids and the first batches' digests.

python -m tests.data.stream CACHE [PREPARED]
"""

import hashlib
import json
import multiprocessing as mp
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from llava_cot_jax import cli
from llava_cot_jax.data.loader import Loader
from llava_cot_jax.data.prepared import PreparedRows
from llava_cot_jax.data.rows import Rows
from llava_cot_jax.data.settings import ChatSettings, LoaderSettings
from tests.data.rows import Noise, demo_processor


def make_loader(rows: Rows, cache: Path, workers: int) -> Loader:
    settings = LoaderSettings(batch_size=4, num_workers=workers, num_threads=2)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return Loader(rows, demo_processor(), ChatSettings(), settings, sharding, cache=cache)


BATCHES = 4
"""Number of batches whose digests are printed. Both workers have begun by then."""


def digest(batch: Mapping[str, np.ndarray | jax.Array]) -> str:
    """Return a digest of all arrays of a batch."""
    arrays = {name: np.asarray(batch[name]) for name in sorted(batch)}
    content = [f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes() for name, array in arrays.items()]
    return hashlib.sha256(b"".join(content)).hexdigest()


def main() -> None:
    cache, *prepared = map(Path, sys.argv[1:])
    loader = make_loader(PreparedRows(*prepared, "train") if prepared else Noise(100), cache, workers=2)
    digests: list[str] = []
    for batch in loader.batches(0, 1_000_000):
        if len(digests) == BATCHES:
            continue
        digests.append(digest(batch))
        if len(digests) == BATCHES:
            workers = [process.pid for process in mp.active_children()]
            print(json.dumps({"workers": workers, "digests": digests}), flush=True)


if __name__ == "__main__":
    cli.run(main)
