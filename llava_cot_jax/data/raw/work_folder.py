"""Folder for the unfinished work of a long job, from which a later run continues until the result is complete."""

import fcntl
import logging
import os
import shutil
from collections.abc import Mapping, Set
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llava_cot_jax.errors import UserError
from llava_cot_jax.files import read_json, write_json

_LOG = logging.getLogger(__name__)


class WorkFolder:
    """Work folder ``OUTPUT.preparing``, held by one process at a time. It is removed if the work never began.

    Attributes:
        path: Path of the work folder.
        result: Folder inside the work folder that becomes the output.
        scratch: Folder inside the work folder for other files from which the result is made.
        checks: Folder inside the work folder for what was found about the data. It is kept when the settings change.

    Raises:
        UserError: Another process holds the folder when it is entered.
    """

    def __init__(self, output: Path) -> None:
        self._output = output.resolve()
        self.path = self._output.with_name(f"{self._output.name}.preparing")
        self.result = self.path / "result"
        self.scratch = self.path / "scratch"
        self.checks = self.path / "checks"

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

    def begin(self, settings: Mapping[str, Any], of_data: Set[str]) -> None:
        """Begin the work, or continue that of an earlier run.

        Where the settings have changed, all but the checks begins anew.

        Args:
            settings: Everything that the result depends on.
            of_data: Names of those settings that identify the data that are worked on.

        Raises:
            UserError: An earlier run began to write with other settings, and not only with other data.
        """
        begun = self._read_begun(settings)
        other = {key for key in settings.keys() | begun.keys() if settings.get(key) != begun.get(key)}
        if other:
            self._begin_anew(other, of_data)
        for folder in (self.result, self.scratch, self.checks):
            folder.mkdir(exist_ok=True)
        write_json(self._settings, settings)

    def _read_begun(self, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the settings of the run that began, or ``settings`` where none did."""
        if not self._settings.exists():
            return settings
        try:
            return read_json(self._settings)
        except UserError:
            _LOG.warning("%s is damaged: the output is written anew", self._settings)
            for folder in (self.result, self.scratch):
                shutil.rmtree(folder, ignore_errors=True)
            return settings

    def _begin_anew(self, other: Set[str], of_data: Set[str]) -> None:
        written = self.scratch.exists() and any(self.scratch.iterdir())
        if written and (chosen := sorted(other - of_data)):
            raise UserError(
                f"{self.path} has finished work of a run with other {' and '.join(chosen)}: go on with the same "
                f"settings, name another output, or remove {self.scratch} (what was checked is kept)"
            )
        if written:
            names = " and ".join(sorted(other))
            _LOG.warning("the %s changed since %s was begun: the output is written anew", names, self.path)
        for folder in (self.result, self.scratch):
            shutil.rmtree(folder, ignore_errors=True)

    def finish(self) -> None:
        """Move the result to the output atomically, and remove the work folder."""
        self.result.rename(self._output)
        self.remove()

    def remove(self) -> None:
        """Remove the work folder if it exists."""
        shutil.rmtree(self.path, ignore_errors=True)
