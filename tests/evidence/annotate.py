"""Throughput and memory of annotate at an endpoint, and data that the model of the package makes of short answers.

    python tests/evidence/annotate.py | tee tests/evidence/annotate.txt
    python tests/evidence/annotate.py --study | tee -a tests/evidence/annotate.txt

The second call trains on such data, which takes a quarter of an hour on one core.

The command runs in a process of its own. The first endpoint answers each request after four seconds, and there are 64
at a time: so the limit is 16 requests a second. The second one answers at once, but no more than 10 requests a second,
and all others with status 429. The study trains a model by ``shapes_cpu.yaml`` with fewer steps, and goes on with it on
the rows that were made and on as many of the world's own, with three seeds each.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from llava_cot_jax.data.shapes.rows import ShapesRows
from tests.annotation.stand_in_endpoint import Asked, Response, StandIn, staged

ROWS, IN_FLIGHT, LATENCY = 1000, 64, 4.0
RATE, PACED = 10, 500
MADE, SEEDS, STEPS, TEST = 500, 3, 48, 1000
STEPS_BEFORE = 400
"""Number of steps of the model with which the study begins."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", action="store_true", help="train on the rows that the model made, and compare")
    options = parser.parse_args()
    print(f"{datetime.date.today()}; openai {version('openai')}, jax {version('jax')}; load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        if options.study:
            study(place)
            return
        measure_throughput(place)
        measure_rate(place)
        make_rows(place)


def measure_throughput(place: Path) -> None:
    """Ask about 1,000 rows with photographs of 640 x 480 pixels at an endpoint of a fixed latency."""
    write_photos(place, ROWS)
    print(f"\n{ROWS} rows, {IN_FLIGHT} in flight, replies after {LATENCY:g} s: the limit is {IN_FLIGHT / LATENCY:g}/s")
    process: list[subprocess.Popen[str]] = []
    memory: dict[int, float] = {}

    def behave(asked: Asked) -> Response:
        if asked.number in (100, 250, 500, 750, 1000):
            memory[asked.number] = resident(process[0].pid)
        return Response(staged(asked.standard_answer, REASONING="because it is so, " * 60), late=LATENCY)

    stand_in = StandIn(behave)
    threading.Thread(target=stand_in.serve_forever, daemon=True).start()
    process.append(start(place, "photos", stand_in.url, f"--requests_in_flight={IN_FLIGHT}"))
    _, error = process[0].communicate()
    assert process[0].returncode == 0, error
    last = stand_in.asked[-1].time + LATENCY
    seconds = last - stand_in.asked[0].time
    print(f"{len(stand_in.asked)} requests in {seconds:.1f} s: {ROWS / seconds:.1f}/s, ", end="")
    print(f"{ROWS / seconds / (IN_FLIGHT / LATENCY):.1%} of the limit; at most {stand_in.most} at a time")
    print("resident memory at request", ", ".join(f"{number}: {size:.0f} MB" for number, size in memory.items()))
    stand_in.close()


def measure_rate(place: Path) -> None:
    """Ask an endpoint that allows so many requests a second, with the pace that fits it."""
    (place / "questions.jsonl").write_text("".join((place / "questions.jsonl").read_text().splitlines(True)[:PACED]))
    allowed = threading.Lock()
    times: list[float] = []

    def behave(asked: Asked) -> Response:
        with allowed:
            now = time.monotonic()
            if len([each for each in times[-RATE:] if each > now - 1]) >= RATE:
                return Response("too many", status=429, headers={"Retry-After": "1"})
            times.append(now)
        return Response(staged(asked.standard_answer))

    for name, pace in (("without a pace", []), (f"with {RATE * 60} requests a minute", [str(RATE * 60)])):
        times.clear()
        stand_in = StandIn(behave)
        threading.Thread(target=stand_in.serve_forever, daemon=True).start()
        options = [f"--requests_per_minute={each}" for each in pace]
        ended = start(place, name.replace(" ", "_"), stand_in.url, f"--requests_in_flight={IN_FLIGHT}", *options)
        out, error = ended.communicate()
        assert ended.returncode == 0, error
        seconds = times[-1] - times[0]
        refused = len(stand_in.asked) - len(times)
        print(
            f"\n{PACED} rows at no more than {RATE} requests a second, {name}: {(len(times) - 1) / seconds:.1f}/s, ",
            end="",
        )
        print(f"{(len(times) - 1) / seconds / RATE:.1%} of the limit; {refused} requests met a 429; ", end="")
        print(out.splitlines()[-2])
        stand_in.close()


def make_rows(place: Path) -> Path:
    """Let the model of the package make rows of the shapes world, of pictures, questions and short answers."""
    write_world(place / "world", MADE)
    given = [f"--input={place}/world/questions.jsonl", f"--images={place}/world", f"--output={place}/made.jsonl"]
    began = time.perf_counter()
    out = command("annotate", *given, "--model=self", "--checkpoint=shapes")
    print(f"\n{MADE} rows of the shapes world with --model self, in {time.perf_counter() - began:.0f} s:")
    print("\n".join(line for line in out.splitlines() if line.startswith(("turns", "reasons"))))
    world = ShapesRows("train", seed=1, size=MADE)
    rows = [json.loads(line) for line in (place / "made.jsonl").read_text().splitlines()]
    same = sum(world.turns(row["id"])[0].answer == row["conversations"][1]["value"] for row in rows)
    print(f"answers that equal the world's own in every section: {same} of {len(rows)}")
    return place / "made.jsonl"


def study(place: Path) -> None:
    """Train the same model on the rows that were made and on as many of the world's own."""
    given = [f"--steps={STEPS_BEFORE}", f"--output={place}/start", "--eval_every=0", "--eval_generations=0"]
    command("train", "--config=shapes_cpu.yaml", *given, "--eval_examples=0")
    command("convert", f"{place}/start", f"{place}/start-model")
    checkpoint = f"{place}/start-model"
    made = make_rows(place)
    count = len(made.read_text().splitlines())
    world = ShapesRows("train", seed=1, size=MADE)
    with (place / "own.jsonl").open("w") as file:
        for i in range(count):
            turn = world[i].turns[0]
            said = [{"from": "human", "value": turn.question}, {"from": "gpt", "value": turn.answer}]
            print(json.dumps({"id": i, "image": f"{i}.png", "conversations": said}), file=file)
    print(f"\ntrained for {STEPS} steps of 32 rows, {count} rows each; greedy answers to {TEST} test questions")
    print(f"before, after {STEPS_BEFORE} steps from random weights: {accuracy(place, checkpoint)}", flush=True)
    for name in ("made", "own"):
        command(
            "prepare",
            f"--annotations={place}/{name}.jsonl",
            f"--images={place}/world",
            f"--output={place}/{name}",
            "--validation_share=0",
        )
        found = []
        for seed in range(SEEDS):
            run = place / f"{name}-{seed}"
            settings: dict[str, Any] = {
                "steps": STEPS,
                "seed": seed,
                "loader.seed": seed,
                "eval_examples": 0,
                "eval_generations": 0,
            }
            settings |= {"random_init": "false", "eval_every": 0, "optimizer.learning_rate": 1e-3}
            given = [f"--{option}={value}" for option, value in settings.items()]
            config = ["--config=shapes_cpu.yaml", f"--output={run}", f"--checkpoint={checkpoint}"]
            command("train", *config, f"--data={place}/{name}", *given)
            command("convert", str(run), f"{run}-model")
            found.append(accuracy(place, f"{run}-model"))
            print(f"{name}, seed {seed}: {found[-1]}", flush=True)
        shares = [each["accuracy"] for each in found]
        error = statistics.stdev(shares) / len(shares) ** 0.5
        print(f"{name}: mean {statistics.mean(shares):.3f}, standard error over seeds {error:.3f}")


def accuracy(place: Path, checkpoint: str) -> dict[str, Any]:
    """Return the accuracy of a checkpoint, with its standard error."""
    output = place / f"result-{len(list(place.glob('result-*')))}"
    given = ["--benchmark=shapes", f"--limit={TEST}", f"--checkpoint={checkpoint}", f"--output={output}"]
    command("evaluate", *given, "--max_new_tokens=256", "--slots=32")
    every = json.loads((output / "result.json").read_text())["accuracy"]["all"]
    return {name: round(every[name], 4) for name in ("accuracy", "standard_error")}


def write_photos(place: Path, count: int) -> None:
    """Write rows about ten pictures of noise."""
    (place / "images").mkdir()
    for i in range(10):
        noise = np.random.default_rng(i).integers(0, 256, (60, 80, 3), np.uint8)
        Image.fromarray(noise).resize((640, 480)).save(place / "images" / f"{i}.jpg")
    rows = [
        {"id": i, "image": f"{i % 10}.jpg", "question": f"Which is {i}?", "answer": f"thing {i}"} for i in range(count)
    ]
    (place / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_world(folder: Path, count: int) -> None:
    """Write pictures, questions and short answers of the shapes world."""
    folder.mkdir()
    world = ShapesRows("train", seed=1, size=count)
    with (folder / "questions.jsonl").open("w") as file:
        for i in range(count):
            row = world[i]
            row.images[0].save(folder / f"{i}.png")
            known = {"id": i, "image": f"{i}.png", "question": row.turns[0].question, "answer": world.answer(i)}
            print(json.dumps(known), file=file)


def start(place: Path, name: str, url: str, *options: str) -> subprocess.Popen[str]:
    """Start annotate at an endpoint."""
    given = [f"--input={place}/questions.jsonl", f"--images={place}/images", f"--output={place}/{name}.jsonl"]
    return subprocess.Popen(
        [sys.executable, "-m", "llava_cot_jax.annotate", *given, "--model=stand-in", f"--base_url={url}", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def command(name: str, *arguments: str) -> str:
    """Run a command of the package, and return what it prints."""
    done = subprocess.run([sys.executable, "-m", f"llava_cot_jax.{name}", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def resident(process: int) -> float:
    """Return the resident memory of a process in MB."""
    (line,) = (x for x in Path(f"/proc/{process}/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
