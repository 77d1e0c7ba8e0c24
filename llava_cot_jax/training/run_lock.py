"""Only one run at a time works in a folder.

On a disk the operating system holds the lock, and lets go of it when the process ends, however it ends. A bucket has
no locks: there the run renews a small file, and one that finds such a file waits to see whether it is renewed.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import uuid
from pathlib import Path
from typing import IO, Self

import jax

from llava_cot_jax.errors import UserError
from llava_cot_jax.paths import is_remote
from llava_cot_jax.training.broadcast import first_said

FILE = ".running"
"""Says which process the run in a folder is."""

RENEWED_SECONDS = 10.0
"""In a bucket; a file that is left alone for three times as long is of a run that was killed."""


class RunLock:
    """Holds a folder, which must exist, for the run of these processes: a context manager.

    Args:
        folder: of the run.

    Raises:
        UserError: another run works in it; every process raises it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock: _DiskLock | _BucketLock | None = None

    def __enter__(self) -> Self:
        refused = ""
        if jax.process_index() == 0:
            self._lock = _BucketLock(self._folder) if is_remote(self._folder) else _DiskLock(self._folder)
            refused = self._lock.acquire()
        if refused := first_said(refused):
            raise UserError(f"{self._folder}: {refused}; wait for it to end, or name another output")
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock:
            self._lock.release()


def _me() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


class _DiskLock:
    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._file: IO[str] | None = None

    def acquire(self) -> str:
        """Why it cannot be had; nothing if it was."""
        file = self._path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            return f"a run is under way there ({file.read()})"
        file.truncate(0)
        file.write(_me())
        file.flush()
        self._file = file
        return ""

    def release(self) -> None:
        if self._file:
            self._file.close()


class _BucketLock:
    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._id = uuid.uuid4().hex
        self._renewed = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def acquire(self) -> str:
        """Why it cannot be had; nothing if it was."""
        if (found := self._read()) is not None:
            self._ended.wait(3 * RENEWED_SECONDS)
            if (later := self._read()) is not None and later != found:
                return f"a run is under way there ({later['who']})"
        self._write()
        self._ended.wait(RENEWED_SECONDS / 10)  # of two that begin at once, the one that wrote last has it
        if (later := self._read()) is None or later["id"] != self._id:
            return "another run began there at the same time"
        self._thread.start()
        return ""

    def release(self) -> None:
        if self._thread.is_alive():
            self._ended.set()
            self._thread.join()
            self._path.unlink(missing_ok=True)

    def _keep(self) -> None:
        while not self._ended.wait(RENEWED_SECONDS):
            with contextlib.suppress(Exception):  # a bucket that cannot be reached now may be the next time
                self._write()

    def _read(self) -> dict[str, str] | None:
        try:
            found: dict[str, str] = json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return found

    def _write(self) -> None:
        self._renewed += 1
        said = {"id": self._id, "renewed": self._renewed, "who": _me()}
        self._path.write_text(json.dumps(said), encoding="utf-8")
