"""Files that take a line after the other, each of which stays whatever happens afterwards."""

import fcntl
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from llava_cot_jax.errors import UserError
from llava_cot_jax.files import check_file_writable
from llava_cot_jax.paths import is_remote, writing_errors


class LineFile:
    """File to which lines are added. While it is open, no other process can open it so.

    Args:
        path: Path of the file, on a disk.

    Raises:
        UserError: The file cannot be written, or another process has it open.
    """

    def __init__(self, path: Path) -> None:
        if is_remote(path):
            raise UserError(f"{path} is in a bucket, where no line can be added to a file: name an output on a disk")
        check_file_writable(path)
        self._path = path
        with writing_errors(path):
            self._file: BinaryIO = path.open("ab+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(f"{path} is being written by another process: name another output") from None

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return self._file.seek(0, os.SEEK_END)

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield each whole line with its offset in bytes, and cut off a last one that was not written whole."""
        self._file.seek(0)
        whole = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            yield whole, line
            whole += len(line)
        with writing_errors(self._path):
            self._file.truncate(whole)

    def read_line(self, offset: int) -> bytes:
        """Return the line at an offset that ``lines`` has yielded, or ``append`` has returned."""
        self._file.seek(offset)
        return self._file.readline()

    def append(self, lines: Iterable[bytes]) -> list[int]:
        """Append lines, which are on the disk when this returns. Return their offsets.

        Raises:
            UserError: They cannot be written.
        """
        offsets, offset = [], self.size
        with writing_errors(self._path):
            for line in lines:
                self._file.write(line)
                offsets.append(offset)
                offset += len(line)
            self._file.flush()
            os.fsync(self._file.fileno())
        return offsets

    def close(self) -> None:
        """Close the file, so that another process may write it."""
        self._file.close()
