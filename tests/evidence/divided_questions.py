"""Answer a file of questions on 1, 2 and 4 processes, some of which are killed at random times, and compare the files.

    python tests/evidence/divided_questions.py | tee tests/evidence/divided_questions.txt

All processes are real, and run ``generate --questions`` with the model of the package and a search by stages with two
candidates and the judge. The script prints, for each run, the exit codes, the digest of the file, and the last warning
of the first process. It takes some ten minutes on two cores.
"""

import argparse
import datetime
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from llava_cot_jax.data.shapes.rows import ShapesRows
from tests.distributed.test_divided_questions import Run, ends
from tests.processes import xla_flags

COUNT = 60
"""Number of questions, about 0 images, 1 image and 2 images in turn."""

SEED = 7
"""Seed of the times of the kills."""


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"{datetime.date.today()}; jax {version('jax')}, jaxlib {version('jaxlib')}; {COUNT} questions")
    place = Path(tempfile.mkdtemp())
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices=1)}
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(place / "programs")
    try:
        write_questions(place)
        for count in (1, 2, 4):
            run = prepare(place, f"{count} processes", count)
            tell(run, ends(*(run.start(index) for index in range(count))))
        draw = random.Random(SEED)
        for killed in (1, 3, 2):
            run = prepare(place, f"4 processes, of which process {killed} is killed", 4)
            processes = [run.start(index) for index in range(4)]
            kill_after(run, draw.randrange(5, COUNT - 25), processes[killed])
            tell(run, ends(*processes))
        for number in (1, 2):
            run = prepare(place, f"2 processes, of which the first is killed and started again, {number}", 2)
            processes = [run.start(index) for index in range(2)]
            kill_after(run, draw.randrange(5, COUNT - 25), processes[0])
            processes[0].wait()
            tell(run, ends(run.start(0), processes[1]))
        run = prepare(place, "1 process, killed four times", 1)
        for _ in range(4):
            process = run.start(0)
            kill_after(run, answers(run) + draw.randrange(3, 9), process)
            process.wait()
        tell(run, ends(run.start(0)))
        run = prepare(place, "one model over 2 processes", 2)
        tell(run, run.share_model())
        run = prepare(place, "one model over 2 processes, one killed, and both started again", 2)
        processes = [run.start(index, "", "--hosts.divide=model", "--mesh.tensor=2") for index in range(2)]
        kill_after(run, draw.randrange(5, 20), processes[1])
        print(f"    exit codes after the kill: {ends(*processes)}")
        tell(run, run.share_model())
    finally:
        shutil.rmtree(place)


def write_questions(place: Path) -> None:
    rows = []
    for i in range(COUNT):
        row = ShapesRows("test")[i]
        row.images[0].save(place / f"{i}.png")
        images = [f"{i}.png", f"{max(i - 1, 0)}.png"][: (1, 2, 0)[i % 3]]
        question = row.turns[0].question.replace("<image>", "").strip()
        rows.append({"id": i, "question": question, "images": images, "seed": i})
    (place / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare(place: Path, name: str, count: int) -> Run:
    run = Run(place, name, count)
    others = ("--checkpoint", "--search", "--max_new_tokens")
    run.arguments = [each for each in run.arguments if not each.startswith(others)]
    run.arguments += ["--checkpoint=shapes", "--search=stage_beam", "--num_candidates=2", "--max_new_tokens=90"]
    return run


def answers(run: Run) -> int:
    return run.output.read_bytes().count(b"\n") if run.output.exists() else 0


def kill_after(run: Run, count: int, process: subprocess.Popen) -> None:
    """Kill a process once the file has so many answers."""
    while answers(run) < count:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)


def tell(run: Run, codes: list[int]) -> None:
    content = run.output.read_bytes()
    warnings = [line for line in run.errors(0).splitlines() if line.startswith("warning")]
    print(f"{run.name}: exit codes {codes}, {answers(run)} answers, {hashlib.sha256(content).hexdigest()[:16]}")
    for line in warnings[-1:]:
        print(f"    {line}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
