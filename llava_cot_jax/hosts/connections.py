"""Connections of a process to the others of its run, over which they meet, compare and tell of failures.

The first process listens at the coordinator's address until all have come, and the others connect to it. Connections
stay open to the end, so that a process that is killed is missed at once. Messages are lines of JSON.
"""

import asyncio
import json
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from threading import Condition, Event, Thread
from typing import Any

from llava_cot_jax.hosts.agreement import describe_differences, name_processes
from llava_cot_jax.hosts.process_group import ProcessGroup

SILENCE_SECONDS = 60.0
"""Time without any message after which a process is taken for lost. jax's own limit, 100 s, is longer."""

GRACE_SECONDS = 1.0
"""Time in which a process may end by an error of its own before it ends because of another process."""

LEAVING_SECONDS = 10.0
"""Time for which the first process, in which jax's service runs, lets the others end before it."""

_PING_SECONDS = 5.0

_TELLING_SECONDS = 15.0
"""Time for which a process that fails before all have met waits for the others, to tell them."""

LONGEST_MESSAGE = 2**22
"""Number of bytes of the longest message."""

STRANGER = "what answers is no process that waits for this run"
"""Reason for which the first process is not reached where something else answers."""

_LOST = "was lost: its connection closed, as when it is killed, its memory runs out, or its machine stops"

_Message = dict[str, Any]


@dataclass(frozen=True)
class Failure:
    """End of one process of a run, which ends the others.

    Attributes:
        process: Index of the process.
        host: Name of its machine.
        code: Exit code of all processes.
        what: What the process did, in one line, such as "ended with ...".
    """

    process: int
    host: str
    code: int
    what: str

    def __str__(self) -> str:
        return f"{name_processes([self.process], {self.process: self.host})} {self.what}"


class Connections:
    """Connections of a process to others, in a thread of their own. All attributes change under ``changed``.

    Attributes:
        changed: Condition that is notified of every change.
        met: Whether all processes have come.
        awaited: What is waited for, for messages.
        verdicts: Differences of what was compared, by round.
        failure: First failure that was heard of, this process's own included.
        given_up: Whether this process no longer waits for others to come.

    Args:
        group: Processes of the run.
        on_failure: Function that is called, in a thread, with the first failure that is heard of.
    """

    def __init__(self, group: ProcessGroup, on_failure: Callable[[Failure], None]) -> None:
        self.changed = Condition()
        self.met = self.given_up = False
        self.awaited = "the others"
        self.verdicts: dict[int, str] = {}
        self.failure: Failure | None = None
        self._group, self._on_failure = group, on_failure
        self._name = socket.gethostname()
        self._loop = asyncio.new_event_loop()

    def start(self) -> None:
        """Start the thread of the connections."""
        Thread(target=self._loop.run_until_complete, args=(self._run(),), daemon=True, name="lifeline").start()

    async def _run(self) -> None:
        raise NotImplementedError

    def _call(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call a function in the thread of the connections, and wait until it has returned."""
        called = Event()

        def call() -> None:
            function(*arguments)
            called.set()

        self._loop.call_soon_threadsafe(call)
        called.wait(GRACE_SECONDS)

    def _change(self, **values: Any) -> None:
        with self.changed:
            for name, value in values.items():
                setattr(self, name, value)
            self.changed.notify_all()

    def _learn(self, failure: Failure, at_once: bool = False) -> None:
        """Note a failure, after which this process ends soon, or at once."""
        if self.failure is None:
            self._change(failure=failure)
            if at_once:
                self._on_failure(failure)
            else:
                thread = Thread(target=self._on_failure, args=(failure,), daemon=True)
                self._loop.call_later(GRACE_SECONDS, thread.start)


class FirstConnections(Connections):
    """Connections of the first process, to which all others connect."""

    def __init__(self, group: ProcessGroup, on_failure: Callable[[Failure], None]) -> None:
        super().__init__(group, on_failure)
        self._hosts = {0: self._name}  # of the processes that are there
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._done: set[int] = set()
        self._answers: dict[int, dict[int, Mapping[str, str]]] = {}  # fields of each process, by round
        self._all_there = asyncio.Event()

    def post(self, message: _Message) -> None:
        """Act on a message of this process itself."""
        self._call(self._take, 0, message)

    def tell(self, what: str, code: int) -> None:
        """Tell the other processes, those too that come within a while, that this one failed."""
        self._call(self._spread, Failure(0, self._name, code, what))
        with self.changed:
            self.changed.wait_for(lambda: self.met or self.given_up, _TELLING_SECONDS)

    def let_others_leave(self) -> None:
        """Wait until all other processes have ended, since jax's service ends with this one, and would abort them."""
        with self.changed:
            self.changed.wait_for(lambda: not self._writers, LEAVING_SECONDS)

    async def _run(self) -> None:
        port = self._group.port
        try:
            server = await asyncio.start_server(self._on_connection, bind_host() or None, port, limit=LONGEST_MESSAGE)
        except OSError as fault:
            self.given_up = True
            self._learn(Failure(0, self._name, 2, cannot_listen(port, fault)), at_once=True)
            return
        self._update()
        pings = asyncio.create_task(self._ping())
        await self._all_there.wait()
        server.close()  # jax's service takes over the port
        self._change(met=True)
        self._broadcast({"met": True})
        await pings

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(_PING_SECONDS)
            self._broadcast({"ping": True})

    async def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve another process until its end."""
        hello = await _receive(reader)
        if not hello or not isinstance(process := hello.get("process"), int):
            writer.close()  # something else that happened to call
            return
        host, count = str(hello.get("host")), hello.get("count")
        refusal = ""
        if count != self._group.count:
            refusal = f"was told of {count} processes, but process 0 of {self._group.count}: give all the same number"
        elif process in self._hosts:
            refusal = f"is there twice, on {self._hosts[process]} too: give each process an index of its own"
        if refusal:
            failure = Failure(process, host, 2, refusal)
            self._spread(failure)
            _send(writer, {"failure": asdict(self.failure or failure)})
            await _receive(reader)
            writer.close()
            return
        self._writers[process], self._hosts[process] = writer, host
        if self.failure:
            _send(writer, {"failure": asdict(self.failure)})
        self._take(process, hello)
        self._update()
        while message := await _receive(reader):
            self._take(process, message)
        writer.close()
        del self._writers[process]
        if self.met and process not in self._done:
            self._spread(Failure(process, host, 1, _LOST))
        elif not self.met and not self.failure:
            del self._hosts[process]  # it may come back
        self._update()

    def _take(self, process: int, message: _Message) -> None:
        """Act on a message of a process."""
        if message.get("done"):
            self._done.add(process)
            if process == 0:
                self._broadcast(message)
        if failure := message.get("failure"):
            self._spread(Failure(**failure))
        if "fields" in message:
            answers = self._answers.setdefault(message["round"], {})
            answers[process] = message["fields"]
            if len(answers) == self._group.count:
                verdict = describe_differences(self._answers.pop(message["round"]), self._hosts)
                self._broadcast({"round": message["round"], "verdict": verdict})
                self._change(verdicts=self.verdicts | {message["round"]: verdict})
            self._update()

    def _update(self) -> None:
        """Note who is there and what is waited for, and tell the others."""
        missing = [process for process in range(self._group.count) if process not in self._hosts]
        awaited = "the others"
        if missing:
            awaited = (
                f"{name_processes(missing, {})} to come to {self._group.address} "
                f"({len(self._hosts)} of {self._group.count} there, by {self._group.source})"
            )
        elif self._answers:
            slow = [process for process in self._hosts if process not in self._answers[min(self._answers)]]
            awaited = f"{name_processes(slow, self._hosts)}, not as far as the others before the first step"
        self._broadcast({"awaited": awaited})
        self._change(awaited=awaited)
        if not missing:
            self._all_there.set()

    def _spread(self, failure: Failure) -> None:
        """Tell the other processes of the first failure, and end this one soon."""
        if self.failure is None:
            self._broadcast({"failure": asdict(failure)})
            self._learn(failure)

    def _broadcast(self, message: _Message) -> None:
        for writer in self._writers.values():
            _send(writer, message)


class OtherConnections(Connections):
    """Connection of another process to the first."""

    def __init__(self, group: ProcessGroup, on_failure: Callable[[Failure], None]) -> None:
        super().__init__(group, on_failure)
        self._writer: asyncio.StreamWriter | None = None
        self._hello: _Message = {"process": group.index, "count": group.count, "host": self._name}
        self._first_is_done = False

    def post(self, message: _Message) -> None:
        """Send a message to the first process, once all have met."""
        self._call(lambda: _send(self._writer, message))

    def tell(self, what: str, code: int) -> None:
        """Tell the first process that this one failed, and wait until it knows. It may come within a while."""
        message = {"failure": asdict(Failure(self._group.index, self._name, code, what))}
        self._hello |= message
        self.post(message)
        with self.changed:
            self.changed.wait_for(lambda: self.failure is not None or self.given_up, _TELLING_SECONDS)

    def let_others_leave(self) -> None:
        """Return at once: no process needs this one for its end."""

    async def _run(self) -> None:
        while True:
            why = await self._connect()
            if self.met or self.failure:
                break
            self._change(awaited=self._missing(why))
            await asyncio.sleep(0.3)
        if self.failure is None and not self._first_is_done:  # jax's service, which has ended too, is about to abort
            self._learn(Failure(0, self._group.host, 1, _LOST), at_once=True)

    async def _connect(self) -> str:
        """Connect to the first process, hear it until it ends, and return why there is no connection."""
        host, port = self._group.host, self._group.port
        try:
            reader, writer = await asyncio.wait_for(
                asyncio.open_connection(host, port, limit=LONGEST_MESSAGE), GRACE_SECONDS * 10
            )
        except (OSError, TimeoutError) as fault:
            return reason_of(fault)
        self._change(awaited=self._missing(STRANGER))
        _send(writer, self._hello)
        self._writer = writer
        pings = asyncio.create_task(self._ping(writer))
        while message := await _receive(reader):
            self._hear(message)
        pings.cancel()
        writer.close()
        return "it closed the connection"

    def _hear(self, message: _Message) -> None:
        """Act on a message of the first process."""
        if "awaited" in message:
            self._change(awaited=message["awaited"])
        if "verdict" in message:
            self._change(verdicts=self.verdicts | {message["round"]: message["verdict"]})
        if "met" in message:
            self._change(met=True)
        if "done" in message:
            self._first_is_done = True
        if "failure" in message:
            self._learn(Failure(**message["failure"]))

    def _missing(self, why: str) -> str:
        return first_is_missing(self._group, why)

    async def _ping(self, writer: asyncio.StreamWriter) -> None:
        while True:
            await asyncio.sleep(_PING_SECONDS)
            _send(writer, {"ping": True})


async def _receive(reader: asyncio.StreamReader) -> _Message | None:
    """Return the next message, or None if the connection has ended, or brings something else."""
    try:
        message = json.loads(await asyncio.wait_for(reader.readline(), SILENCE_SECONDS))
    except (OSError, TimeoutError, ValueError):
        return None
    return message if isinstance(message, dict) else None


def _send(writer: asyncio.StreamWriter | None, message: _Message) -> None:
    if writer and not writer.is_closing():
        writer.write(json.dumps(message).encode() + b"\n")


def first_is_missing(group: ProcessGroup, why: str) -> str:
    """Return which process is waited for by one that does not reach the first, and why."""
    return f"process 0 at {group.address}: {why} (this is process {group.index} of {group.count}, by {group.source})"


def bind_host() -> str:
    """Return the host at which the first process listens, as the user chose it for jax; empty for all of its own."""
    return os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", "").rpartition(":")[0].strip("[]")


def cannot_listen(port: int, fault: OSError) -> str:
    """Return that the first process cannot listen at its port, and why."""
    return f"cannot listen at port {port}, where the others look for it: {reason_of(fault)}; name another port"


def reason_of(fault: Exception) -> str:
    """Return why a process cannot be reached, or not be listened for."""
    match fault:
        case socket.gaierror():
            return "there is no such name"
        case TimeoutError():
            return "it does not answer"
        case OSError(errno=int(number)):
            return os.strerror(number).lower()
    return "connection refused" if "refused" in str(fault) else str(fault)
