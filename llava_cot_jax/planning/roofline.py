"""Roofline of a step: the least time it can take, by what it needs of each resource of a chip at its nominal rate."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from llava_cot_jax.planning.slices import Slice


@dataclass(frozen=True)
class Roofline:
    """Roofline of a step.

    Attributes:
        seconds: Least seconds by resource: ``compute``, ``hbm`` (memory), ``ici`` (between the chips of a slice) and
            ``dcn`` (between slices).
        flops: FLOPs of one chip.
        hbm_bytes: Bytes that one chip reads from and writes to HBM.
        sent_bytes: Bytes that one chip sends, by mesh axis.
    """

    seconds: dict[str, float]
    flops: float
    hbm_bytes: float
    sent_bytes: dict[str, float]

    @classmethod
    def on_slice(cls, slice_: Slice, *, flops: float, hbm_bytes: float, sent_bytes: Mapping[str, float]) -> Self:
        """Compute the roofline of a step on a slice, from what one chip does in the step.

        Where there are several slices, the mesh axis ``data`` goes over DCN. All other axes go over ICI.
        """
        chip = slice_.generation.chip
        assert chip.ici_bandwidth is not None and chip.dcn_bandwidth is not None
        over_dcn = sent_bytes.get("data", 0.0) if slice_.num_slices > 1 else 0.0
        over_ici = sum(sent_bytes.values()) - over_dcn
        seconds = {
            "compute": flops / chip.peak_flops,
            "hbm": hbm_bytes / chip.hbm_bandwidth,
            "ici": over_ici / chip.ici_bandwidth,
            "dcn": over_dcn / chip.dcn_bandwidth,
        }
        return cls(seconds, flops, hbm_bytes, dict(sent_bytes))

    @property
    def step_seconds(self) -> float:
        """Least seconds of the step: those of its bottleneck, with all other resources used at the same time."""
        return max(self.seconds.values())

    @property
    def bottleneck(self) -> str:
        """Name of the resource that takes longest."""
        return max(self.seconds, key=self.seconds.__getitem__)
