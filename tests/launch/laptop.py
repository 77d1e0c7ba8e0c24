"""A laptop with a checkout and a stand-in for gcloud, whose hosts are folders where commands really run."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
GCLOUD = f"""#!{sys.executable} -SE
import sys
sys.path.append("{ROOT}/tests/launch")
from stand_in_gcloud import main
sys.exit(main(sys.argv[1:]))
"""
ZONE = "--zone=us-east5-b"
TYPE = "--accelerator-type=v5litepod-16"
TRAIN = ["train", "--output", "gs://bucket/runs/one"]
QUIET = [ZONE, "--quiet"]
SSH = ["compute", "tpus", "tpu-vm", "ssh", "tpu"]
FLAGS = ["--ssh-flag=-oConnectTimeout=10", "--ssh-flag=-oServerAliveInterval=30"]
LIST = ["compute", "tpus", "queued-resources", "list", '--filter=name ~ "/tpu$"', "--format=value(state.state)", *QUIET]
DELETE = ["compute", "tpus", "queued-resources", "delete", "tpu", "--force", *QUIET]
LOOK = ["list", "describe", "status"]

HOST_BIN = {
    # A host's Python, which makes environments without anything in them.
    "python3": """#!/bin/bash
        echo "python3 $*" >> "$STAND_IN/python.$HOSTNAME"
        case "$*" in
          *version_info*) exit "${OLD_PYTHON:-0}" ;;
          *venv*)
            mkdir -p .venv/bin
            printf '#!/bin/bash\\necho "pip $*" >> "$STAND_IN/python.$HOSTNAME"' > .venv/bin/pip
            printf '#!/bin/bash\\necho "8 devices: stand-in"' > .venv/bin/python
            chmod +x .venv/bin/* ;;
        esac
    """,
    # Trains as a line of `outcomes` says: the first start as the first line, and so on.
    "train": """#!/bin/bash
        echo "$*" >> "$STAND_IN/starts.$HOSTNAME"
        [ -e "$STAND_IN/outcomes.$HOSTNAME" ] || cp "$STAND_IN/outcomes" "$STAND_IN/outcomes.$HOSTNAME"
        outcome=$(sed -n "$(wc -l < "$STAND_IN/starts.$HOSTNAME")p" "$STAND_IN/outcomes.$HOSTNAME")
        case $outcome in save) trap 'echo saved; exit 0' TERM ;; stubborn) trap '' TERM ;; esac
        echo "training: $outcome"
        case $outcome in
          hang) exec sleep 60 ;;
          save | stubborn) while :; do sleep 0.05; done ;;
          *) exit "$outcome" ;;
        esac
    """,
}


class Laptop:
    """A checkout, a gcloud, and what the gcloud saw."""

    def __init__(self, checkout: Path, folder: Path) -> None:
        self.checkout, self.folder = checkout, folder
        self.world: dict[str, Any] = {"lives": [["ACTIVE"]] * 9, "machine": ["READY"], "faults": [], "hosts": 1}
        self.world |= {"there": False, "life": -1, "looks": {}}
        self.environment = {
            "PATH": f"{folder}/bin:/usr/bin:/bin",
            "HOME": str(folder / "home"),
            "TMPDIR": str(folder / "temporary"),
            "STAND_IN": str(folder),
            "LAUNCH_POLL": "0.02",
            "LAUNCH_PATIENCE": "4",
        }
        for path, text in {
            "bin/gcloud": GCLOUD,
            **{f"host_bin/{name}": script for name, script in HOST_BIN.items()},
        }.items():
            script = folder / path
            script.parent.mkdir(exist_ok=True)
            script.write_text(text)
            script.chmod(0o755)
        (folder / "home").mkdir()
        (folder / "temporary").mkdir()

    def script(self, **world: Any) -> None:
        """What will happen."""
        self.world |= world
        (self.folder / "world.json").write_text(json.dumps(self.world))

    def trains(self, *outcomes: str, host: str = "") -> None:
        (self.folder / f"outcomes{host}").write_text("\n".join(outcomes) + "\n")

    def arguments(self, verb: str, *arguments: str) -> list[str]:
        if not (self.folder / "world.json").exists():
            self.script()
        return ["bash", str(self.checkout / f"launch/{verb}.sh"), *arguments]

    def run(self, verb: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        options = {"stdin": subprocess.DEVNULL, "env": self.environment, "cwd": self.folder} | options
        return subprocess.run(self.arguments(verb, *arguments), capture_output=True, text=True, timeout=60, **options)

    def start(self, verb: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """The same, while the test goes on."""
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        environment = self.environment | environment
        return subprocess.Popen(self.arguments(verb, *arguments), env=environment, text=True, **pipes)

    def on_host(self) -> dict[str, str]:
        """The environment of what runs on the first host, without a laptop."""
        home = self.folder / "hosts/w-0"
        home.mkdir(parents=True, exist_ok=True)
        return {"HOME": str(home), "HOSTNAME": "w-0", "PATH": f"{self.folder}/host_bin:/usr/bin:/bin"}

    def job(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run("job", *arguments, env=self.environment | self.on_host())

    def state(self, *command: str) -> str:
        return self.job("status", *command).stdout.removeprefix("job w-0 ").strip()

    def log(self, host: str = "w-0") -> str:
        """What the command on a host has printed."""
        path = self.folder / "hosts" / host / "llava_cot_jax_job/log"
        return path.read_text() if path.exists() else ""

    def until(self, state: str) -> None:
        wait(lambda: self.state() == state)

    def starts(self, host: str = "w-0") -> list[str]:
        """The arguments of each start of `train` on a host."""
        path = self.folder / f"starts.{host}"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def calls(self) -> list[list[str]]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def order(self) -> list[str]:
        """The calls by their verbs; the same look at a state and a command many times in a row is one."""
        verbs = [verb_of(call) for call in self.calls]
        text = re.sub(r"(list describe status )\1+", r"\1", " ".join(verbs) + " ")
        return text.split()

    def end(self) -> None:
        for pid in self.folder.glob("hosts/*/llava_cot_jax_job/pid"):
            with suppress(OSError, ValueError):
                os.killpg(int(pid.read_text()), signal.SIGKILL)


def wait(for_this: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not for_this():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def verb_of(call: list[str]) -> str:
    if "ssh" not in call:
        return call[3] if call[0] == "compute" else call[1]
    command = next(word for word in call if word.startswith("--command="))
    return "install" if "tar -xzf" in command else re.search(r"bash \S+job.sh (\w+)", command)[1]


def refused(laptop: Laptop, verb: str, *arguments: str) -> str:
    done = laptop.run(verb, *arguments)
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr)
    assert laptop.calls == []
    return done.stderr
