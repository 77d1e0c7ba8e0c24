"""Files of the network, which are there in a given time or not at all."""

import http.client
import socket
import urllib.request
from functools import partial
from threading import Lock, Timer
from types import TracebackType
from typing import Any, Self


def fetch_in_time(url: str, most_bytes: int, seconds: float) -> bytes:
    """Return the beginning of the file that an ``http://`` or ``https://`` URL names.

    Args:
        url: URL. Redirections are followed to URLs of these two kinds alone.
        most_bytes: Largest number of bytes that are read.
        seconds: Time in which all must have come, however often the other side sends something.

    Raises:
        OSError: It cannot be fetched, or not in this time.
        ValueError: The URL is malformed.
        http.client.HTTPException: The other side does not keep to HTTP.
    """
    with _Deadline(seconds) as deadline:
        opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler(), _Plain(deadline), _Secure(deadline), urllib.request.UnknownHandler(),
            urllib.request.HTTPRedirectHandler(), urllib.request.HTTPErrorProcessor(),
            urllib.request.HTTPDefaultErrorHandler(),
        ):  # fmt: skip
            opener.add_handler(handler)
        with opener.open(url, timeout=seconds) as found:
            content: bytes = found.read(most_bytes)
        deadline.check()  # a connection that is ended may look like the end of a file
        return content


class _Deadline:
    """Ends connections after a time."""

    def __init__(self, seconds: float) -> None:
        self._lock, self._is_over = Lock(), False
        self._connections: list[socket.socket] = []
        self._timer = Timer(seconds, self._end)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        with self._lock:
            self._is_over = True
            for connection in self._connections:
                connection.close()

    def add(self, connection: socket.socket) -> None:
        """Watch a connection, which TLS may take over later."""
        with self._lock:
            self.check()
            self._connections.append(connection.dup())

    def check(self) -> None:
        """Raise a ``TimeoutError`` if the time is over."""
        if self._is_over:
            raise TimeoutError("timed out")

    def _end(self) -> None:
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
            for connection in self._connections:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:  # the other side has ended it
                    continue


class _PlainConnection(http.client.HTTPConnection):
    deadline: _Deadline

    def connect(self) -> None:
        super().connect()
        self.deadline.add(self.sock)


class _SecureConnection(http.client.HTTPSConnection, _PlainConnection):
    """Connection that is watched before TLS begins: ``HTTPSConnection.connect`` calls that of ``_PlainConnection``."""


def _watched(kind: type[_PlainConnection], deadline: _Deadline, *arguments: Any, **options: Any) -> _PlainConnection:
    connection = kind(*arguments, **options)
    connection.deadline = deadline
    return connection


class _Plain(urllib.request.HTTPHandler):
    def __init__(self, deadline: _Deadline) -> None:
        super().__init__()
        self._new: Any = partial(_watched, _PlainConnection, deadline)

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._new, request)


class _Secure(urllib.request.HTTPSHandler):
    def __init__(self, deadline: _Deadline) -> None:
        super().__init__()
        self._new: Any = partial(_watched, _SecureConnection, deadline)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._new, request)
