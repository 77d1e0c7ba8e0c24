"""Connections over which the first process of a run gives out questions, and the others hand in their answers.

Messages are lines of JSON. Nothing here needs jax: each process has the whole model on its own devices.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from io import BufferedRWPair
from typing import Any

from llava_cot_jax.errors import TransientError, UserError
from llava_cot_jax.hosts.agreement import describe_differences, name_processes
from llava_cot_jax.hosts.lifeline import FIRST_NOTICE_SECONDS, MEETING_SECONDS, NOTICE_SECONDS
from llava_cot_jax.hosts.process_group import ALONE, ProcessGroup
from llava_cot_jax.hosts.question_queue import AnswerRow, QuestionQueue

HEARING_SECONDS = 5.0
"""Time for which the first process, once all is answered, waits for the others to hear of it."""

_LOST_AFTER_SECONDS = 60
"""Time after which a machine that does not answer any more counts as lost."""

_LOG = logging.getLogger(__name__)

_Message = dict[str, Any]


class QuestionServer:
    """Server of a queue of questions, in threads of its own.

    A process that is lost gives its questions back. It may come again, and so may one that was never there.

    Args:
        group: Processes of the run, of which this is the first.
        queue: The queue.
        fields: Name and value of each thing that must be the same in all processes.

    Raises:
        UserError: The port of the first process cannot be listened at.
    """

    def __init__(self, group: ProcessGroup, queue: QuestionQueue, fields: Mapping[str, str]) -> None:
        self._group, self._queue, self._fields = group, queue, fields
        self._changed = threading.Condition()
        self._hosts = {0: socket.gethostname()}  # of all processes that were ever there
        self._connections: dict[int, socket.socket] = {}  # the last one of each process
        self._streams: dict[socket.socket, BufferedRWPair] = {}  # of the connections that are open
        self._began = time.monotonic()
        self._listener = _listen(group.port)
        threading.Thread(target=self._accept, daemon=True, name="questions").start()

    def close(self) -> None:
        """Wait until all other processes have come and heard that all is answered, each wait for a limited time."""
        missing = self._wait_for_late_ones()
        if missing:
            _LOG.warning("%s never came: what was to be answered there, others have answered", missing)
        with self._changed:
            for stream in self._streams.values():
                with contextlib.suppress(OSError):
                    _send(stream, {"over": True})
            self._changed.wait_for(lambda: not self._streams, HEARING_SECONDS)
        self._listener.close()

    def _wait_for_late_ones(self) -> str:
        """Wait for the processes that were never there, and return their names where they do not come in time."""
        notice = time.monotonic() + FIRST_NOTICE_SECONDS
        with self._changed:
            while missing := [i for i in range(self._group.count) if i not in self._hosts]:
                now, names = time.monotonic(), name_processes(missing, {})
                if now >= self._began + MEETING_SECONDS:
                    return names
                if now >= notice:
                    _LOG.warning("all is answered; waiting for %s to come, and to hear of it", names)
                    notice += NOTICE_SECONDS
                self._changed.wait(min(notice, self._began + MEETING_SECONDS) - now)
        return ""

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener is closed
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        """Serve another process until its end."""
        notice_loss(connection)
        with (
            contextlib.suppress(OSError, ValueError, KeyError, TypeError),
            connection,
            connection.makefile("rwb") as stream,
        ):
            hello = json.loads(stream.readline())
            process, host = int(hello["process"]), str(hello["host"])
            if refusal := self._refusal(process, host, hello):
                _send(stream, {"refused": refusal})
                return
            with self._changed:
                self._hosts[process] = host
                if (before := self._connections.get(process)) in self._streams:  # whose end is not noticed yet
                    before.shutdown(socket.SHUT_RDWR)
                    self._queue.give_back(before)
                self._connections[process] = connection
                self._streams[connection] = stream
                self._changed.notify_all()
            self._queue.hold(connection, hello["holds"])
            try:
                _send(stream, {"is_over": self._queue.is_over})
                while line := stream.readline():
                    _send(stream, self._act(connection, json.loads(line)))
            finally:
                self._leave(connection, name_processes([process], {process: host}))

    def _refusal(self, process: int, host: str, hello: _Message) -> str:
        """Return why a process cannot be one of this run, or nothing."""
        count = hello["count"]
        if count != self._group.count:
            return (
                f"this process was told of {count} processes, but process 0 of {self._group.count}: give all the same"
            )
        return describe_differences({0: self._fields, process: hello["fields"]}, {0: self._hosts[0], process: host})

    def _act(self, holder: socket.socket, message: _Message) -> _Message:
        match message:
            case {"ask": "take"}:
                return {"question": self._queue.take(holder)}
            case {"ask": "wait"}:
                return {"question": self._queue.wait(holder)}
            case {"question": int(question), "row": dict(row)}:
                self._queue.finish(question, row)
                return {"kept": question}
        raise ValueError(f"no message of a process: {message}")

    def _leave(self, connection: socket.socket, name: str) -> None:
        count = self._queue.give_back(connection)
        if not self._queue.is_over and not self._queue.has_failed:
            _LOG.warning("%s was lost: the others answer the %d questions that it had", name, count)
        with self._changed:
            del self._streams[connection]
            self._changed.notify_all()


class RemoteQuestions:
    """Source of questions in a process that takes them from the first process of its run.

    While the first process cannot be reached, this one tries again. The questions that it has begun stay its own.

    Args:
        group: Processes of the run.
        fields: Name and value of each thing that must be the same in all processes.

    Attributes:
        is_over: Whether all questions are answered, as far as this process knows.

    Raises:
        UserError: The first process does not have this one in its run, because something differs.
        TransientError: The first process cannot be reached for ``MEETING_SECONDS``.
    """

    def __init__(self, group: ProcessGroup, fields: Mapping[str, str]) -> None:
        self._group, self._fields = group, fields
        self._held: set[int] = set()
        self._connection: socket.socket | None = None
        self._stream: BufferedRWPair | None = None
        self.is_over = False
        self._until_it_works(lambda: None)

    def take(self) -> int | None:
        """Return the next question, or None where there is none to begin now."""
        return self._ask_for_question("take")

    def wait(self) -> int | None:
        """Wait for a question. Return None once all are answered."""
        return self._ask_for_question("wait")

    def finish(self, question: int, row: AnswerRow) -> None:
        """Hand in the row with the answer to a question."""
        if not self.is_over:  # otherwise another process has answered it too
            self._ask({"question": question, "row": row})
        self._held.discard(question)

    def close(self) -> None:
        """End the connection."""
        if self._stream and self._connection:
            with contextlib.suppress(OSError):
                self._stream.close()
            self._connection.close()
        self._stream = self._connection = None

    def _ask_for_question(self, how: str) -> int | None:
        question = None if self.is_over else self._ask({"ask": how}).get("question")
        if question is not None:
            self._held.add(question)
        self.is_over |= how == "wait" and question is None
        return question

    def _ask(self, message: _Message) -> _Message:
        return self._until_it_works(lambda: self._exchange(message)) or {}

    def _exchange(self, message: _Message) -> _Message:
        assert self._stream is not None
        with contextlib.suppress(OSError):  # where the first process is about to leave, it has said so
            _send(self._stream, message)
        line = self._stream.readline()
        if not line:
            raise ConnectionError("it closed the connection")
        answer: _Message = json.loads(line)
        self.is_over |= "over" in answer
        return answer

    def _until_it_works(self, act: Callable[[], _Message | None]) -> _Message | None:
        """Call a function over a connection, which is made again until it works."""
        began = time.monotonic()
        notice = began + FIRST_NOTICE_SECONDS
        while True:
            try:
                self._connect()
                return act()
            except (OSError, ValueError) as fault:
                if isinstance(fault, UserError):
                    raise
                self.close()
                why = os.strerror(fault.errno) if isinstance(fault, OSError) and fault.errno else str(fault)
            group, now = self._group, time.monotonic()
            awaited = (
                f"process 0 at {group.address}: {why.lower()} (this is process {group.index} of {group.count}, by "
                f"{group.source}); {ALONE}"
            )
            if now >= began + MEETING_SECONDS:
                raise TransientError(f"gave up after {MEETING_SECONDS:.0f} s of waiting for {awaited}")
            if now >= notice:
                _LOG.warning("waiting for %s", awaited)
                notice += NOTICE_SECONDS
            time.sleep(0.3)

    def _connect(self) -> None:
        """Connect to the first process, unless there is a connection.

        Raises:
            UserError: It refuses this process.
        """
        if self._stream:
            return
        self._connection = socket.create_connection((self._group.host, self._group.port), timeout=10)
        notice_loss(self._connection)
        self._stream = self._connection.makefile("rwb")
        hello = {"process": self._group.index, "count": self._group.count, "host": socket.gethostname()}
        answer = self._exchange({**hello, "fields": dict(self._fields), "holds": sorted(self._held)})
        if refusal := answer.get("refused"):
            raise UserError(refusal)
        self._connection.settimeout(None)
        self.is_over |= answer.get("is_over", False)


def notice_loss(connection: socket.socket) -> None:
    """Let the system end a connection whose other machine does not answer any more, also while nothing is sent."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    tries = 3
    for name, value in (
        ("TCP_KEEPIDLE", _LOST_AFTER_SECONDS // (tries + 1)),
        ("TCP_KEEPINTVL", _LOST_AFTER_SECONDS // (tries + 1)),
        ("TCP_KEEPCNT", tries),
        ("TCP_USER_TIMEOUT", _LOST_AFTER_SECONDS * 1000),
    ):
        if option := getattr(socket, name, None):  # not every system has all of them
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _listen(port: int) -> socket.socket:
    bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", "").rpartition(":")[0].strip("[]")
    try:
        if bind:
            return socket.create_server((bind, port), family=socket.AF_INET6 if ":" in bind else socket.AF_INET)
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        return socket.create_server(("", port), family=family, dualstack_ipv6=dual)
    except OSError as fault:
        reason = os.strerror(fault.errno) if fault.errno else str(fault)
        raise UserError(
            f"process 0 cannot listen at port {port}, where the others look for it: {reason}; name another port"
        ) from None


def _send(stream: BufferedRWPair, message: Mapping[str, Any]) -> None:
    stream.write(json.dumps(message).encode() + b"\n")
    stream.flush()
