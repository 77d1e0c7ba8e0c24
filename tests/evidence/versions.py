"""Run the whole test suite with the oldest or the newest version of every dependency that pyproject.toml allows.

    python3.11 tests/evidence/versions.py oldest | tee tests/evidence/versions_oldest.txt
    python3.13 tests/evidence/versions.py newest | tee tests/evidence/versions_newest.txt

The environment is made with the Python that runs the script, in a temporary folder or in ``--folder``, which is kept.
Arguments after ``--`` go to pytest, as in ``versions.py oldest -- -m "not slow"``. Where a package is both a dependency
and a pinned reference of the extra ``test``, the version of the dependency counts, since that is what users have.
Dependencies of dependencies have the newest versions that go with them. The script prints the versions, what failed,
and the last line of pytest.
"""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("end", choices=["oldest", "newest"], help="Versions of the dependencies to test with.")
    parser.add_argument("--folder", type=Path, help="Folder of the environment, which is made or updated, and kept.")
    arguments = sys.argv[1:]
    end = arguments.index("--") if "--" in arguments else len(arguments)
    given = parser.parse_args(arguments[:end])
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder.absolute() if given.folder else Path(scratch)
        wanted = requirements(given.end)
        python = make(folder, given.end, wanted)
        print(f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores; the {given.end} of each")
        print(f"Python {platform.python_version()}; {versions(python, wanted)}", flush=True)
        return run(python, arguments[end + 1 :])


def requirements(end: str) -> list[str]:
    """Return the requirements of the project and of its extra ``test`` at one end of their bounds."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = {name_of(wanted): wanted for wanted in project["optional-dependencies"]["test"]}
    found |= {name_of(wanted): wanted for wanted in project["dependencies"]}
    return [wanted if end == "newest" else at_its_lowest(wanted) for wanted in found.values()]


def name_of(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def at_its_lowest(requirement: str) -> str:
    """Return ``name>=1.2,<3`` as ``name==1.2``. Every lower bound is a released version."""
    return re.sub(r">=([^,]+),<.*", r"==\1", requirement)


def make(folder: Path, end: str, wanted: list[str]) -> Path:
    """Make an environment with these packages and this checkout, and return its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    upgrade = ["--upgrade", "--upgrade-strategy", "eager"] if end == "newest" else []
    for arguments in (["--upgrade", "pip"], [*upgrade, *wanted], ["--no-deps", "--editable", str(ROOT)]):
        subprocess.run([python, "-m", "pip", "install", "--quiet", *arguments], check=True, stdout=sys.stderr)
    subprocess.run([python, "-m", "pip", "check"], check=True, stdout=sys.stderr)
    return python


def versions(python: Path, wanted: list[str]) -> str:
    """Return the installed versions of the requirements, by name."""
    listed = subprocess.run([python, "-m", "pip", "list", "--format", "json"], check=True, capture_output=True).stdout
    held = {name_of(package["name"]): package["version"] for package in json.loads(listed)}
    return ", ".join(f"{name} {held[name]}" for name in sorted(map(name_of, [*wanted, "jaxlib"])))


def run(python: Path, arguments: list[str]) -> int:
    """Run pytest, print the lines of failures and its last line, and return its exit code."""
    environment = {name: x for name, x in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", "VIRTUAL_ENV": str(python.parents[1])}
    lines: list[str] = []
    with subprocess.Popen(
        [python, "-m", "pytest", *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as suite:
        for line in suite.stdout:
            print(line, end="", file=sys.stderr)
            lines.append(line.rstrip())
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    print(*failed, *lines[-1:], sep="\n")
    return suite.returncode


if __name__ == "__main__":
    sys.exit(main())
