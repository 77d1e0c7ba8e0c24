"""Run the tests that take too long for the suite: most are variants, or whole runs, of what it tests.

    python tests/evidence/exhaustive.py | tee tests/evidence/exhaustive.txt

They carry the marker ``exhaustive``, and ``python -m pytest`` leaves them out unless ``-m`` or the id of a test names
them. The script prints, for each file, how many passed and the seconds that they took, then those that failed or were
skipped, and ends with pytest's exit code. Arguments go to pytest, such as a file.
"""

import datetime
import os
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]


def main() -> int:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *sys.argv[1:]]
        ended = subprocess.run([*command, "-m", "exhaustive", f"--junitxml={report}"], cwd=ROOT, stdout=sys.stderr)
        if not report.exists():
            return ended.returncode
        (suite,) = ElementTree.parse(report).getroot()
    print(f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores; jax {version('jax')}")
    passed, seconds, others = Counter[str](), Counter[str](), []
    for case in suite:
        file = "/".join(case.attrib["classname"].split(".")[1:])
        if len(case):
            others.append(f"{case[0].tag}: {file} {case.attrib['name']}")
        passed[file] += not len(case)
        seconds[file] += float(case.attrib["time"])
    for file in sorted(passed):
        print(f"{file}: {passed[file]} passed, {seconds[file]:.0f} s")
    print(*others, f"{passed.total()} passed, {len(others)} did not; {float(suite.attrib['time']):.0f} s", sep="\n")
    return ended.returncode


if __name__ == "__main__":
    sys.exit(main())
