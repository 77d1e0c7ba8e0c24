"""The exception for a user's mistake, and what led to an exception."""

from collections.abc import Iterator


class UserError(ValueError):
    """Error for a mistake in a file, a setting, a mesh or a checkpoint that the user gave.

    The message is one line that names the thing and, if there is one, the remedy. A command prints it without a
    traceback and exits with code 2. A library caller can catch ``ValueError``.

    Attributes:
        exit_code: Exit code of a command that the error ends. The scripts in ``launch`` take 2 as final.
    """

    exit_code = 2


class TransientError(UserError):
    """Error that may be gone at another start of the same command, such as a host that comes late.

    It ends a command with exit code 1, after which the scripts in ``launch`` start it again.
    """

    exit_code = 1


def causes(fault: BaseException | None) -> Iterator[BaseException]:
    """Return an exception and those that led to it, the last one first."""
    while fault is not None:
        yield fault
        fault = fault.__cause__ or fault.__context__
