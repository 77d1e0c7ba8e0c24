"""The exception for a user's mistake."""


class UserError(ValueError):
    """Error for a mistake in a file, a setting, a mesh or a checkpoint that the user gave.

    The message is one line that names the thing and, if there is one, the remedy. A command prints it without a
    traceback and exits with code 2. A library caller can catch ``ValueError``.
    """
