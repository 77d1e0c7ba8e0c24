"""Measure the images per second and core of the data pipeline, and of decoding and resizing alone.

    python tests/evidence/data_pipeline.py | tee tests/evidence/data_pipeline.txt

The script makes two sets of JPEG files, of about 24 KB and about 500 KB each, prepares them, and streams them as
training does: at most four tiles of 560 x 560 pixels, and an answer of about 600 tokens. Every figure is that of a
fresh process on one core (on two where it says so). The kinds of runs take turns:

- floor: Pillow decodes the file and resizes it to the size of its tiles.
- tiles: ``open_image`` and ``cut_into_tiles``.
- pipeline: ``Loader``, from the prepared records to arrays on the device, with all threads on that core.
- transformers: ``MllamaImageProcessorPil``, to normalised float32, without text or batches.
"""

import argparse
import contextlib
import datetime
import io
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

REPEATS = 5
IMAGES = 96
KINDS: dict[str, tuple[str, tuple[int, ...]]] = {
    "floor": ("one core", (1,)),
    "tiles": ("one core", (1,)),
    "pipeline": ("one core, 2 threads", (1,)),
    "transformers": ("one core", (1,)),
    "pipeline, two cores": ("2 threads", (0, 1)),
    "pipeline, two workers": ("2 worker processes", (0, 1)),
}
SETS = {"24 KB": (448, 336, 80), "500 KB": (1600, 1200, 94)}
"""Width, height and JPEG quality of the images of each set."""


def draw_photo(width: int, height: int, seed: int) -> Image.Image:
    """Draw an image with the statistics of a photograph: soft noise of many sizes, and edges."""
    draw = np.random.default_rng(seed)
    layers = np.zeros((height, width, 3), np.float32)
    for octave in range(8):
        small = draw.normal(size=(max(height >> octave, 1), max(width >> octave, 1), 3)).astype(np.float32)
        for channel in range(3):
            grown = Image.fromarray(small[..., channel]).resize((width, height), Image.Resampling.BICUBIC)
            layers[..., channel] += np.asarray(grown) * 2.5 * 1.6**octave
    image = Image.fromarray((128 + layers).clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(25):
        x, y = draw.integers(0, width), draw.integers(0, height)
        w, h = draw.integers(5, width // 4), draw.integers(5, height // 4)
        fill = tuple(draw.integers(0, 256, 3).tolist())
        (pen.ellipse if draw.integers(2) else pen.rectangle)((x, y, x + w, y + h), fill=fill)
    return image


def make_set(folder: Path, width: int, height: int, quality: int) -> float:
    """Write image files, annotations and the prepared directory. Return the mean size of a file in bytes."""
    from llava_cot_jax import prepare

    (folder / "images").mkdir(parents=True)
    words = ("the", "red", "square", "is", "left", "of", "blue", "circle", "and", "there", "are", "three", "shapes")
    order = random.Random(0)
    lines = []
    for i in range(IMAGES):
        name = f"{i}.jpg"
        draw_photo(width, height, i % 12).save(folder / "images" / name, quality=quality)
        bodies = [" ".join(order.choices(words, k=k)) for k in (60, 140, 260, 5)]
        stages = ("SUMMARY", "CAPTION", "REASONING", "CONCLUSION")
        answer = "\n\n".join(f"<{s}> {b} </{s}>" for s, b in zip(stages, bodies, strict=True))
        talk = [{"from": "human", "value": "<image>\nHow many?"}, {"from": "gpt", "value": answer}]
        lines.append(json.dumps({"id": str(i), "image": name, "conversations": talk}))
    (folder / "train.jsonl").write_text("\n".join(lines))
    arguments = ["--annotations", folder / "train.jsonl", "--images", folder / "images", "--output", folder / "data"]
    with contextlib.redirect_stdout(io.StringIO()):
        prepare.main([*map(str, arguments), "--workers", "0", "--validation_share", "0"])
    return statistics.mean(file.stat().st_size for file in (folder / "images").iterdir())


def floor(files: list[bytes]) -> None:
    from transformers.models.mllama.image_processing_pil_mllama import (
        get_image_size_fit_to_canvas,
        get_optimal_tiled_canvas,
    )

    sizes: dict[tuple[int, int], tuple[int, int]] = {}
    for file in files:
        image = Image.open(io.BytesIO(file))
        if image.size not in sizes:
            canvas = get_optimal_tiled_canvas(image.height, image.width, 4, 560)
            height, width = get_image_size_fit_to_canvas(image.height, image.width, *canvas, 560)
            sizes[image.size] = (int(width), int(height))
        image.resize(sizes[image.size], Image.Resampling.BILINEAR)


def tiles(files: list[bytes]) -> None:
    from llava_cot_jax.model.config import VisionConfig
    from llava_cot_jax.processing.images import cut_into_tiles, open_image

    vision = VisionConfig()
    for file in files:
        cut_into_tiles(open_image(file), vision, np.zeros((4, 3, 560, 560), np.uint8))


def transformers(files: list[bytes]) -> None:
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    processor = MllamaImageProcessorPil(size={"height": 560, "width": 560}, max_image_tiles=4)
    for file in files:
        processor([Image.open(io.BytesIO(file)).convert("RGB")])


def pipeline(folder: Path, workers: int) -> Callable[[], None]:
    import jax

    from llava_cot_jax.data.loader import Loader
    from llava_cot_jax.data.prepared import PreparedRows
    from llava_cot_jax.data.settings import ChatSettings, LoaderSettings
    from llava_cot_jax.data.shapes.tokenizer import shapes_config, shapes_tokenizer
    from llava_cot_jax.model.config import MllamaConfig, VisionConfig
    from llava_cot_jax.processing.processor import Processor

    small = shapes_config()
    config = MllamaConfig(vision=VisionConfig(), text=small.text, image_token_index=small.image_token_index)
    rows = PreparedRows(folder / "data", "train")
    settings = LoaderSettings(batch_size=8, num_workers=workers, num_threads=2 if not workers else 1)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    processor = Processor(config, shapes_tokenizer())
    loader = Loader(rows, processor, ChatSettings(max_length=4096), settings, device, cache=folder / "cache")
    warm = IMAGES // 8  # an epoch for the threads and workers to start
    batches = loader.batches(0, 1_000_000)
    for _ in range(warm):
        next(batches)

    def run() -> None:
        for _ in range(IMAGES // 8):
            jax.block_until_ready(next(batches))

    return run


def measure(folder: Path, kind: str) -> None:
    """Measure one kind of run, and print its images per second."""
    os.sched_setaffinity(0, KINDS[kind][1])
    if kind.startswith("pipeline"):
        run = pipeline(folder, workers=2 if "workers" in kind else 0)
    else:
        files = [file.read_bytes() for file in sorted((folder / "images").iterdir())]
        plain = {"floor": floor, "tiles": tiles, "transformers": transformers}[kind]
        plain(files[:8])

        def run() -> None:
            plain(files)

    start = time.perf_counter()
    run()
    print(IMAGES / (time.perf_counter() - start))
    sys.stdout.flush()
    os._exit(0)  # the pipeline would read on


def training_flops() -> tuple[float, float]:
    """FLOPs of the 11B's training step for one example: those of the vision tower, and those of the text.

    Forward and backward pass take 6 FLOPs for each parameter and token, and 12 for each pair of tokens that attend to
    each other and each unit of the width. There are four tiles of 1,601 tokens, and 600 tokens of text.
    """
    patches, tokens = 4 * 1601, 600
    vision = 6 * 0.86e9 * patches + 12 * 40 * patches**2 * 1280
    cross_memory = 8 * 2 * 4096 * 1024  # keys and values of eight layers, for each image position
    text = 6 * (9.78e9 - 0.53e9) * tokens + 6 * cross_memory * patches + 12 * 8 * tokens * patches * 4096
    return vision, text + 12 * 32 * tokens**2 * 4096 / 2


def main() -> None:
    versions = "  ".join(f"{package} {version(package)}" for package in ("jax", "grain", "pillow", "numpy"))
    print(f"{datetime.date.today()}  Python {platform.python_version()}  {versions}")
    print(f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores; images per second, median of {REPEATS}")
    slowest = float("inf")
    with tempfile.TemporaryDirectory() as scratch:
        for name, (width, height, quality) in SETS.items():
            folder = Path(scratch) / name.replace(" ", "")
            size = make_set(folder, width, height, quality)
            runs: dict[str, list[float]] = {kind: [] for kind in KINDS}
            for _ in range(REPEATS):
                for kind in random.Random(len(runs["floor"])).sample(list(KINDS), len(KINDS)):
                    command = [sys.executable, __file__, "--measure", str(folder), kind]
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                    runs[kind].append(float(done.stdout.split()[-1]))
            medians = {kind: statistics.median(rates) for kind, rates in runs.items()}
            print(f"\nJPEG of {size / 1e3:.0f} KB, {width} x {height}")
            for kind, rates in runs.items():
                cores = len(KINDS[kind][1])
                share = medians[kind] / cores / medians["floor"]
                print(
                    f"  {kind:22s}{KINDS[kind][0]:22s}{medians[kind]:7.1f} ({min(rates):.1f} to {max(rates):.1f})"
                    f"  {share:5.0%} of the floor" + (" per core" if cores > 1 else "")
                )
            slowest = min(slowest, medians["pipeline"])
    vision, text = training_flops()
    rows = 8 * 197e12 / (vision + text)
    print(
        f"\nComputed, not measured: an example of the 11B's training takes {vision / 1e12:.0f} (vision tower) and "
        f"{text / 1e12:.0f} TFLOP (text). The 8 chips of a v5e-64 host, of 197 TFLOP/s each (nominal), take at most "
        f"{rows:.1f} examples per second, were they never idle: {rows / slowest:.2f} of a core like this one."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "KIND"), help="Measure one kind of run on one set.")
    options = parser.parse_args()
    if options.measure:
        measure(Path(options.measure[0]), options.measure[1])
    else:
        main()
