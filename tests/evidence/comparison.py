"""Compare searches on questions of the shapes world, each search with several numbers of candidates.

    python tests/evidence/comparison.py --folder runs/comparison | tee tests/evidence/comparison.txt

The script runs the command that it prints, in a process of its own, and prints the tables, the versions, and the hours
and the memory that this call took. The folder keeps the answers, so that a call after an interruption goes on, and one
with a finished folder prints the tables at once. The plot is in the folder too. Without a folder, one is made that is
removed at the end. All 2,000 questions take some hours on two cores.
"""

import argparse
import datetime
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]

NUMBERS = (2, 4, 8, 16)

METHODS = (
    *("greedy", "sample"),
    *(f"majority_vote:{n}" for n in NUMBERS),
    *(f"weighted_vote:{n}" for n in NUMBERS),
    *(f"best_of_n:{n}/verifier" for n in NUMBERS),
    *("stage_beam:4/verifier", "retracing", "sentence_beam:2/verifier", "best_of_n:4/token"),
    *("stage_beam:2/verifier", "stage_beam:4/token", "stage_beam:8/verifier"),
)

SETTINGS = ("--max_new_tokens", "120", "--max_rounds", "2", "--slots", "16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="Folder of the comparison, which may have answers already.")
    parser.add_argument("--limit", type=int, default=2000, help="Number of questions.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        compare(options.limit, options.folder or Path(made))


def compare(limit: int, folder: Path) -> None:
    """Run the command, and print its tables without the lines that tell how far it is."""
    benchmark = ("--benchmark", "shapes", "--limit", str(limit))
    arguments = ["evaluate", *benchmark, *SETTINGS, "--compare", ",".join(METHODS), "--output", str(folder)]
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
