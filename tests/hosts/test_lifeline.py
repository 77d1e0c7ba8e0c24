"""Processes of a run that meet, compare and fail together: here as threads, each with its own lifeline."""

import contextlib
import json
import queue
import socket
import threading
import time
from collections.abc import Callable
from functools import partial

import pytest

from llava_cot_jax.cli import report
from llava_cot_jax.errors import UserError
from llava_cot_jax.hosts import connections
from llava_cot_jax.hosts import lifeline as module
from llava_cot_jax.hosts.connections import Failure
from llava_cot_jax.hosts.lifeline import Lifeline
from llava_cot_jax.hosts.process_group import ALONE, ProcessGroup
from tests.processes import free_port

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # ends of "processes"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(connections, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(connections, "LEAVING_SECONDS", 0.5)
    monkeypatch.setattr(connections, "_TELLING_SECONDS", 2.0)


@pytest.fixture
def address() -> str:
    return f"localhost:{free_port()}"


class Processes:
    """Threads in the place of processes.

    Args:
        address: Of the first one.
        count: Number of processes of the group.
        work: Of each process that starts, by index.
    """

    def __init__(self, address: str, count: int, work: dict[int, Callable[[Lifeline], object]]) -> None:
        self.codes: queue.Queue[tuple[int, int]] = queue.Queue()
        self.lifelines: dict[int, Lifeline] = {}
        self.gone: set[int] = set()
        for index, do in work.items():
            threading.Thread(target=self._run, args=(ProcessGroup(address, count, index), do), daemon=True).start()

    def _run(self, group: ProcessGroup, do: Callable[[Lifeline], object]) -> None:
        lifeline = Lifeline(group, lambda code: self.left(group.index, code))
        self.lifelines[group.index] = lifeline
        with lifeline.shared_failures(report):
            do(lifeline)
        self.codes.put((group.index, 0))

    def left(self, index: int, code: int) -> None:
        """Close the connections, as the end of a process does."""
        if index in self.gone:
            return  # a thread, which a process would not have left behind
        self.gone.add(index)
        self.codes.put((index, code))
        hub = self.lifelines[index]._hub
        for writer in [*getattr(hub, "_writers", {}).values(), getattr(hub, "_writer", None)]:
            if writer:
                hub._loop.call_soon_threadsafe(writer.transport.abort)

    def ended(self, count: int) -> dict[int, int]:
        """The exit codes of the first ``count`` processes that end."""
        return dict(self.codes.get(timeout=10) for _ in range(count))


def agreeing(**fields: str) -> Callable[[Lifeline], None]:
    def work(lifeline: Lifeline) -> None:
        lifeline.meet()
        lifeline.agree(lambda: fields)

    return work


def failing(fault: BaseException) -> Callable[[Lifeline], None]:
    def work(lifeline: Lifeline) -> None:
        lifeline.meet()
        raise fault

    return work


def waiting(lifeline: Lifeline) -> None:
    lifeline.meet()
    time.sleep(20)  # as in a computation that waits for the others


def test_processes_that_have_read_the_same_go_on(address):
    def work(lifeline):
        lifeline.meet()
        for seed in "123":
            lifeline.agree(partial(dict, seed=seed))

    assert Processes(address, 3, dict.fromkeys(range(3), work)).ended(3) == {0: 0, 1: 0, 2: 0}


def test_a_difference_ends_all_by_the_same_error(address, capsys):
    work = {0: agreeing(seed="1"), 1: agreeing(seed="2"), 2: agreeing(seed="1")}
    assert Processes(address, 3, work).ended(3) == {0: 2, 1: 2, 2: 2}
    lines = capsys.readouterr().err.splitlines()
    host = socket.gethostname()
    told = (
        f"error: the processes of the run differ: seed is 1 in processes 0 ({host}) and 2 ({host}) and 2 in process 1"
    )
    assert len(lines) == 3 and len(set(lines)) == 1 and lines[0].startswith(told)


@pytest.mark.parametrize("who", [0, 2])
@pytest.mark.parametrize(
    ("fault", "code", "own", "others"),
    [
        (UserError("no such\nfile"), 2, "error: no such file", "ended with an error: no such file"),
        (OSError(5, "no disk"), 1, "OSError: [Errno 5] no disk", "ended with OSError: [Errno 5] no disk"),
        (KeyboardInterrupt(), 130, "interrupted", "ended with KeyboardInterrupt"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8000000000 bytes." + "\nBuffer 1" * 1000),
            2,
            "error: out of memory: 8.0 GB are needed at once. Free some memory, or take a machine with more.",
            "ended with an error: out of memory: 8.0 GB are needed at once",
        ),
        (RuntimeError("x" * 1000), 1, f"RuntimeError: {'x' * 1000}", f"ended with RuntimeError: {'x' * 300}..."),
    ],
)
def test_the_error_of_one_ends_the_others(address, capsys, who, fault, code, own, others):
    began = time.monotonic()
    processes = Processes(address, 3, dict.fromkeys(range(3), waiting) | {who: failing(fault)})
    assert processes.ended(3) == dict.fromkeys(range(3), code)
    assert time.monotonic() - began < 5
    lines = capsys.readouterr().err.splitlines()
    assert own in lines
    assert lines.count(f"error: process {who} ({socket.gethostname()}) {others}") == 2


@pytest.mark.parametrize("who", [0, 1])
def test_an_error_before_all_have_come_reaches_those_that_come_later(address, capsys, who):
    def mistaken(lifeline):
        raise UserError("no data here")

    def late(lifeline):
        time.sleep(0.5)
        lifeline.meet()

    assert Processes(address, 2, {who: mistaken, 1 - who: late}).ended(2) == {0: 2, 1: 2}
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: no data here" and lines[1].endswith(") ended with an error: no data here")


@pytest.mark.parametrize("who", [0, 1])
def test_a_process_that_vanishes_ends_the_others(address, capsys, who):
    processes = Processes(address, 2, {0: waiting, 1: waiting})
    deadline = time.monotonic() + 5
    while len(processes.lifelines) < 2 or not all(x._hub.met for x in processes.lifelines.values()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    processes.left(who, -9)
    assert processes.ended(2) == {who: -9, 1 - who: 1}
    assert f"error: process {who} (" in (line := capsys.readouterr().err) and "was lost: its connection" in line


def test_a_process_that_falls_silent_is_lost(address, capsys, monkeypatch):
    """Its connection is open still, as when its machine has lost its power."""
    monkeypatch.setattr(connections, "SILENCE_SECONDS", 0.3)
    processes = Processes(address, 2, {0: waiting})
    with connected(address) as connection:
        connection.sendall(b'{"process": 1, "count": 2, "host": "b"}\n')
        assert processes.ended(1) == {0: 1}
    assert "error: process 1 (b) was lost" in capsys.readouterr().err


def test_a_process_that_has_ended_well_is_no_loss(address):
    processes = Processes(address, 2, {0: finishing_later, 1: Lifeline.meet})
    assert processes.ended(1) == {1: 0}
    processes.left(1, 0)
    assert processes.ended(2) == {1: 0, 0: 0}


def test_an_exit_that_all_agree_on_ends_no_other(address):
    def leaving(lifeline):
        lifeline.meet()
        raise SystemExit(130)

    processes = Processes(address, 2, {0: leaving, 1: finishing_later})
    assert processes.ended(1) == {1: 0}


def finishing_later(lifeline: Lifeline) -> None:
    lifeline.meet()
    time.sleep(0.7)


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_error_that_follows_from_anothers_end_is_not_shown(address, capsys, wrapped):
    class JaxRuntimeError(RuntimeError):
        pass

    def broken_off(lifeline):
        lifeline.meet()
        cause = JaxRuntimeError("connection closed by peer")
        if wrapped:
            raise UserError("no checkpoint can be written: closed by peer") from cause
        raise cause

    def slow(lifeline):
        lifeline.meet()
        time.sleep(0.1)
        raise UserError("the true one")

    assert Processes(address, 2, {0: broken_off, 1: slow}).ended(2) == {0: 2, 1: 2}
    assert "by peer" not in capsys.readouterr().err


class TestWaiting:
    @pytest.fixture(autouse=True)
    def _soon(self, monkeypatch):
        monkeypatch.setattr(module, "FIRST_NOTICE_SECONDS", 0.6)
        monkeypatch.setattr(module, "MEETING_SECONDS", 1.0)

    def test_the_first_process_says_who_is_missing(self, address, capsys, caplog):
        meet = {index: Lifeline.meet for index in (0, 2)}
        assert set(Processes(address, 3, meet).ended(2).values()) == {1}
        missing = f"process 1 to come to {address} (2 of 3 there, by the options of hosts)"
        assert f"waiting for {missing}; {ALONE}" in caplog.messages
        assert f"error: gave up after 1 s of waiting for {missing}; {ALONE}" in capsys.readouterr().err.splitlines()

    @pytest.mark.parametrize(
        ("host", "reason"), [("localhost", "connection refused"), ("no.such.host.invalid", "there is no such name")]
    )
    def test_another_says_why_it_does_not_reach_the_first(self, address, capsys, caplog, host, reason):
        address = address.replace("localhost", host)
        assert Processes(address, 2, {1: Lifeline.meet}).ended(1) == {1: 1}
        told = f"process 0 at {address}: {reason} (this is process 1 of 2, by the options of hosts); {ALONE}"
        assert caplog.messages == [f"waiting for {told}"]
        # A command that ran in this process before has left its printer of warnings, which caplog holds already.
        lines = [line for line in capsys.readouterr().err.splitlines() if line != f"warning: waiting for {told}"]
        assert lines == [f"error: gave up after 1 s of waiting for {told}"]

    def test_a_port_that_is_in_use_is_told(self, address, capsys):
        with socket.create_server(("", int(address.rpartition(":")[2]))):
            assert Processes(address, 2, {0: Lifeline.meet}).ended(1) == {0: 2}
        assert "cannot listen at port" in (line := capsys.readouterr().err) and "in use; name another port" in line


@pytest.mark.parametrize(
    ("hello", "refusal"),
    [
        ({"process": 1, "count": 3, "host": "b"}, "process 1 (b) was told of 3 processes, but process 0 of 2"),
        ({"process": 0, "count": 2, "host": "b"}, "process 0 (b) is there twice"),
    ],
)
def test_processes_that_do_not_belong_together_are_refused(address, capsys, hello, refusal):
    processes = Processes(address, 2, {0: Lifeline.meet})
    told = json.loads(say(address, json.dumps(hello) + "\n"))["failure"]
    assert str(Failure(**told)).startswith(refusal)
    assert processes.ended(1) == {0: 2} and refusal in capsys.readouterr().err


def test_a_stranger_that_calls_does_no_harm(address):
    processes = Processes(address, 2, {0: agreeing(seed="1")})
    assert say(address, "GET / HTTP/1.1\r\n\r\n") == ""
    other = Processes(address, 2, {1: agreeing(seed="1")})
    assert processes.ended(1) == {0: 0} and other.ended(1) == {1: 0}


def say(address: str, text: str) -> str:
    """What is answered to a line."""
    with connected(address) as connection:
        connection.sendall(text.encode())
        return connection.makefile().readline()


def connected(address: str) -> socket.socket:
    """A connection to the first process, once it listens."""
    host, _, port = address.rpartition(":")
    for _ in range(100):
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection((host, int(port)), 5)
        time.sleep(0.05)
    raise AssertionError("nobody listens")
