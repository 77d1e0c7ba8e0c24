"""Which runs fit which TPU slices: the table of the README, of the real programs, compiled without a TPU.

    pip install -e '.[plan]' && python tests/evidence/plan_table.py | tee tests/evidence/plan_table.txt

Each row is a program as ``plan`` compiles it, at full size: for training a step of the longest rows (2048 tokens, an
image of 4 tiles), for a search the whole of it (1024 tokens a stage, token verdicts). Beside the compiler's bytes
stands what the arithmetic predicted, and beside the bytes that a chip sends, those of the program's collectives.
What was compiled is kept and found again, so that a run that was cut off goes on. Names of rows as arguments do those
alone. Nothing here ran on a TPU; two hours on 2 cores.
"""

import datetime
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from llava_cot_jax.model.config import MllamaConfig  # noqa: E402
from llava_cot_jax.planning import slices  # noqa: E402
from llava_cot_jax.planning.collectives import sent_by_axis  # noqa: E402
from llava_cot_jax.planning.compiler import Compiled, versions  # noqa: E402
from llava_cot_jax.planning.models import sizes_of  # noqa: E402
from llava_cot_jax.planning.report import fit  # noqa: E402
from llava_cot_jax.planning.searching import compile_search, plan_search  # noqa: E402
from llava_cot_jax.planning.settings import Data  # noqa: E402
from llava_cot_jax.planning.slices import parse  # noqa: E402
from llava_cot_jax.planning.training import compile_training, plan_training  # noqa: E402
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
    "11B 2 x v5e-16": ("2*v5e-16", TWO_SLICES, ["--mesh.data", "2", "--loader.batch", "32"]),
    "11B v6e-4": ("v6e-4", FULL, [*OPEN, *HALF, "--mesh.tensor", "1", "--loader.batch", "4"]),
    "11B v6e-8": ("v6e-8", FULL, [*OPEN, "--mesh.tensor", "1"]),
    "11B v5p-8": ("v5p-8", FULL, [*OPEN, "--mesh.tensor", "1"]),
    "11B LoRA v5e-4": ("v5e-4", LORA, [*OPEN, "--mesh.tensor", "2"]),
    "11B LoRA v6e-1": ("v6e-1", LORA, [*OPEN, "--micro_batches", "16"]),
    "90B v5e-64": ("v5e-64", NINETY, [*OPEN, "--mesh.tensor", "8", "--loader.batch", "8"]),
    "90B v6e-32": ("v6e-32", NINETY, [*OPEN, "--mesh.tensor", "1"]),
    "90B v5p-16": ("v5p-16", NINETY, [*OPEN, "--loader.batch", "8"]),
    "90B v5p-32": ("v5p-32", NINETY, []),
    "90B LoRA v5e-32": ("v5e-32", NINETY_LORA, [*OPEN, "--micro_batches", "4"]),
    "90B LoRA v6e-8": ("v6e-8", NINETY_LORA, []),
    "90B LoRA v5p-8": ("v5p-8", NINETY_LORA, [*OPEN, "--mesh.tensor", "4"]),
}
"""The slice, the configuration, and what is changed of it."""

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
"""The slice, the weights, and how many candidates."""


def train(name: str) -> None:
    """A row of training."""
    topology, configuration, changes = TRAINING[name]
    settings, _ = read_arguments(["--config", str(ROOT / f"configs/{configuration}.yaml"), *changes])
    config = sizes_of(settings.init_from)
    plan = plan_training(settings, config, parse(topology), Data())
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    print(f"{name}: {plan.slice.name}, {mesh}; batch {settings.loader.batch} in {settings.micro_batches}, ", end="")
    print(f"{settings.optimizer.precision}", end="", flush=True)
    print(f"{f', rank {settings.lora.rank}' if settings.lora.rank else ''}", flush=True)
    compiled = compile_training(plan, config)
    memory(compiled, sum(plan.memory.values()), plan.slice.generation.usable)
    longest = plan_training(settings, config, parse(topology), Data(tokens=settings.chat.max_length))
    if compiled.exchanges is not None:
        found = {axis: f"{size / GB:.1f}" for axis, size in sent_by_axis(compiled.exchanges).items() if size > GB / 10}
        told = {axis: f"{size / GB:.1f}" for axis, size in longest.floors.sent.items() if size > GB / 10}
        print(f"  GB that a chip sends in a step of the longest rows: predicted {told}, in the program {found}")
        whole = max((each.result for each in compiled.exchanges if each.kind == "all-gather"), default=0)
        print(f"  largest array that is gathered: {whole / GB:.2f} GB")
    told = ", ".join(f"{kind} {1e3 * seconds:.0f}" for kind, seconds in plan.floors.seconds.items() if seconds)
    hours = plan.hours(MFU)
    print(f"  floors of a step of average rows, ms: {told}; binds {plan.floors.binds}; ", end="")
    print(f"{plan.steps:,} steps at an MFU of {MFU:.0%}: {hours:.1f} h, {hours * plan.slice.chips:.0f} chip-hours")
    sys.stdout.flush()


def search(name: str) -> None:
    """A row of a search with the 11B."""
    topology, dtype, count = SEARCH[name]
    config = MllamaConfig.llama32_11b()
    how = StageBeam(count, budget=1024).plan()
    plan = plan_search(how, config, parse(topology), dtype=dtype)  # type: ignore[arg-type]
    print(f"{name}: {plan.slice.name}, tensor={plan.mesh['tensor']}, {dtype}", flush=True)
    compiled = compile_search(plan, config)
    memory(compiled, sum(plan.memory.values()), plan.slice.generation.usable)
    told = ", ".join(f"{kind} {1e3 * seconds:.1f}" for kind, seconds in plan.step.seconds.items() if seconds)
    print(f"  floors of a step of decoding, ms: {told}; of an answer of usual length {plan.seconds:.1f} s")
    sys.stdout.flush()


def memory(compiled: Compiled, predicted: int, usable: int) -> None:
    """What a chip holds."""
    if compiled.fault:
        print(f"  does not fit: {compiled.fault}; predicted {predicted / GB:.2f} GB")
        return
    print(f"  GB of a chip: {compiled.bytes / GB:.2f} (arguments {compiled.arguments / GB:.2f}, ", end="")
    print(f"temporaries {compiled.temporaries / GB:.2f}), predicted {predicted / GB:.2f} ", end="")
    print(f"({predicted / compiled.bytes - 1:+.1%}), code {compiled.code / GB:.2f}; ", end="")
    print(f"fits: {fit(compiled.bytes + compiled.code, usable)}; compiled in {compiled.seconds:.0f} s")


def main() -> None:
    slices.prepare()
    print(f"{datetime.date.today()}; {', '.join(f'{n} {v}' for n, v in versions().items())}; compiled, run on no TPU")
    rows: dict[str, Callable[[str], None]] = dict.fromkeys(TRAINING, train) | dict.fromkeys(SEARCH, search)
    for name in sys.argv[1:] or rows:
        rows[name](name)


if __name__ == "__main__":
    main()
