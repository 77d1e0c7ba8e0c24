"""Processes that make up a run: as the options name them, or as a launcher or a TPU slice describes them.

What a launcher left in the environment of a process that it did not start as one of several, such as a shell inside a
Slurm allocation, makes no group.
"""

import logging
import os
import re
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from llava_cot_jax.errors import UserError

ALONE = "to run with this process alone, give --hosts.count 1"
"""Remedy for whoever meant no group."""

_PORTS = 2**12
"""Number of ports, the highest ones, of which a launcher's job gets one by its number."""

_BYPASSED = "no_grpc_proxy"
"""Environment variable of the addresses that gRPC reaches without a proxy."""

_TPU_CLUSTERS, _KUBERNETES = ("gketpu", "gcetpu"), "k8s"
"""Names of the descriptions that jax can read, in their order."""

_Environment = Mapping[str, str]


@dataclass(frozen=True)
class ProcessGroup:
    """Processes of a run, and the place of this process among them.

    Attributes:
        address: Address HOST:PORT at which the first process is reached; empty if this process is alone.
        count: Number of processes.
        index: Index of this process, counted from 0.
        source: What describes the group, for messages.
        local_devices: Indices of the machine's accelerators that this process uses, or None for all of them.

    Raises:
        UserError: The address or one of the numbers is impossible.
    """

    address: str = ""
    count: int = 1
    index: int = 0
    source: str = "the options of hosts"
    local_devices: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"hosts.count is {self.count}; it must be at least 1")
        if not 0 <= self.index < self.count:
            raise UserError(f"hosts.index is {self.index}; with {self.count} processes it is 0 to {self.count - 1}")
        if self.count > 1:
            host, _, port = self.address.rpartition(":")
            if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
                raise UserError(f"hosts.coordinator is {self.address!r}; give HOST:PORT, such as 10.0.0.2:1234")

    @property
    def host(self) -> str:
        """Host of the first process, without the brackets of an IPv6 address."""
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """Port of the first process."""
        return int(self.address.rpartition(":")[2])


def find_group(coordinator: str | None, count: int | None, index: int | None) -> ProcessGroup:
    """Return the group that the options of hosts name or, without them, the one that the environment describes.

    A count of 1 needs no other option, and makes this process run alone wherever it was started.

    Raises:
        UserError: Only some of the options are given, one of them is impossible, or the environment describes a group
            without the address of its first process.
    """
    given = {"coordinator": coordinator, "count": count, "index": index}
    if count == 1 and not index:
        return ProcessGroup()
    missing = [f"--hosts.{name}" for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise UserError(f"give {' and '.join(missing)} too, or none of the hosts' arguments")
    if coordinator is not None and count is not None and index is not None:
        return ProcessGroup(coordinator, count, index)
    for find in (_open_mpi, _slurm, _tpu_slice, _kubernetes):
        if group := find(os.environ):
            return group if group.count > 1 else ProcessGroup()
    return ProcessGroup()


def local_share(local_index: int, local_count: int, environment: _Environment) -> tuple[int, ...] | None:
    """Return the GPUs of a machine that one of several processes on it uses, or None for all that it sees.

    The GPUs that the processes see are shared evenly. Nothing is shared if the launcher has given each process its
    own, if there are fewer GPUs than processes, or if the user has chosen for jax.

    Args:
        local_index: Index of the process among those of its machine.
        local_count: Number of processes of the machine.
        environment: Environment variables.
    """
    given_out = "SLURM_GPUS_PER_TASK" in environment or "gpu" in environment.get("SLURM_TRES_PER_TASK", "")
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    seen = len(visible.split(",")) if visible else len(list(Path("/dev").glob("nvidia[0-9]*")))
    each = seen // local_count
    if local_count == 1 or given_out or not each or "JAX_LOCAL_DEVICE_IDS" in environment:
        return None
    return tuple(range(local_index * each, (local_index + 1) * each))


def bypass_proxies(address: str) -> None:
    """Keep gRPC, with which jax connects the processes, from sending an address to the proxy of the environment.

    Where ``no_grpc_proxy`` is set, gRPC does not read ``no_proxy``. Nothing else reads the former.

    Args:
        address: Address HOST:PORT of the first process.
    """
    kept = os.environ.get(_BYPASSED) or os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    local = [address.rpartition(":")[0].strip("[]"), "localhost", "127.0.0.1", "::1"]
    os.environ[_BYPASSED] = ",".join([*filter(None, [kept]), *local])


def _numbers(environment: _Environment, *names: str) -> tuple[int, ...] | None:
    """Return the integers that variables hold, or None if one of them is missing or holds none."""
    try:
        return tuple(int(environment[name]) for name in names)
    except (KeyError, ValueError):
        return None


def _job_port(environment: _Environment, job: int) -> int:
    """Return the port that all processes of a job derive from its number, or the one that the user chose for jax."""
    chosen = _numbers(environment, "JAX_COORDINATOR_PORT")
    return chosen[0] if chosen else 2**16 - _PORTS + job % _PORTS


def _slurm(environment: _Environment) -> ProcessGroup | None:
    """Return the tasks of the job step that ``srun`` started this process in.

    ``SLURM_NTASKS`` is that of the whole allocation where a step was started from a shell in it.
    """
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    found = _numbers(environment, "SLURM_JOB_ID", tasks, "SLURM_PROCID", "SLURM_LOCALID")
    nodes = re.match(r"(?P<name>[^,\[]+)(?:\[(?P<first>\w+)[^\]]*\](?P<rest>[^,]*))?", environment.get(_NODES, ""))
    if not found or not nodes or not 0 <= found[2] < found[1]:
        return None
    job, count, index, local_index = found
    step = _numbers(environment, "SLURM_STEP_ID") or (0,)
    host = "".join(part or "" for part in nodes.groups())
    return ProcessGroup(
        environment.get("JAX_COORDINATOR_ADDRESS") or f"{host}:{_job_port(environment, job + step[0])}",
        count,
        index,
        "Slurm's variables",
        local_share(local_index, _slurm_tasks_here(environment, count, local_index), environment),
    )


_NODES = "SLURM_STEP_NODELIST"
"""Variable with the nodes of a job step, such as ``node[001-003],other``."""


def _slurm_tasks_here(environment: _Environment, count: int, local_index: int) -> int:
    """Return the number of a step's tasks on this node, which Slurm writes for all of them as ``2(x3),1``."""
    each: list[int] = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "")):
        each += [int(tasks)] * int(times or 1)
    node = _numbers(environment, "SLURM_NODEID") or (0,)
    if sum(each) == count and 0 <= node[0] < len(each):
        return each[node[0]]
    nodes = _numbers(environment, "SLURM_STEP_NUM_NODES") or (count,)
    return max(count // max(nodes[0], 1), local_index + 1)


def _open_mpi(environment: _Environment) -> ProcessGroup | None:
    """Return the processes that ``mpirun`` of Open MPI started this process with.

    Raises:
        UserError: They are on several machines, and nothing tells where the first is, as from Open MPI 5 on.
    """
    world = "OMPI_COMM_WORLD_"
    found = _numbers(environment, *(world + name for name in ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK")))
    if not found or not 0 <= found[1] < found[0]:
        return None
    count, index, local_count, local_index = found
    uri = environment.get("OMPI_MCA_orte_hnp_uri", "")
    launcher = re.match(r"(?P<job>\d+)\..*?tcp6?://\[?(?P<host>[^,\]]+?)(?:[,\]]|:\d+$)", uri)
    if address := environment.get("JAX_COORDINATOR_ADDRESS"):
        pass
    elif local_count == count:  # all are on this machine
        job = zlib.crc32((uri or environment.get("PMIX_NAMESPACE", "")).encode())
        address = f"localhost:{_job_port(environment, job)}"
    elif launcher:
        host = f"[{launcher['host']}]" if ":" in launcher["host"] else launcher["host"]
        address = f"{host}:{_job_port(environment, int(launcher['job']) // _PORTS)}"
    else:
        raise UserError(
            f"Open MPI's variables count {count} processes on several machines, but do not say where the first is: "
            f"give --hosts.coordinator HOST:PORT, --hosts.count {count} and --hosts.index; {ALONE}"
        )
    share = local_share(local_index, max(local_count, 1), environment)
    return ProcessGroup(address, count, index, "Open MPI's variables", share)


def _tpu_slice(environment: _Environment) -> ProcessGroup | None:
    """Return the hosts of the TPU slice, or slices, that this machine belongs to.

    Raises:
        UserError: The machine has TPUs, but its description cannot be read.
    """
    if environment.get("JAX_PLATFORMS") == "cpu" or find_spec("libtpu") is None:
        return None
    try:
        return _described_to_jax(_TPU_CLUSTERS, "the TPU slice")
    except UserError:
        raise
    except Exception as fault:  # a variable that is missing or damaged, or no answer from the metadata server
        raise UserError(
            f"the TPU slice does not say which hosts it has ({_one_line(fault)}): give all three options of hosts; "
            f"{ALONE}"
        ) from fault


def _kubernetes(environment: _Environment) -> ProcessGroup | None:
    """Return the pods of the indexed job that this process runs in, if the package ``kubernetes`` can ask for them."""
    if not {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys():
        return None
    try:
        if find_spec("kubernetes") is None:
            raise ModuleNotFoundError("the package kubernetes is not installed")
        return _described_to_jax((_KUBERNETES,), "Kubernetes' description of the job")
    except Exception as fault:
        logging.getLogger(__name__).warning(
            "Kubernetes' variables are those of an indexed job, whose other pods cannot be found (%s): this process "
            "runs alone; several need the options of hosts",
            _one_line(fault),
        )
        return None


def _described_to_jax(names: tuple[str, ...], source: str) -> ProcessGroup | None:
    """Return the group of the first of jax's own descriptions that is there, or None."""
    from jax._src.clusters import ClusterEnv

    known = {cluster.name: cluster for cluster in ClusterEnv._cluster_types}
    for cluster in filter(None, map(known.get, names)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not cluster.is_env_present():
                continue
            count, index = cluster.get_process_count(), cluster.get_process_id()
            if count == 1:
                return ProcessGroup()
            address: Callable[..., str] = cluster.get_coordinator_address
            port = os.environ.get("JAX_COORDINATOR_PORT")
            return ProcessGroup(address(timeout_secs=60, override_coordinator_port=port), count, index, source)
    return None


def _one_line(fault: BaseException) -> str:
    return " ".join(f"{type(fault).__name__}: {fault}".split())
