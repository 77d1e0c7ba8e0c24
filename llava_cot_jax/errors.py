"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """A mistake in what the user gave: a file, a setting, a mesh, a checkpoint.

    The message is one line that names the thing and, where there is one, the remedy. A command
    prints it without a traceback and exits with code 2; a library caller can catch ``ValueError``.
    """
