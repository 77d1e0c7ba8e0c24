"""The least time that a step can take, by what it needs of each resource of a chip at its nominal rate."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from llava_cot_jax.planning.slices import Slice


@dataclass(frozen=True)
class Floors:
    """Floors of a step.

    Attributes:
        seconds: by resource: ``compute``, ``memory``, ``links`` (between the chips of a slice) and ``network``
            (between slices).
        flops: of a chip.
        memory: bytes that a chip reads and writes in its memory.
        sent: bytes that a chip sends, by mesh axis.
    """

    seconds: dict[str, float]
    flops: float
    memory: float
    sent: dict[str, float]

    @classmethod
    def of(cls, slice_: Slice, *, flops: float, memory: float, sent: Mapping[str, float]) -> Self:
        """Of what a chip does in a step; the axis ``data`` goes over the network where there are several slices."""
        chip = slice_.generation.chip
        assert chip.links is not None and chip.network is not None
        far = sent.get("data", 0.0) if slice_.count > 1 else 0.0
        near = sum(sent.values()) - far
        seconds = {
            "compute": flops / chip.flops,
            "memory": memory / chip.bandwidth,
            "links": near / chip.links,
            "network": far / chip.network,
        }
        return cls(seconds, flops, memory, dict(sent))

    @property
    def step(self) -> float:
        """Of the resource that binds: all others can at best be used meanwhile."""
        return max(self.seconds.values())

    @property
    def binds(self) -> str:
        """The resource that takes longest."""
        return max(self.seconds, key=self.seconds.__getitem__)
