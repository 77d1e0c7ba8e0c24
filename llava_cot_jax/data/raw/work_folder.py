"""A folder in which a long job does its work, where the next run finds it, until the result is whole."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from llava_cot_jax.errors import UserError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class WorkFolder:
    """``OUTPUT.preparing``, held by one process at a time. Of a run that begins nothing, nothing stays.

    Attributes:
        result: the folder in it that becomes the output.
        path: the work folder itself.

    Raises:
        UserError: on entering, another process holds it.
    """

    def __init__(self, output: Path) -> None:
        self._output = output.resolve()
        self.path = self._output.with_name(f"{self._output.name}.preparing")
        self.result = self.path / "result"

    def __enter__(self) -> Self:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise UserError(f"{self._output} is being prepared by another process: wait until it has ended") from None
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if not self._settings.exists():
            self.remove()
        os.close(self._lock)

    @property
    def _settings(self) -> Path:
        return self.path / "settings.json"

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Begin the work, or go on with what an earlier run of the same settings began.

        Raises:
            UserError: it was begun with other settings.
        """
        if self._settings.exists():
            begun = json.loads(self._settings.read_text(encoding="utf-8"))
            if other := sorted(key for key in settings.keys() | begun.keys() if settings.get(key) != begun.get(key)):
                raise UserError(
                    f"{self.path} is left from a run with other {' and '.join(other)}: remove it to begin anew, or "
                    "go on with the same as then"
                )
            return
        self.result.mkdir(exist_ok=True)
        write_json(self._settings, settings)

    def finish(self) -> None:
        """Make the result the output, at once, and remove the rest."""
        self.result.rename(self._output)
        self.remove()

    def remove(self) -> None:
        """Remove the folder, if it is there."""
        shutil.rmtree(self.path, ignore_errors=True)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears at ``path`` when it is written and on the disk, or not at all."""
    with beside(path) as partial, partial.open("wb") as file:
        yield file


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Where to write what is to appear at ``path`` when it is written and on the disk, or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as ``whole_file`` does."""
    with whole_file(path) as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n")


@contextmanager
def disk_faults(output: Path) -> Iterator[None]:
    """Turn what the disk of ``output`` refuses into a ``UserError``."""
    try:
        yield
    except OSError as fault:
        if fault.errno in NO_SPACE:
            raise UserError(
                f"no space left on the disk of {output}: free some and run the same command again: it goes on"
            ) from fault
        raise UserError(f"cannot write {fault.filename or output}: {fault.strerror or fault}") from fault
