"""The type of functions that show the progress of a long task."""

from collections.abc import Callable

OnProgress = Callable[[int, int], None]
"""Function that is called with the amount done so far and the total, such as bytes or rows."""
