"""Folder for the unfinished work of a long job, from which a later run continues until the result is complete."""

import fcntl
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llava_cot_jax.errors import UserError
from llava_cot_jax.files import read_json, write_json


class WorkFolder:
    """Work folder ``OUTPUT.preparing``, held by one process at a time. It is removed if the work never began.

    Attributes:
        path: Path of the work folder.
        result: Folder inside the work folder that becomes the output.

    Raises:
        UserError: Another process holds the folder when it is entered.
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
        """Begin the work, or continue that of an earlier run with the same settings.

        Raises:
            UserError: An earlier run began with other settings.
        """
        if self._settings.exists():
            begun = read_json(self._settings)
            if other := sorted(key for key in settings.keys() | begun.keys() if settings.get(key) != begun.get(key)):
                raise UserError(
                    f"{self.path} is left from a run with other {' and '.join(other)}: remove it to begin anew, or "
                    "go on with the same settings"
                )
            return
        self.result.mkdir(exist_ok=True)
        write_json(self._settings, settings)

    def finish(self) -> None:
        """Move the result to the output atomically, and remove the work folder."""
        self.result.rename(self._output)
        self.remove()

    def remove(self) -> None:
        """Remove the work folder if it exists."""
        shutil.rmtree(self.path, ignore_errors=True)
