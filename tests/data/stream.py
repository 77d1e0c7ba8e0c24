"""Program that streams endless batches from two worker processes and prints their process ids.

python -m tests.data.stream CACHE [PREPARED]
"""

import multiprocessing as mp
import sys
from pathlib import Path

import jax

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


def main() -> None:
    cache, *prepared = map(Path, sys.argv[1:])
    loader = make_loader(PreparedRows(*prepared, "train") if prepared else Noise(100), cache, workers=2)
    for i, _ in enumerate(loader.batches(0, 1_000_000)):
        if i == 3:  # both workers have begun by then
            print(*[process.pid for process in mp.active_children()], flush=True)


if __name__ == "__main__":
    cli.run(main)
