"""Lock on the folder of a run, so that only one run at a time works in it.

On a disk, the operating system holds the lock, and releases it when the process ends, however it ends. A bucket has no
locks: there, the run creates a small file, which fails if there is one, and renews it. A run that finds such a file
waits to see whether it is renewed.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import uuid
from pathlib import Path
from typing import IO, Any, Self

import jax

from llava_cot_jax.errors import UserError
from llava_cot_jax.hosts.broadcast import broadcast_string
from llava_cot_jax.paths import bucket_filesystem, is_remote

LOCK_FILE = ".running"
"""Name of the file in the folder of a run that says which process holds the lock."""

RENEWAL_SECONDS = 10.0
"""Time between two renewals of a lock in a bucket. One that is not renewed for three times as long is abandoned."""

_AT_THE_SAME_TIME = "another run began there at the same time"


class RunLock:
    """Lock on a folder for the processes of a run: a context manager that all of them enter.

    Args:
        folder: Folder of the run, which exists.

    Raises:
        UserError: Another run works in the folder. Every process raises it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock: _DiskLock | _BucketLock | None = None

    def __enter__(self) -> Self:
        refusal = ""
        if jax.process_index() == 0:
            self._lock = _BucketLock(self._folder) if is_remote(self._folder) else _DiskLock(self._folder)
            refusal = self._lock.acquire()
        if refusal := broadcast_string(refusal):
            raise UserError(f"{self._folder}: {refusal}; wait for it to end, or name another output")
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock:
            self._lock.release()


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


class _DiskLock:
    """Lock that the operating system holds on a file."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK_FILE
        self._file: IO[str] | None = None

    def acquire(self) -> str:
        """Acquire the lock. Return the reason if another run holds it, or nothing."""
        file = self._path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            return f"a run is under way there ({file.read()})"
        file.truncate(0)
        file.write(_this_process())
        file.flush()
        self._file = file
        return ""

    def release(self) -> None:
        """Release the lock, if it is held."""
        if self._file:
            self._file.close()


class _BucketLock:
    """Lock whose file in a bucket is created exclusively and renewed."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK_FILE
        self._id = uuid.uuid4().hex
        self._renewals = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def acquire(self) -> str:
        """Acquire the lock. Return the reason if another run holds it, or nothing."""
        if not self._create(self._path) and (refusal := self._take_over()):
            return refusal
        self._thread.start()
        return ""

    def release(self) -> None:
        """Release the lock, if it is held."""
        if self._thread.is_alive():
            self._ended.set()
            self._thread.join()
            self._path.unlink(missing_ok=True)

    def _take_over(self) -> str:
        """Acquire the lock of a run that was killed. Return the reason if another run holds it, or nothing.

        Only one of several runs that find the same abandoned lock can create the file that claims it.
        """
        found = self._read()
        self._ended.wait(3 * RENEWAL_SECONDS)
        later = self._read()
        if later is None:
            return "" if self._create(self._path) else _AT_THE_SAME_TIME
        if later != found:
            return f"a run is under way there ({later['process']})"
        claim = self._path.with_name(f"{LOCK_FILE}.{later['id']}")
        if not self._create(claim):
            return f"{_AT_THE_SAME_TIME} (if none did, delete {claim})"
        try:
            if self._read() != later:  # an earlier claim was fulfilled meanwhile
                return _AT_THE_SAME_TIME
            self._path.write_bytes(self._content())
            return ""
        finally:
            claim.unlink()

    def _create(self, path: Path) -> bool:
        """Create a file with this lock's content, and return whether it did not exist. The bucket decides."""
        try:
            bucket_filesystem().pipe_file(str(path), self._content(), mode="create")
        except FileExistsError:
            # A request whose answer was lost is sent again, and then meets its own file.
            return (existing := self._read(path)) is not None and existing["id"] == self._id
        return True

    def _renew(self) -> None:
        while not self._ended.wait(RENEWAL_SECONDS):
            with contextlib.suppress(Exception):  # a bucket that cannot be reached now may be the next time
                self._path.write_bytes(self._content())

    def _read(self, path: Path | None = None) -> dict[str, Any] | None:
        """Return what a lock's file says, or None if there is none."""
        try:
            found: dict[str, Any] = json.loads((path or self._path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return found

    def _content(self) -> bytes:
        self._renewals += 1
        return json.dumps({"id": self._id, "renewals": self._renewals, "process": _this_process()}).encode()
