"""The calls of each launch script in their order, a failure in the middle, and what they do on hosts."""

import os
import pty
import shutil
import subprocess
from itertools import groupby

import pytest

from tests.launch.laptop import DELETE, FLAGS, LIST, QUIET, ROOT, SSH, TRAIN, TYPE, ZONE, wait

# --- capacity


@pytest.mark.parametrize(
    ("accelerator", "runtime"),
    [("v5litepod-64", "v2-alpha-tpuv5-lite"), ("v5p-16", "v2-alpha-tpuv5"), ("v6e-16", "v2-alpha-tpuv6e")],
)
def test_create_a_tpu_vm(laptop, accelerator, runtime):
    done = laptop.run(
        "create", "tpu", ZONE, "--accelerator-type", accelerator, "--project=mine", "--create-flag=--network=n"
    )
    assert done.returncode == 0
    created = [
        "compute",
        "tpus",
        "tpu-vm",
        "create",
        "tpu",
        f"--accelerator-type={accelerator}",
        f"--version={runtime}",
    ]
    assert laptop.calls == [[*created, "--network=n", ZONE, "--project=mine", "--quiet"]]


def test_the_zone_may_come_from_the_environment(laptop):
    laptop.environment["CLOUDSDK_COMPUTE_ZONE"] = "us-east5-b"
    assert laptop.run("create", "tpu", TYPE, "--runtime-version=v9").returncode == 0
    assert {ZONE, "--version=v9"} <= set(laptop.calls[0])


def test_create_waits_for_a_queued_resource(laptop):
    laptop.script(lives=[["CREATING", "WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]])
    done = laptop.run("create", "tpu", ZONE, TYPE, "--queued", "--spot", "--valid-until=6h")
    assert done.returncode == 0
    created = ["compute", "tpus", "queued-resources", "create", "tpu", "--node-id=tpu", TYPE]
    created += ["--runtime-version=v2-alpha-tpuv5-lite", "--spot", "--valid-until-duration=6h", *QUIET]
    assert laptop.calls == [created, *[LIST] * 5]
    said = [line.split()[-1] for line in done.stdout.splitlines()]
    assert said == ["CREATING", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]


def test_a_request_that_fails_is_reported(laptop):
    laptop.script(lives=[["WAITING_FOR_RESOURCES", "FAILED"]])
    done = laptop.run("create", "tpu", ZONE, TYPE, "--queued")
    assert done.returncode == 1
    assert "error: there is no capacity: the request is FAILED" in done.stderr


def test_what_gcloud_refuses_is_not_waited_for(laptop):
    laptop.script(faults=[["create", 1, 1]])
    done = laptop.run("create", "tpu", ZONE, TYPE, "--queued")
    assert done.returncode == 1
    assert "error: a command failed with exit code 1: gcloud compute tpus queued-resources create tpu" in done.stderr
    assert laptop.order == ["create"]


# --- install


def test_install_brings_the_last_commit_to_every_host(laptop):
    laptop.script(hosts=2)
    done = laptop.run("install", "tpu", ZONE)
    assert done.returncode == 0, done.stderr
    assert "changes that are not committed are left out" in done.stderr
    assert laptop.order == ["scp", "install"]
    for host in ("w-0", "w-1"):
        installed = laptop.folder / "hosts" / host / "llava_cot_jax"
        assert (installed / "llava_cot_jax/__init__.py").read_text() == "# committed\n"
        assert not (installed / "secret.txt").exists()
        assert "pip install --quiet -e .[tpu]" in (laptop.folder / f"python.{host}").read_text()
    assert not list((laptop.folder / "temporary").iterdir())


def test_a_later_install_leaves_no_code_of_the_former_but_what_runs_wrote(laptop):
    laptop.run("install", "tpu", ZONE)
    installed = laptop.folder / "hosts/w-0/llava_cot_jax"
    (installed / "llava_cot_jax/gone.py").write_text("")
    (installed / "runs").mkdir()
    assert laptop.run("install", "tpu", ZONE).returncode == 0
    assert not (installed / "llava_cot_jax/gone.py").exists()
    assert (installed / "runs").exists()
    assert (installed / "llava_cot_jax/__init__.py").exists()


def test_install_ends_where_a_copy_fails(laptop):
    laptop.script(faults=[["scp", 1, 1]])
    done = laptop.run("install", "tpu", ZONE)
    assert done.returncode == 1
    assert "tpu-vm scp" in done.stderr.splitlines()[-1]
    assert laptop.order == ["scp"]


def test_install_leaves_a_running_command_its_code(laptop):
    laptop.run("install", "tpu", ZONE)
    laptop.trains("hang")
    laptop.run("run", "tpu", ZONE, "--detach", "--", *TRAIN)
    done = laptop.run("install", "tpu", ZONE)
    assert done.returncode == 1
    assert "error: w-0: a command runs: train --output gs://bucket/runs/one" in done.stderr
    assert (laptop.folder / "hosts/w-0/llava_cot_jax/llava_cot_jax/__init__.py").exists()


@pytest.mark.parametrize("old", [0, 1])
def test_a_host_with_an_old_python_gets_a_later_one(laptop, old):
    setup = laptop.folder / "host/launch/tpu_vm_setup.sh"
    setup.parent.mkdir(parents=True)
    for script in ("tpu_vm_setup.sh", "common.sh"):
        shutil.copy(ROOT / "launch" / script, setup.parent)
    environment = {"PATH": f"{laptop.folder}/host_bin:/usr/bin:/bin", "STAND_IN": str(laptop.folder), "HOSTNAME": "w-0"}
    done = subprocess.run(["bash", setup], env=environment | {"OLD_PYTHON": str(old)}, capture_output=True, text=True)
    assert done.stdout == "8 devices: stand-in\n", done.stderr
    seen = (laptop.folder / "python.w-0").read_text()
    assert ("python3 -m uv venv --quiet --clear --seed --python 3.12 .venv" in seen) == bool(old)
    assert ("python3 -m venv --clear .venv" in seen) != bool(old)


# --- run, logs, stop


def test_run_follows_a_command_and_ends_with_its_code(installed):
    odd = ["it's", "$HOME", "`id`", 'a  "b"', "*", "", "new\nline", "ü;|&"]
    script = 'printf "<%s>" "$@"; pwd; sleep 0.2; echo last; exit 7'
    done = installed.run("run", "tpu", ZONE, "--", "bash", "-c", script, "name", *odd)
    assert done.returncode == 7
    where = installed.folder / "hosts/w-0/llava_cot_jax"
    *started, log = done.stdout.split("\n", 2)
    assert sorted(started) == ["w-0: started", "w-1: started"]
    assert log == "".join(f"<{word}>" for word in odd) + f"{where}\nlast\n"
    assert sorted(done.stderr.splitlines()) == ["w-0: ended:7", "w-1: ended:7"]
    assert [verb for verb, _ in groupby(installed.order)] == ["start", "follow", "status"]
    follow = "--command=bash llava_cot_jax/launch/job.sh follow +1"
    assert installed.calls[1] == [*SSH, "--worker=0", *FLAGS, follow, *QUIET]


def test_a_detached_command_outlives_its_connection(installed):
    done = installed.run("run", "tpu", ZONE, "--detach", "--", "bash", "-c", "sleep 0.4; echo late")
    assert done.returncode == 0
    assert installed.order == ["start"]
    assert installed.state() == "running"
    logs = installed.run("logs", "tpu", ZONE, "--worker", "all")
    assert sorted(logs.stdout.splitlines()) == ["w-0: late", "w-1: late"]
    assert logs.returncode == 0


def test_the_same_command_again_only_follows(installed):
    """So does gcloud, which tries once more where a connection breaks; another command is refused."""
    installed.trains("hang")
    for _ in range(2):
        assert installed.run("run", "tpu", ZONE, "--detach", "--", *TRAIN).returncode == 0
    assert installed.starts() == [" ".join(TRAIN[1:])]
    done = installed.run("run", "tpu", ZONE, "--detach", "--", "train", "--output", "elsewhere")
    assert done.returncode == 1
    assert "error: w-0: another command runs: train --output gs://bucket/runs/one" in done.stderr


def test_two_starts_at_once_are_one(laptop):
    laptop.trains("hang")
    starts = [laptop.start("job", "start", "train", **laptop.on_host()) for _ in range(4)]
    assert [start.wait() for start in starts] == [0] * 4
    assert laptop.state("train") == "running"
    assert len(laptop.starts()) == 1


def test_the_states_of_a_command(laptop):
    laptop.trains("3", "hang", "0")
    assert laptop.state() == "none"
    laptop.job("start", "train")
    laptop.until("ended:3")
    assert laptop.state("train") == "ended:3"
    assert laptop.state("train", "more") == "none"
    laptop.job("start", "train")
    assert (laptop.state("train"), laptop.state("other")) == ("running", "busy")
    laptop.end()  # as a restart of the host does
    laptop.until("lost")
    laptop.job("start", "train")
    laptop.until("ended:0")
    assert laptop.job("follow", "5", "yes").stdout == "w-0: training: 0\n"
    assert (laptop.folder / "hosts/w-0/llava_cot_jax_job/log.before").read_text() == "training: hang\n"


def test_stop_lets_a_run_save(installed):
    """Its code 0 is not that of a command that is done: 143, on the host that was asked."""
    installed.trains("save")
    installed.run("run", "tpu", ZONE, "--detach", "--", *TRAIN)
    wait(lambda: installed.log("w-0") and installed.log("w-1"))
    done = installed.run("stop", "tpu", ZONE)
    assert done.returncode == 0
    stop = "--command=bash llava_cot_jax/launch/job.sh stop 600"
    assert installed.calls[-1] == [*SSH, "--worker=all", *FLAGS, stop, *QUIET]
    logs = installed.run("logs", "tpu", ZONE)
    assert logs.stdout == "training: save\nsaved\n"
    assert logs.returncode == 143


def test_stop_kills_what_does_not_end(laptop):
    laptop.trains("stubborn")
    laptop.job("start", "train")
    wait(laptop.log)
    assert laptop.job("stop", "0").returncode == 0
    laptop.until("ended:137")


def test_logs_of_nothing_say_so(laptop):
    done = laptop.run("logs", "tpu", ZONE)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: tpu cannot be reached, or no command was started there"


# --- fetch, delete


def test_fetch_from_a_host_and_from_a_bucket(installed):
    assert installed.run("fetch", "tpu:configs", "out", ZONE, "--worker=1").returncode == 0
    assert installed.run("fetch", "tpu:~/llava_cot_jax/configs/one.yaml", "out/", ZONE).returncode == 0
    assert installed.run("fetch", "gs://bucket/runs/one/", "out").returncode == 0
    out = installed.folder / "out"
    assert sorted(path.name for path in out.iterdir()) == ["configs", "one", "one.yaml"]
    scp = ["compute", "tpus", "tpu-vm", "scp"]
    assert installed.calls == [
        [*scp, "tpu:llava_cot_jax/configs", "out/", "--recurse", "--worker=1", *QUIET],
        [*scp, "tpu:llava_cot_jax/configs/one.yaml", "out/", "--recurse", "--worker=0", *QUIET],
        ["storage", "cp", "--recursive", "gs://bucket/runs/one", "out/", "--quiet"],
    ]
    again = installed.run("fetch", "tpu:configs", "out", ZONE)
    assert (again.returncode, again.stderr) == (2, "error: out/configs already exists\n")
    assert len(installed.calls) == 3


@pytest.mark.parametrize("there", [True, False])
def test_delete_finds_out_what_there_is(laptop, there):
    laptop.script(there=there, life=0)
    assert laptop.run("delete", "tpu", ZONE, "--yes").returncode == 0
    machine = ["compute", "tpus", "tpu-vm", "delete", "tpu", *QUIET]
    assert laptop.calls == [LIST, DELETE if there else machine]


def test_nothing_is_deleted_where_gcloud_does_not_say_what_there_is(laptop):
    laptop.script(faults=[["list", 1, 1]])
    assert laptop.run("delete", "tpu", ZONE, "--yes").returncode == 1
    assert laptop.calls == [LIST]


@pytest.mark.parametrize(("typed", "code"), [("tpu\n", 0), ("yes\n", 1), ("\n", 1)])
def test_deletion_asks_for_the_name(laptop, typed, code):
    laptop.script(there=True, life=0)
    ours, theirs = pty.openpty()
    os.write(ours, typed.encode())
    done = laptop.run("delete", "tpu", ZONE, stdin=theirs)
    os.close(ours)
    os.close(theirs)
    assert "Delete the queued resource tpu in us-east5-b (ACTIVE) and its TPU VM? Type its name:" in done.stderr
    assert done.returncode == code
    assert laptop.calls == ([LIST, DELETE] if code == 0 else [LIST])
