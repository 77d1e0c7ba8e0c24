"""Compare searches on questions of the shapes world, each search with several numbers of candidates.

    python tests/evidence/comparison.py --folder runs/comparison | tee tests/evidence/comparison.txt

The script runs the commands that it prints, in processes of their own, and prints the tables, the versions, and the
hours and the memory that each took: a few methods on few questions, with the judge of pairs, and then all others on all
questions. The folder keeps the answers, so that a call after an interruption goes on, and one with a finished folder
prints the tables at once. The plot of all questions is there too. Without a folder, one is made that is removed at the
end. All 2,000 questions take some hours on two cores.
"""

import argparse
import datetime
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]

NUMBERS = (2, 4, 8, 16)

METHODS = (
    *("greedy", "sample"),
    *(f"majority_vote:{n}" for n in NUMBERS),
    *(f"weighted_vote:{n}" for n in NUMBERS),
    *(f"best_of_n:{n}/verifier" for n in NUMBERS),
    *("stage_beam:4/verifier", "sentence_beam:2/verifier", "retracing"),
)

JUDGED, JUDGED_QUESTIONS = ("greedy", "sample", "majority_vote:4", "best_of_n:4/token", "stage_beam:4/token"), 400
"""Methods that the judge of pairs is compared with, and the number of questions: it takes three times as long."""

SETTINGS = ("--max_new_tokens", "120", "--slots", "16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="Folder of the comparison, which may have answers already.")
    parser.add_argument("--limit", type=int, default=2000, help="Number of questions.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder or Path(made)
        compare(JUDGED, min(options.limit, JUDGED_QUESTIONS), folder)
        compare(METHODS, options.limit, folder, "--max_rounds", "2")


def compare(methods: Sequence[str], limit: int, folder: Path, *more: str) -> None:
    """Run the command, and print its tables without the lines that tell how far it is."""
    benchmark = ("--benchmark", "shapes", "--limit", str(limit))
    arguments = ["evaluate", *benchmark, *SETTINGS, *more, "--compare", ",".join(methods), "--output", str(folder)]
    print(f"{datetime.date.today()}; jax {version('jax')}, jaxlib {version('jaxlib')}")
    print(f"llava-cot {shlex.join(arguments)}", flush=True)
    start = time.perf_counter()
    command = [sys.executable, "-m", "llava_cot_jax", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True, file=sys.stderr if line.startswith("comparing ") else sys.stdout)
    if process.returncode:
        raise SystemExit(process.returncode)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"this call took {(time.perf_counter() - start) / 3600:.2f} hours and at most {peak:.1f} GiB of memory")


if __name__ == "__main__":
    main()
