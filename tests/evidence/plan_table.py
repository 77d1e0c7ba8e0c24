"""Compile training steps and searches for TPU slices, without a TPU, for the table of tests/evidence/README.md.

    pip install -e '.[plan]' && python tests/evidence/plan_table.py | tee tests/evidence/plan_table.txt

Each row is a program at full size as ``plan`` compiles it: for training, a step of the longest examples (2048 tokens,
an image of 4 tiles); for a search, the whole search (1024 tokens per stage, token verdicts). Each row has the bytes of
the compiler and those of the arithmetic, and the bytes that a chip sends by the program's collectives and by the
arithmetic. Compiled programs are cached, so that an interrupted run continues. Nothing runs on a TPU. All rows take
two hours on 2 cores.
"""

import argparse
import datetime
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from llava_cot_jax.model.config import MllamaConfig  # noqa: E402
from llava_cot_jax.planning import slices  # noqa: E402
from llava_cot_jax.planning.collectives import sent_by_axis  # noqa: E402
from llava_cot_jax.planning.compiler import CompiledProgram, compiler_versions  # noqa: E402
from llava_cot_jax.planning.model_sizes import model_config_for  # noqa: E402
from llava_cot_jax.planning.search_plan import compile_search, plan_search  # noqa: E402
from llava_cot_jax.planning.settings import DatasetSize  # noqa: E402
from llava_cot_jax.planning.slices import parse_topology  # noqa: E402
from llava_cot_jax.planning.tables import describe_fit  # noqa: E402
from llava_cot_jax.planning.training_plan import compile_training, plan_training  # noqa: E402
from llava_cot_jax.search.strategies import StageBeam  # noqa: E402
from llava_cot_jax.train import read_arguments  # noqa: E402

GB, MFU = 1e9, 0.4

FULL, LORA = "llava_cot_11b_v5e_64", "llava_cot_11b_lora_v5e_8"
TWO_SLICES = "llava_cot_11b_v5e_16"
NINETY, NINETY_LORA = "llava_cot_90b_v5p_32", "llava_cot_90b_lora_v6e_8"
OPEN = ["--mesh.fsdp", "null"]
HALF = ["--optimizer.precision", "bfloat16_stochastic"]

TRAINING: dict[str, tuple[str, str, list[str]]] = {
    "11B v5e-8": ("v5e-8", "llava_cot_11b_v5e_8", []),
    "11B v5e-16": ("v5e-16", "llava_cot_11b_v5e_16", []),
    "11B v5e-64": ("v5e-64", FULL, []),
    "11B 2 x v5e-16": ("2*v5e-16", TWO_SLICES, ["--mesh.data", "2", "--loader.batch_size", "32"]),
    "11B v6e-4": ("v6e-4", FULL, [*OPEN, *HALF, "--mesh.tensor", "1", "--loader.batch_size", "4"]),
    "11B v6e-8": ("v6e-8", FULL, [*OPEN, "--mesh.tensor", "1"]),
    "11B v5p-8": ("v5p-8", FULL, [*OPEN, "--mesh.tensor", "1"]),
    "11B LoRA v5e-4": ("v5e-4", LORA, [*OPEN, "--mesh.tensor", "2"]),
    "11B LoRA v6e-1": ("v6e-1", LORA, [*OPEN, "--grad_accum_steps", "16"]),
    "90B v5e-64": ("v5e-64", NINETY, [*OPEN, "--mesh.tensor", "8", "--loader.batch_size", "8"]),
    "90B v6e-32": ("v6e-32", NINETY, [*OPEN, "--mesh.tensor", "1"]),
    "90B v5p-16": ("v5p-16", NINETY, [*OPEN, "--loader.batch_size", "8"]),
    "90B v5p-32": ("v5p-32", NINETY, []),
    "90B LoRA v5e-32": ("v5e-32", NINETY_LORA, [*OPEN, "--grad_accum_steps", "4"]),
    "90B LoRA v6e-8": ("v6e-8", NINETY_LORA, []),
    "90B LoRA v5p-8": ("v5p-8", NINETY_LORA, [*OPEN, "--mesh.tensor", "4"]),
}
"""Topology, configuration and changed options of each training run."""

SEARCH: dict[str, tuple[str, str, int]] = {
    f"search {name} N={count}": (topology, dtype, count)
    for name, topology, dtype in (
        ("v6e-1", "v6e-1", "bfloat16"),
        ("v5e-1 int8", "v5e-1", "int8"),
        ("v5e-4", "v5e-4", "bfloat16"),
        ("v5p-1", "v5p:1x1x1", "bfloat16"),
    )
    for count in (10, 4, 1)
}
"""Topology, dtype of the weights and number of candidates of each search."""


def train(name: str) -> None:
    """Print the row of a training run."""
    topology, configuration, changes = TRAINING[name]
    settings, _ = read_arguments(["--config", str(ROOT / f"configs/{configuration}.yaml"), *changes])
    config = model_config_for(settings.checkpoint)
    plan = plan_training(settings, config, parse_topology(topology), DatasetSize())
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    print(
        f"{name}: {plan.slice.name}, {mesh}; batch {settings.loader.batch_size} in {settings.grad_accum_steps}, ",
        end="",
    )
    print(f"{settings.optimizer.precision}", end="", flush=True)
    print(f"{f', rank {settings.lora.rank}' if settings.lora.rank else ''}", flush=True)
    compiled = compile_training(plan, config)
    memory(compiled, sum(plan.memory.values()), plan.slice.generation.usable_hbm_bytes)
    longest = plan_training(
        settings, config, parse_topology(topology), DatasetSize(tokens_per_example=settings.chat.max_length)
    )
    if compiled.collectives is not None:
        found = {
            axis: f"{size / GB:.1f}" for axis, size in sent_by_axis(compiled.collectives).items() if size > GB / 10
        }
        told = {axis: f"{size / GB:.1f}" for axis, size in longest.roofline.sent_bytes.items() if size > GB / 10}
        print(f"  GB that a chip sends in a step of the longest examples: predicted {told}, in the program {found}")
        whole = max((each.result_bytes for each in compiled.collectives if each.kind == "all-gather"), default=0)
        print(f"  largest array that is gathered: {whole / GB:.2f} GB")
    told = ", ".join(f"{kind} {1e3 * seconds:.0f}" for kind, seconds in plan.roofline.seconds.items() if seconds)
    hours = plan.hours(MFU)
    print(f"  roofline of a step of mean length, ms: {told}; bottleneck {plan.roofline.bottleneck}; ", end="")
    print(f"{plan.steps:,} steps at an MFU of {MFU:.0%}: {hours:.1f} h, {hours * plan.slice.chips:.0f} chip-hours")
    sys.stdout.flush()


def search(name: str) -> None:
    """Print the row of a search with the 11B."""
    topology, dtype, count = SEARCH[name]
    config = MllamaConfig.llama32_11b()
    spec = StageBeam(count, max_new_tokens=1024).to_spec()
    plan = plan_search(spec, config, parse_topology(topology), dtype=dtype)
    print(f"{name}: {plan.slice.name}, tensor={plan.mesh['tensor']}, {dtype}", flush=True)
    compiled = compile_search(plan, config)
    memory(compiled, sum(plan.memory.values()), plan.slice.generation.usable_hbm_bytes)
    told = ", ".join(f"{kind} {1e3 * seconds:.1f}" for kind, seconds in plan.decode_step.seconds.items() if seconds)
    print(f"  roofline of a decoding step, ms: {told}; of an answer of typical length {plan.seconds:.1f} s")
    sys.stdout.flush()


def memory(compiled: CompiledProgram, predicted: int, usable: int) -> None:
    """Print the memory of a chip."""
    if compiled.error:
        print(f"  does not fit: {compiled.error}; predicted {predicted / GB:.2f} GB")
        return
    print(f"  GB per chip: {compiled.bytes / GB:.2f} (arguments {compiled.arguments / GB:.2f}, ", end="")
    print(f"temporaries {compiled.temporaries / GB:.2f}), predicted {predicted / GB:.2f} ", end="")
    print(f"({predicted / compiled.bytes - 1:+.1%}), code {compiled.code / GB:.2f}; ", end="")
    print(f"fits: {describe_fit(compiled.bytes + compiled.code, usable)}; compiled in {compiled.seconds:.0f} s")


def main() -> None:
    rows: dict[str, Callable[[str], None]] = dict.fromkeys(TRAINING, train) | dict.fromkeys(SEARCH, search)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"Rows to compile: {', '.join(rows)}. By default, all.")
    names = parser.parse_args().rows or list(rows)
    if unknown := set(names) - set(rows):
        parser.error(f"unknown row {min(unknown)!r}; choose from {', '.join(rows)}")
    slices.enable_tpu_compiler()
    versions = ", ".join(f"{name} {version}" for name, version in compiler_versions().items())
    print(f"{datetime.date.today()}; {versions}; compiled, run on no TPU")
    for name in names:
        rows[name](name)


if __name__ == "__main__":
    main()
