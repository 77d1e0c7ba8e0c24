"""Connections over which the first process of a run gives out questions, and the others hand in their answers.

Messages are lines of JSON. Nothing here needs jax: each process has the whole model on its own devices.
"""

import contextlib
import json
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from io import BufferedRWPair
from typing import Any

from llava_cot_jax.errors import TransientError, UserError
from llava_cot_jax.hosts.agreement import describe_differences, name_processes
from llava_cot_jax.hosts.connections import (
    LONGEST_MESSAGE,
    STRANGER,
    Failure,
    bind_host,
    cannot_listen,
    first_is_missing,
    reason_of,
)
from llava_cot_jax.hosts.lifeline import FIRST_NOTICE_SECONDS, MEETING_SECONDS, NOTICE_SECONDS
from llava_cot_jax.hosts.process_group import ALONE, ProcessGroup
from llava_cot_jax.hosts.question_queue import AnswerRow, QuestionQueue

HEARING_SECONDS = 5.0
"""Time for which the first process, once all is answered, waits for the others to hear of it."""

_LOST_AFTER_SECONDS = 60
"""Time after which a machine that does not answer any more counts as lost."""

_DIVIDE = "give all processes the same --hosts.divide"

_LOG = logging.getLogger(__name__)

_Message = dict[str, Any]


@dataclass(frozen=True, eq=False)
class _Client:
    """Another process that is connected.

    Attributes:
        process: Its index.
        host: Name of its machine.
        token: Text that is the same for all connections of one process, and of no other.
        connection: The connection.
        stream: Its bytes.
    """

    process: int
    host: str
    token: str
    connection: socket.socket
    stream: BufferedRWPair

    @property
    def name(self) -> str:
        """Process with its machine, for messages."""
        return name_processes([self.process], {self.process: self.host})

    @property
    def is_connected(self) -> bool:
        """Whether the connection is not known to have ended."""
        try:
            return bool(self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message."""
        _send(self.stream, message)


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
        self._clients: dict[int, _Client] = {}
        self._began = time.monotonic()
        self._listener = _listen(group.port)
        threading.Thread(target=self._accept, daemon=True, name="questions").start()

    def close(self) -> None:
        """Wait until all other processes have come and heard that all is answered, each wait for a limited time."""
        if missing := self._wait_for_late_ones():
            _LOG.warning("%s never came: the others have answered all questions", missing)
        with self._changed:
            for client in self._clients.values():
                with contextlib.suppress(OSError, ValueError):  # it has just left
                    client.send({"over": True})
            self._changed.wait_for(lambda: not self._clients, HEARING_SECONDS)
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
        """Serve another process, or close the connection of something else that happened to call."""
        _notice_loss(connection)
        with contextlib.suppress(Exception), connection, connection.makefile("rwb") as stream:
            hello = _read(stream) or {}
            refusal, client = self._admit(hello, connection, stream)
            if client is None:
                _send(stream, refusal)
                return
            try:
                self._queue.hold(client, map(int, hello["holds"]))
                client.send({"is_over": self._queue.is_over})
                while message := _read(stream):
                    client.send(self._act(client, message))
            finally:
                self._leave(client)

    def _admit(
        self, hello: _Message, connection: socket.socket, stream: BufferedRWPair
    ) -> tuple[_Message, _Client | None]:
        """Return a process of this run that has called, or the message by which it is refused.

        Raises:
            KeyError, TypeError, ValueError: What has called is no process that takes part in a run.
        """
        process, host, count = int(hello["process"]), str(hello["host"]), int(hello["count"])
        if "token" not in hello:  # of a process that would share one model
            what = f"was told to share one model, but process 0 divides questions: {_DIVIDE}"
            return {"failure": asdict(Failure(process, host, 2, what))}, None
        if count != self._group.count:
            what = (
                f"this process was told of {count} processes, but process 0 of {self._group.count}: give all the same"
            )
            return {"refused": what}, None
        if not 0 < process < count:
            raise ValueError(f"process {process} cannot be another of {count}")
        if what := describe_differences(
            {0: self._fields, process: hello["fields"]}, {0: self._hosts[0], process: host}
        ):
            return {"refused": what}, None
        client = _Client(process, host, str(hello["token"]), connection, stream)
        with self._changed:
            if before := self._clients.get(process):
                if before.token != client.token and before.is_connected:
                    what = (
                        f"process {process} is there already, on {before.host}: give each process an index of its own"
                    )
                    return {"later": what}, None
                with contextlib.suppress(OSError):  # the end of its connection was not noticed yet
                    before.connection.shutdown(socket.SHUT_RDWR)
                self._queue.give_back(before)
            self._clients[process], self._hosts[process] = client, host
            self._changed.notify_all()
        return {}, client

    def _act(self, client: _Client, message: _Message) -> _Message:
        match message:
            case {"ask": "take"}:
                return {"question": self._queue.take(client)}
            case {"ask": "wait"}:
                return {"question": self._queue.wait(client)}
            case {"question": int(question), "row": dict(row)}:
                self._queue.finish(question, row)
                return {"kept": question}
        raise ValueError(f"no message of a process: {message}")

    def _leave(self, client: _Client) -> None:
        count = self._queue.give_back(client)
        with self._changed:
            has_come_back = self._clients.get(client.process) is not client
            if not has_come_back:
                del self._clients[client.process]
                self._changed.notify_all()
        if not (has_come_back or self._queue.is_over or self._queue.has_failed):
            others = f": the others answer the {count} questions that it had" if count else ""
            _LOG.warning("%s was lost%s", client.name, others)


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
        self._group, self._fields, self._token = group, fields, secrets.token_hex(8)
        self._held: set[int] = set()
        self._connection: socket.socket | None = None
        self._stream: BufferedRWPair | None = None
        self._fault: UserError | None = None
        self.is_over = False
        self._until_it_works(lambda: {})

    def take(self) -> int | None:
        """Return the next question, or None where there is none to begin now."""
        return self._ask_for_question("take")

    def wait(self) -> int | None:
        """Wait for a question. Return None once all are answered."""
        return self._ask_for_question("wait")

    def finish(self, question: int, row: AnswerRow) -> None:
        """Hand in the row with the answer to a question."""
        if not self.is_over:  # otherwise another process has answered it too
            self._ask({"question": question, "row": row}, "kept")
        self._held.discard(question)

    def close(self) -> None:
        """End the connection."""
        if self._stream and self._connection:
            with contextlib.suppress(OSError):
                self._stream.close()
            self._connection.close()
        self._stream = self._connection = None

    def _ask_for_question(self, how: str) -> int | None:
        question = None if self.is_over else self._ask({"ask": how}, "question").get("question")
        if question is not None:
            self._held.add(question)
        self.is_over |= how == "wait" and question is None
        return question

    def _ask(self, message: _Message, key: str) -> _Message:
        """Return the answer to a message, which has this key, or says that all is answered."""

        def exchange() -> _Message:
            answer = self._exchange(message)
            if key not in answer and "over" not in answer:
                raise ConnectionError(STRANGER)
            self.is_over |= "over" in answer
            return answer

        return self._until_it_works(exchange)

    def _exchange(self, message: _Message) -> _Message:
        assert self._stream is not None
        with contextlib.suppress(OSError):  # where the first process is about to leave, it has said so
            _send(self._stream, message)
        answer = _read(self._stream)
        if answer is None:
            raise ConnectionError("it closed the connection")
        return answer

    def _until_it_works(self, act: Callable[[], _Message]) -> _Message:
        """Call a function over a connection, which is made again until it works."""
        if self._fault:
            raise self._fault
        began = time.monotonic()
        notice = began + FIRST_NOTICE_SECONDS
        while True:
            try:
                self._connect()
                return act()
            except UserError as fault:
                self._fault = fault
                raise
            except OSError as fault:
                self.close()
                awaited = f"{first_is_missing(self._group, reason_of(fault))}; {ALONE}"
            now = time.monotonic()
            if now >= began + MEETING_SECONDS:
                self._fault = TransientError(f"gave up after {MEETING_SECONDS:.0f} s of waiting for {awaited}")
                raise self._fault
            if now >= notice:
                _LOG.warning("waiting for %s", awaited)
                notice += NOTICE_SECONDS
            time.sleep(0.3)

    def _connect(self) -> None:
        """Connect to the first process, unless there is a connection.

        Raises:
            OSError: It cannot be reached, or does not have this process yet.
            UserError: It refuses this process.
        """
        if self._stream:
            return
        self._connection = socket.create_connection((self._group.host, self._group.port), timeout=10)
        _notice_loss(self._connection)
        self._stream = self._connection.makefile("rwb")
        place = {"process": self._group.index, "count": self._group.count, "host": socket.gethostname()}
        own = {"token": self._token, "fields": dict(self._fields), "holds": sorted(self._held)}
        match self._exchange(place | own):
            case {"is_over": bool(is_over)}:
                self._connection.settimeout(None)
                self.is_over |= is_over
            case {"refused": str(why)}:
                raise UserError(why)
            case {"later": str(why)}:
                raise ConnectionError(why)
            case {"awaited": _} | {"failure": _} | {"met": _}:
                raise UserError(f"process 0 shares one model, but this process was told to divide questions: {_DIVIDE}")
            case _:
                raise ConnectionError(STRANGER)


def _notice_loss(connection: socket.socket) -> None:
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
    host = bind_host()
    dual = not host and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual or ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, dualstack_ipv6=dual)
    except OSError as fault:
        raise UserError(f"process 0 {cannot_listen(port, fault)}") from None


def _send(stream: BufferedRWPair, message: Mapping[str, Any]) -> None:
    stream.write(json.dumps(message).encode() + b"\n")
    stream.flush()


def _read(stream: BufferedRWPair) -> _Message | None:
    """Return the next message, or None where the connection has ended.

    Raises:
        ConnectionError: Something else came.
        OSError: The connection is broken.
    """
    line = stream.readline(LONGEST_MESSAGE)
    if not line:
        return None
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        raise ConnectionError(STRANGER) from None
    if not isinstance(message, dict):
        raise ConnectionError(STRANGER)
    return message
