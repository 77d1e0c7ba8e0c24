"""Spot capacity that comes and goes, and commands that fail on it."""

import os
import signal
import subprocess
from typing import Any

import pytest

from tests.launch.laptop import DELETE, LIST, LOOK, QUIET, TRAIN, TYPE, ZONE, Laptop, refused, verb_of, wait


def spot(laptop: Laptop, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return laptop.run("spot", "tpu", ZONE, TYPE, *arguments, "--", *TRAIN, **options)


INSTALL = [*LOOK, "scp", "install", "start"]


@pytest.mark.slow
def test_capacity_that_is_taken_away_is_asked_for_again_and_the_same_command_started(laptop):
    lives = [["WAITING_FOR_RESOURCES", "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED"], ["ACTIVE"]]
    laptop.script(lives=lives, hosts=2)
    laptop.trains("hang", "0")
    done = spot(laptop)
    assert done.returncode == 0, done.stderr
    first = ["list", "list", "create", "list", *INSTALL, *LOOK, "list", "list", "delete"]
    assert laptop.order == [*first, "list", "create", *INSTALL, *LOOK, "delete"]
    created = ["compute", "tpus", "queued-resources", "create", "tpu", "--node-id=tpu", TYPE]
    created += ["--runtime-version=v2-alpha-tpuv5-lite", "--spot", *QUIET]
    assert [call for call in laptop.calls if "create" in call] == [created] * 2
    assert laptop.calls[-1] == DELETE
    assert laptop.starts("w-0") == laptop.starts("w-1") == ["--output gs://bucket/runs/one"] * 2
    assert "SUSPENDED: the capacity was taken away" in done.stdout


def test_a_preempted_machine_counts_though_its_request_is_active(laptop):
    laptop.script(machine=["CREATING", "READY", "READY", "PREEMPTED", "READY"])
    laptop.trains("hang", "0")
    assert spot(laptop).returncode == 0
    assert laptop.order.count("create") == laptop.order.count("delete") == 2
    assert len(laptop.starts()) == 2


@pytest.mark.slow
def test_a_command_that_fails_on_its_own_is_started_again_a_few_times(laptop):
    laptop.trains("1", "1", "7", "0")
    done = spot(laptop)
    assert done.returncode == 7
    assert len(laptop.starts()) == 3
    assert laptop.order.count("create") == 1
    assert laptop.order[-3:] == ["stop", "follow", "delete"]
    assert "failure 3 of 3" in done.stdout
    assert "w-0: training: 7" in done.stdout


def test_one_host_that_fails_restarts_all(laptop):
    laptop.script(hosts=2)
    laptop.trains("hang", "0")
    laptop.trains("1", "0", host=".w-1")
    assert spot(laptop).returncode == 0
    assert len(laptop.starts("w-0")) == len(laptop.starts("w-1")) == 2
    assert laptop.order.count("create") == 1


def test_a_command_that_vanished_is_started_again(laptop):
    """As when its host restarts: the capacity is there, and no exit code."""
    laptop.trains("hang", "0")
    watching = laptop.start("spot", "tpu", ZONE, TYPE, "--", *TRAIN)
    wait(laptop.log)
    laptop.end()
    assert "w-0 lost" in watching.communicate(timeout=30)[0]
    assert watching.returncode == 0
    assert len(laptop.starts()) == 2
    assert laptop.order.count("create") == 1


def test_a_run_that_saved_and_ended_since_one_host_was_asked_to_stop_is_not_done(laptop):
    """SIGTERM, as before a preemption, on one host: all of a run's processes end with 0 after a checkpoint."""
    laptop.script(hosts=2)
    laptop.trains("save", "0")
    watching = laptop.start("spot", "tpu", ZONE, TYPE, "--attempts=9", "--", *TRAIN, LAUNCH_POLL="0.3")
    wait(lambda: laptop.log("w-0") and laptop.log("w-1"))
    os.kill(int((laptop.folder / "hosts/w-1/llava_cot_jax_job/pid").read_text()), signal.SIGTERM)
    assert watching.wait(timeout=30) == 0
    assert len(laptop.starts("w-0")) == len(laptop.starts("w-1")) == 2


@pytest.mark.slow
def test_failures_while_capacity_is_taken_away_do_not_count(laptop):
    """The command ends before the request is seen to be suspended, twice."""
    laptop.script(lives=[["ACTIVE", "ACTIVE", "SUSPENDED"]] * 2 + [["ACTIVE"]])
    laptop.trains("134", "134", "0")
    done = spot(laptop, "--attempts=1")
    assert done.returncode == 0, done.stdout
    assert laptop.order.count("create") == 3


def test_a_mistake_in_the_command_is_not_tried_again(laptop):
    laptop.trains("2", "0")
    done = spot(laptop)
    assert done.returncode == 2
    assert len(laptop.starts()) == 1
    assert "training: 2" in done.stdout
    assert laptop.order[-1] == "delete"


def test_a_failure_in_the_middle_of_an_installation_is_tried_again(laptop):
    laptop.script(faults=[["scp", 1, 1]])
    done = spot(laptop)
    assert done.returncode == 0
    assert laptop.order[2:] == ["create", *LOOK, "scp", "list", "describe", *INSTALL, *LOOK, "delete"]
    assert "failure 1 of 3" in done.stdout


def test_an_installation_that_always_fails_ends_it(laptop):
    laptop.script(faults=[["tar -xzf", 1, 9]])
    assert spot(laptop).returncode == 1
    assert laptop.order.count("install") == 3
    assert laptop.order[-1] == "delete"


def test_silence_is_no_loss(laptop):
    """Neither where gcloud gives no state nor where hosts do not answer is anything deleted or started again."""
    laptop.trains("hang")
    laptop.script(faults=[["job.sh status", 255, 3], ["describe", 1, 3]])
    watching = laptop.start("spot", "tpu", ZONE, TYPE, "--", *TRAIN)
    wait(lambda: sum(verb_of(call) == "status" for call in laptop.calls) > 5)
    assert laptop.order.count("create") == len(laptop.starts()) == 1
    assert "delete" not in laptop.order
    watching.send_signal(signal.SIGTERM)
    assert "no answer from the hosts" in watching.communicate(timeout=30)[0]


def test_hosts_that_stay_silent_are_given_up(laptop):
    laptop.script(faults=[["job.sh status", 255, 4]])
    assert spot(laptop).returncode == 0
    assert laptop.order.count("create") == 2


def test_an_interruption_leaves_all_as_it_is_and_the_same_call_takes_it_up(laptop):
    laptop.trains("save")
    watching = laptop.start("spot", "tpu", ZONE, TYPE, "--", *TRAIN)
    wait(laptop.starts)
    watching.send_signal(signal.SIGTERM)
    assert "error: interrupted: tpu goes on, and costs money" in watching.communicate(timeout=30)[1]
    assert watching.returncode == 130
    assert laptop.state() == "running"
    assert "delete" not in laptop.order

    before = len(laptop.calls)
    asked = spot(laptop)
    assert asked.returncode == 2
    assert "there is no terminal on which to confirm" in asked.stderr
    assert laptop.calls[before:] == [LIST]
    taking = laptop.start("spot", "tpu", ZONE, TYPE, "--yes", "--", *TRAIN)
    (laptop.folder / "hosts/w-0/llava_cot_jax_job/code").write_text("0\n")  # as if the command had ended well
    laptop.end()
    assert taking.wait(timeout=30) == 0
    assert laptop.order.count("create") == laptop.order.count("delete") == 1
    assert len(laptop.starts()) == 1


def test_what_failed_before_is_installed_anew(installed):
    installed.trains("2", "0")
    installed.run("run", "tpu", ZONE, "--", *TRAIN)
    installed.script(there=True, life=0)
    assert spot(installed, "--yes").returncode == 0
    assert len(installed.starts()) == 2
    assert "install" in installed.order
    assert "create" not in installed.order


def test_another_command_is_left_alone(installed):
    installed.trains("hang")
    installed.run("run", "tpu", ZONE, "--detach", "--", "train", "else")
    installed.script(there=True, life=0)
    done = spot(installed, "--yes")
    assert done.returncode == 1
    assert "error: another command runs on tpu" in done.stderr
    assert "delete" not in installed.order
    assert installed.state("train", "else") == "running"


def test_a_request_that_is_refused_at_once_ends_it(laptop):
    laptop.script(faults=[["create", 1, 1]])
    done = spot(laptop)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: nothing was created"
    assert laptop.order == ["list", "list", "create"]


def test_requests_that_fail_are_not_made_for_ever(laptop):
    laptop.script(lives=[["FAILED"]] * 4)
    done = spot(laptop)
    assert done.returncode == 1
    assert "the request FAILED" in done.stdout
    assert laptop.order.count("create") == 4
    assert laptop.order[-1] == "delete"


def test_capacity_may_be_kept(laptop):
    done = spot(laptop, "--keep")
    assert done.returncode == 0
    assert "delete" not in laptop.order
    assert "tpu is kept, and costs money until you run: launch/delete.sh tpu --zone=us-east5-b" in done.stdout


def test_capacity_that_cannot_be_deleted_is_shouted_about(laptop):
    laptop.script(faults=[["delete", 1, 1]])
    done = spot(laptop)
    assert done.returncode == 1
    assert "error: tpu MAY STILL BE THERE" in done.stderr


@pytest.mark.parametrize("there", [False, True])
def test_a_key_that_the_agent_lacks_shows_before_anything_is_created(laptop, there):
    for name, said in (("ssh-add", "256 SHA256:other me"), ("ssh-keygen", "256 SHA256:ours me")):
        (laptop.folder / "bin" / name).write_text(f"#!/bin/sh\necho {said}\n")
        (laptop.folder / "bin" / name).chmod(0o755)
    if there:
        key = laptop.folder / "home/.ssh/google_compute_engine"
        key.parent.mkdir()
        key.write_text("")
    said = refused(laptop, "spot", "tpu", ZONE, TYPE, "--", *TRAIN)
    assert "the ssh agent lacks gcloud's key" in said
    assert ("ssh-keygen -t rsa" in said) != there
