"""Compare 20 steps of training on 2 and 4 processes, and with 2 and 4 gradient accumulation steps, with one device.

    python tests/evidence/many_hosts.py | tee tests/evidence/many_hosts.txt

A small model of random weights is trained on the shapes world in float32, with batches of 8 examples that have unequal
numbers of trained tokens. The script prints the losses on one device, how far the other losses are from them, the
bytes of the weights that each process reads, and whether the arrays that they load together are the checkpoint's
(after one step at a learning rate of 0).
"""

import argparse
import datetime
import os
import platform
import re
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from llava_cot_jax.training.export import RunExport
from tests.distributed.train_runs import FOUR, TWO, run_alone, run_on_hosts
from tests.training.small_run import losses, small_config, write_small


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    print(f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, jax {version('jax')}")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_small(place / "small")
        size = (place / "small/model.safetensors").stat().st_size / 1e9
        run_alone(place, "one", place)
        alone = np.array(losses(place / "one"))
        print("losses on one device:", " ".join(f"{loss:.4f}" for loss in alone))

        def compare(name: str, what: str) -> None:
            furthest = np.abs(np.array(losses(place / name)) / alone - 1).max()
            print(f"{what}: relative difference at most {furthest:.1e}")

        for parts in (2, 4):
            run_alone(place, f"{parts} parts", place, grad_accum_steps=parts)
            compare(f"{parts} parts", f"{parts} gradient accumulation steps")
        for hosts in (TWO, FOUR):
            name = f"{hosts.processes} processes"
            printed = run_on_hosts(place, name, place, hosts)[0]
            compare(name, f"{name} of {hosts.devices} devices, {hosts.settings}")
            read = [float(gigabytes) for gigabytes in re.search(r"GB: (.*)", printed)[1].split(", ")]
            shares = ", ".join(f"{gigabytes / size:.1%}" for gigabytes in read)
            print(f"    of the weights' {size * 1e3:.2f} MB each process read {shares}")

            run_on_hosts(place, f"{name} loaded", place, hosts, steps=1, optimizer__learning_rate=0.0)
            RunExport(place / f"{name} loaded").write(place / f"{name} exported", small_config())
            held, stored = (load_file(place / x / "model.safetensors") for x in (f"{name} exported", "small"))
            same = held.keys() == stored.keys() and all(np.array_equal(held[x], stored[x]) for x in stored)
            print(f"    the arrays that they loaded together are, bit for bit, the checkpoint's: {same}")


if __name__ == "__main__":
    main()
