"""The exception for a user's mistake, and what led to an exception."""

from collections.abc import Iterator


class UserError(ValueError):
    """Error for a mistake in a file, a setting, a mesh or a checkpoint that the user gave.

    The message is one line that names the thing and, if there is one, the remedy. A command prints it without a
    traceback and exits with code 2. A library caller can catch ``ValueError``.
    """


def causes(fault: BaseException | None) -> Iterator[BaseException]:
    """Return an exception and those that led to it, the last one first."""
    while fault is not None:
        yield fault
        fault = fault.__cause__ or fault.__context__
