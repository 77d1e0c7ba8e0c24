"""Streams batches without end from two worker processes; prints their ids. ``python -m tests.data.stream CACHE``"""

import multiprocessing as mp
import sys
from pathlib import Path

import jax

from llava_cot_jax import cli
from llava_cot_jax.data.chat import ChatSettings
from llava_cot_jax.data.loader import Loader, LoaderSettings
from tests.data.rows import Noise, demo_processor


def main() -> None:
    settings = LoaderSettings(batch=4, workers=2, threads=2)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    loader = Loader(Noise(100), demo_processor(), ChatSettings(), settings, sharding, cache=Path(sys.argv[1]))
    for i, _ in enumerate(loader.batches(0, 1_000_000)):
        if i == 3:  # both workers have begun by then
            print(*[process.pid for process in mp.active_children()], flush=True)


if __name__ == "__main__":
    cli.run(main)
