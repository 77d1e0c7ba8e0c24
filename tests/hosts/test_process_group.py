"""Which processes make up a run: by the options, and by what launchers leave in the environment."""

import os
import subprocess
import sys

import pytest

from llava_cot_jax.errors import UserError
from llava_cot_jax.hosts.process_group import ProcessGroup, bypass_proxies, find_group, local_share
from tests.processes import ROOT

SLURM = {
    "SLURM_JOB_ID": "4100",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu[007-009,12],other",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x4)",
    "SLURM_PROCID": "3",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
LAUNCHERS = SLURM | OPEN_MPI | KUBERNETES


@pytest.fixture
def environment(monkeypatch):
    """Sets exactly the launchers' variables that it is given."""
    for name in [*LAUNCHERS, "CUDA_VISIBLE_DEVICES"]:
        monkeypatch.delenv(name, raising=False)

    def give(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return give


def found() -> ProcessGroup:
    return find_group(None, None, None)


class TestOptions:
    def test_they_count_before_the_environment(self, environment):
        environment(SLURM)
        assert find_group("[fe80::1]:99", 3, 2) == ProcessGroup("[fe80::1]:99", 3, 2)
        assert (ProcessGroup("[fe80::1]:99", 3, 2).host, ProcessGroup("a.b:99", 3, 2).port) == ("fe80::1", 99)

    def test_a_count_of_one_is_this_process_alone(self, environment):
        environment(SLURM)
        assert find_group(None, 1, None) == find_group("gone:1", 1, 0) == ProcessGroup()

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ((None, 2, None), r"give --hosts\.coordinator and --hosts\.index too"),
            (("localhost", 2, 0), r"hosts\.coordinator is 'localhost'; give HOST:PORT"),
            (("localhost:0", 2, 0), "HOST:PORT"),
            ((":12", 2, 0), "HOST:PORT"),
            (("localhost:port", 2, 0), "HOST:PORT"),
            (("a:1", 0, 0), r"hosts\.count is 0"),
            (("a:1", 2, 2), r"hosts\.index is 2; with 2 processes it is 0 to 1"),
            (("a:1", 2, -1), r"hosts\.index is -1"),
        ],
    )
    def test_impossible_ones_are_refused(self, environment, given, message):
        with pytest.raises(UserError, match=message):
            find_group(*given)


class TestSlurm:
    def test_the_tasks_of_a_step(self, environment):
        environment(SLURM)
        group = found()
        assert (group.count, group.index, group.host) == (8, 3, "gpu007")
        assert group.address == f"gpu007:{65536 - 4096 + 4102 % 4096}"

    @pytest.mark.parametrize(
        ("nodes", "first"), [("n1", "n1"), ("n1,n2", "n1"), ("n[3,5]", "n3"), ("rack-a[01-02]-ib,x", "rack-a01-ib")]
    )
    def test_the_first_node(self, environment, nodes, first):
        environment(SLURM | {"SLURM_STEP_NODELIST": nodes})
        assert found().host == first

    def test_a_shell_in_an_allocation_is_alone(self, environment):
        """Its step has one task, whatever the allocation has; it uses all GPUs."""
        environment(SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
        assert found() == ProcessGroup()

    @pytest.mark.parametrize("missing", ["SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST"])
    def test_parts_of_its_variables_make_no_group(self, environment, missing):
        environment({name: value for name, value in SLURM.items() if name != missing})
        assert found() == ProcessGroup()

    @pytest.mark.parametrize("damaged", [{"SLURM_JOB_ID": "x"}, {"SLURM_STEP_NUM_TASKS": ""}, {"SLURM_PROCID": "8"}])
    def test_damaged_variables_make_no_group(self, environment, damaged):
        environment(SLURM | damaged)
        assert found() == ProcessGroup()


class TestOpenMpi:
    def test_processes_on_several_machines(self, environment):
        environment(OPEN_MPI)
        assert found().address == f"10.96.0.1:{65536 - 4096 + 1531576320 // 4096 % 4096}"
        assert (found().count, found().index) == (4, 3)

    def test_an_ipv6_address(self, environment):
        environment(OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp6://[fe80::3000:2]:43370"})
        assert (found().host, found().port) == ("fe80::3000:2", 61441)

    def test_processes_on_one_machine_need_no_address(self, environment):
        """Open MPI 5 gives none; all of its processes have one namespace."""
        local = {name: value for name, value in OPEN_MPI.items() if "uri" not in name}
        environment(local | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "job-1"})
        address = found().address
        environment({"OMPI_COMM_WORLD_RANK": "0"})
        assert found().address == address and address.startswith("localhost:")

    def test_several_machines_without_an_address_are_told(self, environment):
        environment({name: value for name, value in OPEN_MPI.items() if "uri" not in name})
        with pytest.raises(UserError, match=r"give --hosts\.coordinator HOST:PORT, --hosts\.count 4"):
            found()

    @pytest.mark.parametrize("missing", [name for name in OPEN_MPI if "uri" not in name])
    def test_parts_of_its_variables_make_no_group(self, environment, missing):
        environment({name: value for name, value in OPEN_MPI.items() if name != missing})
        assert found() == ProcessGroup()


def test_a_pod_whose_job_cannot_be_asked_for_is_alone(environment, caplog, monkeypatch):
    monkeypatch.setattr("llava_cot_jax.hosts.process_group.find_spec", lambda name: None)
    environment(KUBERNETES)
    assert found() == ProcessGroup()
    assert "the package kubernetes is not installed" in caplog.text and "\n" not in caplog.messages[0]
    caplog.clear()
    monkeypatch.delenv("JOB_COMPLETION_INDEX")
    assert found() == ProcessGroup() and not caplog.messages


@pytest.mark.parametrize(
    ("local", "environment", "share"),
    [
        ((0, 1), {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, None),  # one process has all GPUs
        ((1, 2), {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, (2, 3)),
        ((3, 4), {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, (3,)),
        ((1, 2), {"CUDA_VISIBLE_DEVICES": "5"}, None),  # the launcher has given it one
        ((1, 2), {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "2"}, None),
        ((1, 2), {"CUDA_VISIBLE_DEVICES": "0,1", "JAX_LOCAL_DEVICE_IDS": "0"}, None),
    ],
)
def test_gpus_are_shared_among_the_processes_of_a_machine(local, environment, share):
    assert local_share(*local, environment) == share


@pytest.mark.parametrize(("per_node", "node", "local"), [("1(x4)", 2, 0), ("3,1", 1, 0)])
def test_a_task_alone_on_its_node_uses_all_gpus(environment, per_node, node, local):
    step = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": per_node, "SLURM_PROCID": "3"}
    here = {"SLURM_NODEID": str(node), "SLURM_LOCALID": str(local), "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    environment(SLURM | step | here)
    assert found().local_devices is None
    environment({"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_NODEID": "1", "SLURM_LOCALID": "1"})
    assert found().local_devices == (2, 3)


@pytest.mark.parametrize("kept", [{}, {"no_proxy": "hub"}, {"no_grpc_proxy": "bucket", "no_proxy": "hub"}])
def test_what_the_user_reaches_without_a_proxy_stays(monkeypatch, kept):
    monkeypatch.setattr(os, "environ", dict(kept))
    bypass_proxies("[fe80::1]:99")
    names = os.environ.pop("no_grpc_proxy").split(",")
    assert {"fe80::1", "localhost", "127.0.0.1"} <= set(names)
    assert os.environ == {name: value for name, value in kept.items() if name == "no_proxy"}
    assert kept.get("no_grpc_proxy", kept.get("no_proxy", "localhost")) in names


BEHIND_A_PROXY = """
from llava_cot_jax.hosts.joining import join_hosts
from llava_cot_jax.hosts.process_group import ProcessGroup
join_hosts(ProcessGroup())
print("joined")
"""


@pytest.mark.slow
def test_behind_a_proxy_that_does_not_answer():
    """A real process, which would never return: gRPC gives the local address to the proxy."""
    proxy = "http://127.0.0.1:9"
    environment = os.environ | {"http_proxy": proxy, "https_proxy": proxy, "all_proxy": proxy}
    done = subprocess.run(
        [sys.executable, "-c", BEHIND_A_PROXY], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "joined\n", "")
