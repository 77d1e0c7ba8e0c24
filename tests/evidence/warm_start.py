"""Measure what the compilation cache saves: the same search in two processes, one after the other.

python tests/evidence/warm_start.py | tee tests/evidence/warm_start.txt

What it does not save is that jax traces a program and lowers it for the compiler, which is measured for a search of the
11B too. That needs neither its weights nor a device for them.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version

SEARCHES = {
    "streamed, to the first token": ["--max_new_tokens", "64"],
    "stage beam, to the answer": ["--search", "stage_beam", "--max_new_tokens", "[20, 40, 60, 10]"],
}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"{datetime.date.today()}; jax {version('jax')}; the shapes model on this CPU; seconds")
    for name, search in SEARCHES.items():
        with tempfile.TemporaryDirectory() as cache:
            for which in ("first", "second"):
                own, whole = once(search, cache)
                print(f"{name}, {which} process: {own:.1f} from the question on, {whole:.1f} from its start")
    print(f"stage beam of the 11B with 10 candidates: {lowering_seconds():.1f} to trace and lower it")


def lowering_seconds() -> float:
    from llava_cot_jax.benchmark.workload import Workload
    from llava_cot_jax.model.config import MllamaConfig
    from llava_cot_jax.model.sharding import make_mesh
    from llava_cot_jax.planning.programs import lower_search
    from llava_cot_jax.search.strategies import StageBeam

    config, work, mesh = MllamaConfig.llama32_11b(), Workload(), make_mesh()
    began = time.perf_counter()
    lower_search(config, StageBeam(10).to_spec(), work, 1, "bfloat16", mesh)
    return time.perf_counter() - began


def once(search: list[str], cache: str) -> tuple[float, float]:
    given = ["--checkpoint", "shapes", "--dtype", "float32", "--question", "How many circles are there?", "--json"]
    began = time.perf_counter()
    environment = {**os.environ, "XDG_CACHE_HOME": cache, "XLA_FLAGS": ""}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    out = subprocess.run(
        [sys.executable, "-m", "llava_cot_jax.generate", *given, *search],
        env=environment,
        capture_output=True,
        check=True,
    ).stdout
    seconds = json.loads(out)["seconds"]
    return seconds.get("first_token", seconds.get("search", 0.0)), time.perf_counter() - began


if __name__ == "__main__":
    main()
