"""Measure a training step, here and in transformers with torch: seconds, FLOPs and tokens per second, memory.

    python tests/evidence/step_time.py | tee tests/evidence/step_time.txt

A step is the forward pass, backward pass and AdamW update of a Llama-3.2-Vision of 96 million parameters, on the first
device that jax finds (torch takes CUDA where it has it). Both libraries have the same weights and the same two examples
of the shapes world, with an image of four tiles and one of three. Two thirds of the FLOPs are those of the vision
tower, as for the 11B. Each library has processes of its own for each kind of activation checkpointing, on two cores.
On a CPU the script takes about 20 minutes.

On a CPU each kind is measured twice. For the times, glibc is told to keep freed memory: otherwise both libraries
allocate memory anew in every step, and fresh pages of a virtual machine can take longer than the arithmetic of the
step. A heap that keeps everything grows by what it cannot fit into its holes, so that the memory that a step needs is
that of a few steps in another process, whose freed memory goes back to the system, in huge pages.

The losses of all runs must agree in the first step and in the last. ``--dtype bfloat16`` is for an accelerator; it
keeps parameters in float32 and computes in bfloat16.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

THREADS = 2
TOKENS = 384
"""Number of tokens of an example, with padding. It has as many turns as fit."""
TILES = ((2, 2), (1, 3))
"""Height and width of each example's image in tiles."""
LEARNING_RATE = 1e-4
WARM = 4
"""Number of steps before the timed ones, after which a heap that keeps freed memory has its final size."""
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_ARENA_MAX": "1"}
RETURN_MEMORY = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
STEPS_FOR_MEMORY = 2
KINDS = ("ours none", "torch none", "ours full", "torch full")
"""Library and activation remat: what the products of a layer need is saved, or its input alone."""
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""Largest relative difference between the losses of two runs, by dtype."""

Report = dict[str, Any]


def prepare(folder: Path) -> Report:
    """Write the weights and the batch. Return the size of the model and the FLOPs of a step."""
    from flax import nnx
    from flax.traverse_util import flatten_dict

    from llava_cot_jax.costs.model_costs import parameter_counts, training_flops
    from llava_cot_jax.data.chat import Chat
    from llava_cot_jax.data.settings import ChatSettings
    from llava_cot_jax.data.shapes.rows import ShapesRows
    from llava_cot_jax.data.shapes.tokenizer import shapes_config, shapes_tokenizer
    from llava_cot_jax.model.checkpoint.sharded_saving import save_params
    from llava_cot_jax.model.config import MllamaConfig, TextConfig, VisionConfig
    from llava_cot_jax.model.mllama import Mllama
    from llava_cot_jax.model.vision_tower import normalize
    from llava_cot_jax.processing.processor import Processor

    small = shapes_config()
    vision = VisionConfig(
        hidden_size=384,
        intermediate_size=1536,
        attention_heads=6,
        num_hidden_layers=8,
        num_global_layers=2,
        image_size=308,
        intermediate_layers_indices=(1, 2, 4, 5, 6),
    )
    text = TextConfig(
        vocab_size=16384,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=10,
        num_attention_heads=10,
        num_key_value_heads=2,
        cross_attention_layers=(3, 8),
        bos_token_id=small.text.bos_token_id,
        eos_token_ids=small.text.eos_token_ids,
        pad_token_id=small.text.pad_token_id,
    )
    config = MllamaConfig(vision, text, small.image_token_index, convention="transformers_5")
    arrays = flatten_dict(Mllama(config, rngs=nnx.Rngs(0)).params, sep=".")
    # The gates of a new model are shut, so that images would have no part in the loss.
    arrays = {path: array + 0.5 if "gate" in path.rsplit(".", 1)[-1] else array for path, array in arrays.items()}
    save_params(arrays, config, folder / "model")

    processor = Processor(config, shapes_tokenizer())
    chat, rows = Chat(processor, ChatSettings(max_length=TOKENS)), ShapesRows("train")
    turns = [[turn for i in range(10 * row, 10 * row + 10) for turn in rows.turns(i)] for row in range(len(TILES))]
    # All turns are about one image, which the first of them shows.
    talks = [chat.encode([replace(turn, images=int(i == 0)) for i, turn in enumerate(row)]) for row in turns]
    side = vision.image_size
    sizes = [(wide * side, high * side) for high, wide in TILES]
    images: list[Any] = [rows[10 * i].images[0].resize(size) for i, size in enumerate(sizes)]
    batch = processor.collate([talk.ids for talk in talks], [[image] for image in images], length=TOKENS)
    batch["pixel_values"] = np.asarray(normalize(vision, batch["pixel_values"], batch["aspect_ratio_ids"]))
    for name, kind in (("loss_mask", bool), ("stage", np.int8)):
        batch[name] = np.zeros((len(talks), TOKENS), kind)
        for row, talk in enumerate(talks):
            batch[name][row, : len(talk.ids)] = getattr(talk, name)
    np.savez(folder / "batch.npz", **batch)

    lengths = [len(talk.ids) for talk in talks]
    flops = [training_flops(config, length, images=1) for length in lengths]
    return {
        "parameters": sum(parameter_counts(config).values()),
        "tokens": sum(lengths),
        "trained": int(batch["loss_mask"].sum()),
        "flops": sum(sum(row.values()) for row in flops),
        "tower": sum(row["tower"] + row["tower attention"] for row in flops),
    }


def ours(folder: Path, remat: Any, dtype: str, steps: int) -> Report:
    """Measure steps of ``llava_cot_jax.training``."""
    import jax
    import jax.numpy as jnp

    from llava_cot_jax.model.checkpoint.folder import read_config
    from llava_cot_jax.model.checkpoint.sharded_loading import load_params
    from llava_cot_jax.model.parameters import parameters
    from llava_cot_jax.training.optimizer import Optimizer
    from llava_cot_jax.training.settings import OptimizerSettings
    from llava_cot_jax.training.state import TrainState
    from llava_cot_jax.training.step import make_train_step

    if dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")  # a GPU would take fewer digits than torch
    config = read_config(folder / "model")
    table = parameters(config, "stacked")
    optimizer = Optimizer(OptimizerSettings(), lambda step: LEARNING_RATE, table)
    arrays = load_params(folder / "model", config, layout="stacked", dtype=jnp.float32)
    state = TrainState.init(arrays, {}, optimizer, jnp.float32)
    batch = {name: jnp.asarray(x) for name, x in np.load(folder / "batch.npz").items()}
    step = make_train_step(config, table, optimizer, state, mesh=None, dtype=jnp.dtype(dtype), remat=remat)
    start = time.perf_counter()
    compiled = step.lower(state, batch).compile()  # type: ignore[attr-defined]
    compile_seconds = time.perf_counter() - start

    def run() -> float:
        nonlocal state
        state, measures = jax.block_until_ready(compiled(state, batch))
        return float(measures["loss"])

    report = timed(run, steps)
    device = jax.devices()[0]
    if device.platform != "cpu":
        report["memory"] = device.memory_stats()["peak_bytes_in_use"]
    side = 4096 if device.platform == "cpu" else 8192
    square = jnp.ones((side, side), dtype)
    product = jax.jit(jnp.matmul)
    rate = product_rate(lambda: jax.block_until_ready(product(square, square)), side)
    return report | {"device": device.device_kind, "compile": compile_seconds, "product": rate}


def by_torch(folder: Path, remat: str, dtype: str, steps: int) -> Report:
    """Measure steps of transformers' model with its own loss and torch's fused AdamW."""
    import torch
    from transformers import MllamaForConditionalGeneration

    torch.set_num_threads(THREADS)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    wait = torch.cuda.synchronize if cuda else (lambda: None)
    model = MllamaForConditionalGeneration.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="sdpa"
    )
    model = model.to(device).train()
    if remat == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = {name: torch.tensor(x, device=device) for name, x in np.load(folder / "batch.npz").items()}
    inputs = {name: x if x.is_floating_point() else x.long() for name, x in batch.items()}
    del inputs["loss_mask"], inputs["stage"]
    labels = inputs["input_ids"].where(batch["loss_mask"], -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def run() -> float:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        wait()
        return loss.item()

    report = timed(run, steps)
    if cuda:
        report["memory"] = torch.cuda.max_memory_allocated()
    side = 8192 if cuda else 4096
    square = torch.ones((side, side), dtype=getattr(torch, dtype), device=device)

    def product() -> None:
        torch.matmul(square, square)
        wait()

    name = torch.cuda.get_device_name() if cuda else "cpu"
    return report | {"device": name, "compile": 0.0, "product": product_rate(product, side)}


def timed(run: Callable[[], float], steps: int) -> Report:
    """Time ``steps`` calls of ``run``, which returns a loss, after a few untimed ones, and measure the memory."""
    first, *_ = [run() for _ in range(WARM)]
    seconds, last = [], first
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    for _ in range(steps):
        start = time.perf_counter()
        last = run()
        seconds.append(time.perf_counter() - start)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    return {"first": first, "last": last, "seconds": seconds, "memory": peak}


def product_rate(product: Callable[[], None], side: int) -> float:
    """FLOPs per second of a product of two square matrices, the median of five."""
    product()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / statistics.median(seconds)


def in_process(heap: dict[str, str], *arguments: object) -> Report:
    """Run this script with other arguments in a process of its own, and return what it prints."""
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | heap, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def both_heaps(*arguments: object) -> Report:
    """Return a report whose times are those of a process that keeps freed memory, and whose memory is that in use."""
    report = in_process(KEEP_MEMORY, *arguments)
    if report["device"] != "cpu":
        return report
    used = in_process(RETURN_MEMORY, *arguments[:-1], STEPS_FOR_MEMORY)["memory"]
    return report | {"memory": used, "kept": report["memory"]}


def main(dtype: str, steps: int) -> None:
    from llava_cot_jax.costs.chips import find_chip

    versions = "  ".join(f"{package} {version(package)}" for package in ("jax", "torch", "transformers"))
    print(f"{datetime.date.today()}  Python {platform.python_version()}  {versions}")
    with tempfile.TemporaryDirectory() as scratch:
        work = in_process(KEEP_MEMORY, "--prepare", scratch)
        reports = {kind: both_heaps("--measure", scratch, kind, "--dtype", dtype, "--steps", steps) for kind in KINDS}
    chip = find_chip(reports[KINDS[0]]["device"])
    print(f"{platform.system()} {platform.machine()}, {reports[KINDS[0]]['device']}, {THREADS} cores, {dtype}")
    print(
        f"{work['parameters'] / 1e6:.1f} M parameters, all trained; {len(TILES)} examples of {TOKENS} tokens: "
        f"{work['tokens']} without padding, {work['trained']} trained\n{work['flops'] / 1e12:.2f} TFLOP per step, "
        f"{work['tower'] / work['flops']:.0%} of it the vision tower; median of {steps} steps (fastest to slowest)"
    )
    medians = {kind: statistics.median(report["seconds"]) for kind, report in reports.items()}
    for kind, report in reports.items():
        rate = work["flops"] / medians[kind]
        mfu = f", MFU {rate / chip.peak_flops:.1%}" if chip else ""
        print(
            f"\n{kind.split()[0]}, checkpointing {kind.split()[1]}\n"
            f"  step        {medians[kind]:.3f} s ({min(report['seconds']):.3f} to {max(report['seconds']):.3f})"
            + (f", compiled in {report['compile']:.1f} s" if report["compile"] else "")
            + f"\n  tokens      {work['tokens'] / medians[kind]:.0f} per second\n"
            f"  work        {rate / 1e9:.0f} GFLOP/s, {rate / report['product']:.0%} of a plain matrix product's rate "
            f"({report['product'] / 1e9:.0f}){mfu}\n"
            f"  memory      {report['memory'] / 1e9:.2f} GB at the peak"
            + (f", {report['kept'] / 1e9:.2f} GB where freed memory is kept" if not chip else "")
            + f"\n  loss        {report['first']:.6f} at first, {report['last']:.6f} at step {WARM + steps}"
        )
    print()
    for remat in ("none", "full"):
        mine, other = f"ours {remat}", f"torch {remat}"
        print(
            f"checkpointing {remat}: a step here takes {medians[mine] / medians[other]:.2f} of torch's time "
            f"and {reports[mine]['memory'] / reports[other]['memory']:.2f} of its memory"
        )
    apart = {when: largest_difference([r[when] for r in reports.values()]) for when in ("first", "last")}
    print(f"losses apart: {apart['first']:.1e} at the first step, {apart['last']:.1e} at the last")
    if not max(apart.values()) < TOLERANCE[dtype]:
        sys.exit("the losses do not agree")


def largest_difference(values: list[float]) -> float:
    return (max(values) - min(values)) / min(values)


if __name__ == "__main__":
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="Dtype of the computation.")
    parser.add_argument("--steps", type=int, default=12, help="Number of timed steps.")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="Only write the weights and the batch.")
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "KIND"), help="Only measure one kind of step.")
    options = parser.parse_args()
    if options.prepare:
        print(json.dumps(prepare(options.prepare)))
    elif options.measure:
        folder, (library, remat) = Path(options.measure[0]), options.measure[1].split()
        measure = {"ours": ours, "torch": by_torch}[library]
        print(json.dumps(measure(folder, remat, options.dtype, options.steps)))
    else:
        main(options.dtype, options.steps)
