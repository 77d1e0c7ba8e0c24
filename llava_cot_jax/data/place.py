"""Place of a run in its data, in rows: it stays right when a batch has another size, or the rows another order."""

import base64
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np


@dataclass(frozen=True, eq=False)
class Place:
    """Place in the data between two batches.

    Attributes:
        batches: Number of batches before it, whatever their sizes were.
        epoch: Number of epochs that are done.
        seen: How many times batches of the present epoch have had each row, int32 [rows of the data set]; None stands
            for no row.
    """

    batches: int = 0
    epoch: int = 0
    seen: np.ndarray | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the place as ``json`` takes it: about two bits per row."""
        packed = None
        if self.seen is not None:
            packed = base64.b85encode(zlib.compress(self.seen.astype("<i4").tobytes())).decode()
        return {"batches": self.batches, "epoch": self.epoch, "seen": packed}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """Return the place that ``to_json`` described."""
        seen = None
        if stored["seen"] is not None:
            seen = np.frombuffer(zlib.decompress(base64.b85decode(stored["seen"])), "<i4").astype(np.int32)
        return cls(stored["batches"], stored["epoch"], seen)


START = Place()
"""Place before the first batch."""
