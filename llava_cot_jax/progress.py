"""Types of the functions that show the progress of a long task."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

OnProgress = Callable[[int, int], None]
"""Function that is called with the amount done so far and the total, such as bytes or rows."""


class ProgressUpdate(Protocol):
    """Function that moves a progress bar."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Show that ``done`` of ``total`` items are done, and a short note."""


class ProgressBar(Protocol):
    """Function that opens a progress bar, as ``cli.progress_bar`` does."""

    def __call__(
        self, label: str, unit: str = "bytes", every: int | None = None
    ) -> AbstractContextManager[ProgressUpdate]:
        """Show a bar after ``label`` that counts ``unit``, or where none can be shown, a line after ``every`` items."""
