"""A gcloud for tests: notes every call, plays a script of states and failures, and has folders for hosts.

What it is called with goes to calls.jsonl in the folder that $STAND_IN names, one list a line. world.json there says
what happens:

- ``lives``: the states that a queued resource is seen in, look by look, one list for each time that it is created; the
  last one stays. A state in which nothing is left of its machines ends what runs on the hosts.
- ``machine``: the states of the TPU VM, look by look.
- ``faults``: [pattern, code, times]: calls that match fail with this code, so many times.
- ``hosts``: how many there are. Each is a folder, the home of what ssh runs there; a deletion empties it.

A test calls it dozens of times, so it imports little: no pathlib, and the rest where it is used.
"""
# ruff: noqa: PTH103, PTH112, PTH123

import json
import os
import re
import signal
import sys

STAND_IN = os.environ["STAND_IN"]
GONE = ("SUSPENDING", "SUSPENDED", "PREEMPTED")


def main(arguments: list[str]) -> int:
    with open(f"{STAND_IN}/calls.jsonl", "a") as calls:
        calls.write(json.dumps(arguments) + "\n")
    with open(f"{STAND_IN}/world.json") as file:
        world = json.load(file)
    code = play(world, arguments)
    with open(f"{STAND_IN}/world.json", "w") as file:
        json.dump(world, file)
    return code


def play(world: dict, arguments: list[str]) -> int:
    line = " ".join(arguments)
    for fault in world["faults"]:
        pattern, code, times = fault
        if times and re.search(pattern, line):
            fault[2] -= 1
            print("ERROR: (gcloud) scripted", file=sys.stderr)
            return code
    match arguments:
        case ["compute", "tpus", "queued-resources", verb, *_]:
            queued(world, verb)
        case ["compute", "tpus", "tpu-vm", "describe", *_]:
            look(world, "machine", world["machine"])
        case ["compute", "tpus", "tpu-vm", "ssh", *_]:
            return ssh(world, option(arguments, "worker"), option(arguments, "command"))
        case ["compute", "tpus", "tpu-vm", "scp", source, target, *_]:
            scp(world, option(arguments, "worker"), source, target)
        case ["storage", "cp", "--recursive", source, target, *_]:
            with open(target + source.rpartition("/")[2], "w") as file:
                file.write("from the bucket")
    return 0


def option(arguments: list[str], name: str) -> str:
    return next(a for a in arguments if a.startswith(f"--{name}=")).partition("=")[2]


def look(world: dict, what: str, states: list[str]) -> None:
    """Print the state of this look."""
    seen = world["looks"].get(what, 0)
    world["looks"][what] = seen + 1
    state = states[min(seen, len(states) - 1)]
    if state in GONE:
        end_jobs(world)
    print(state)


def queued(world: dict, verb: str) -> None:
    if verb == "create":
        world["life"] += 1
        world["there"] = True
    elif verb == "delete":
        from shutil import rmtree

        end_jobs(world)
        for host in hosts(world):
            rmtree(host, ignore_errors=True)
        world["there"] = False
    elif verb == "list" and world["there"]:
        look(world, f"life {world['life']}", world["lives"][world["life"]])


def hosts(world: dict, worker: str = "all") -> list[str]:
    found = [f"{STAND_IN}/hosts/w-{i}" for i in range(world["hosts"]) if worker in ("all", str(i))]
    for host in found:
        os.makedirs(host, exist_ok=True)
    return found


def ssh(world: dict, worker: str, command: str) -> int:
    """All hosts at once; the code is that of the first that fails, as gcloud has it."""
    from subprocess import Popen

    running = []
    for host in hosts(world, worker):
        environment = {
            "HOME": host,
            "HOSTNAME": host.rpartition("/")[2],
            "PATH": f"{STAND_IN}/host_bin:/usr/bin:/bin",
            "STAND_IN": STAND_IN,
        }
        running.append(Popen(["bash", "-c", command], cwd=host, env=environment))
    codes = [process.wait() for process in running]
    return next((code for code in codes if code), 0)


def scp(world: dict, worker: str, source: str, target: str) -> None:
    from shutil import copy, copytree

    if ":" in target:
        for host in hosts(world, worker):
            copy(source, f"{host}/{target.partition(':')[2]}")
    else:
        (host,) = hosts(world, worker)
        path = f"{host}/{source.partition(':')[2]}"
        folder = os.path.isdir(path)
        (copytree if folder else copy)(path, f"{target}{path.rpartition('/')[2]}")


def end_jobs(world: dict) -> None:
    """Machines that are taken away leave no exit code."""
    for host in hosts(world):
        try:
            with open(f"{host}/llava_cot_jax_job/pid") as file:
                os.killpg(int(file.read()), signal.SIGKILL)
        except (OSError, ValueError):
            pass
