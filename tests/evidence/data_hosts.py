"""Check that 1, 2 and 4 processes with 0, 1 and 2 workers each read the same global batches, also when resumed.

    python tests/evidence/data_hosts.py | tee tests/evidence/data_hosts.txt

Batches are compared byte for byte.
"""

import argparse
import datetime
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.distributed.data_worker import BATCH, RANGES
from tests.distributed.test_data import run, whole

HOSTS, WORKERS = (1, 2, 4), (0, 1, 2)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"{datetime.date.today()}; grain {version('grain')}; 24 batches of {BATCH} rows over four CPU devices")
    with tempfile.TemporaryDirectory() as scratch:
        found = {processes: run(processes, Path(scratch), max(WORKERS)) for processes in HOSTS}
    reference = whole(found[1], "in order, 0 workers, 0 to 24")
    assert len({json.dumps(batch) for batch in reference}) == 24
    for hosts in HOSTS:
        for workers in WORKERS:
            assert whole(found[hosts], f"in order, {workers} workers, 0 to 24") == reference
            if workers < 2:
                assert whole(found[hosts], f"in order, {workers} workers, 7 to 15") == reference[7:15]
        assert whole(found[hosts], "interleaved, 0 workers, 0 to 24") == reference
        for start, stop in RANGES:
            reads = [process[f"in order, 0 workers, {start} to {stop}: read"] for process in found[hosts]]
            assert reads == [(stop - start) * BATCH // hosts] * hosts
        counts = ", ".join(map(str, WORKERS))
        print(f"{hosts} processes, {counts} workers each: all batches the same; each process reads its share alone")


if __name__ == "__main__":
    main()
