"""One process of several that load and save a checkpoint together; prints what it found as JSON.

python loading_worker.py PROCESS PROCESSES PORT CHECKPOINT SCRATCH
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file

from llava_cot_jax.errors import UserError
from llava_cot_jax.model.checkpoint.folder import read_config
from llava_cot_jax.model.checkpoint.sharded_loading import load_params
from llava_cot_jax.model.checkpoint.sharded_saving import save_params
from llava_cot_jax.model.parameters import ParamLayout, parameters
from llava_cot_jax.model.sharding import make_mesh

MESHES = [(1, 8, 1), (2, 2, 2), (1, 4, 2), (8, 1, 1)]


def main() -> None:
    process, processes, port, checkpoint, scratch = sys.argv[1:]
    jax.distributed.initialize(f"localhost:{port}", int(processes), int(process))
    assert jax.local_device_count() == 4 and jax.device_count() == 4 * int(processes)
    folder = Path(checkpoint)
    found: dict[str, Any] = {}
    config, stored = read_config(folder), load_file(folder / "model.safetensors")
    layouts: tuple[ParamLayout, ...] = ("unrolled", "stacked")
    for sizes in MESHES:
        for layout in layouts:
            progress: list[tuple[int, int]] = []
            mesh = make_mesh(*sizes)
            arrays = load_params(
                folder, config, layout=layout, mesh=mesh, on_progress=lambda *counts, to=progress: to.append(counts)
            )
            read, planned = progress[-1]
            share = 0
            for path, parameter in parameters(config, layout).items():
                tensors = [stored[name] for name in parameter.tensors]
                whole = np.stack(tensors) if parameter.stacked else tensors[0]
                shards = {str(shard.index): shard for shard in arrays[path].addressable_shards}
                share += sum(shard.data.nbytes for shard in shards.values())
                assert all(np.array_equal(shard.data, whole[shard.index]) for shard in shards.values()), path
            found[f"{sizes} {layout}"] = {"read": read, "planned": planned, "share": share}
            out = Path(scratch) / f"{sizes} {layout}"
            save_params(arrays, config, out, max_file_bytes=500_000)
    try:
        save_params(arrays, config, out)
    except UserError as fault:
        found["refusal"] = str(fault)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
