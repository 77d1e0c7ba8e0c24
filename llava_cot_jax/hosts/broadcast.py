"""Agreement of the processes of a run on something that one of them alone has seen."""

import numpy as np
from jax.experimental import multihost_utils

MAX_STRING_BYTES = 1024
"""Number of bytes of a string that ``broadcast_string`` sends; the rest is cut off."""


def broadcast_string(text: str) -> str:
    """Return the text of the first process whose text is not empty, in every process. All processes must call this.

    Args:
        text: Text of this process. It is cut off after ``MAX_STRING_BYTES`` bytes of UTF-8.
    """
    sent = np.zeros(MAX_STRING_BYTES, np.uint8)
    encoded = text.encode()[:MAX_STRING_BYTES]
    sent[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    for row in np.asarray(multihost_utils.process_allgather(sent)).reshape(-1, MAX_STRING_BYTES):
        if row.any():
            return bytes(row[row > 0]).decode(errors="ignore")
    return ""
