"""On PYTHONPATH, hides torch from a process and from its children: they start as a user's would, in half the time."""

import sys

sys.modules["torch"] = None  # type: ignore[assignment]
