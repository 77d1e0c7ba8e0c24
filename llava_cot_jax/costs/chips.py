"""Nominal figures of accelerator chips."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """An accelerator chip with the nominal figures of its vendor's data sheet, without sparsity.

    Attributes:
        name: Name of the chip.
        device_kinds: Values of ``device_kind`` under which jax shows its devices.
        hbm_bytes: Size of its HBM in bytes.
        hbm_bandwidth: Bytes per second that it reads from and writes to HBM.
        peak_flops: Dense bfloat16 FLOPs per second.
        peak_int8_ops: Dense int8 operations per second; None where the vendor states none.
        devices_per_chip: Number of jax devices that one chip appears as. The figures are for the whole chip.
        ici_bandwidth: Bytes per second that it sends over all its inter-chip links (ICI) together; None for a chip
            without them, or whose topology is not known here.
        dcn_bandwidth: Bytes per second that it sends over the data centre network (DCN) to other slices; None like
            ``ici_bandwidth``.
    """

    name: str
    device_kinds: tuple[str, ...]
    hbm_bytes: int
    hbm_bandwidth: float
    peak_flops: float
    peak_int8_ops: float | None
    devices_per_chip: int = 1
    ici_bandwidth: float | None = None
    dcn_bandwidth: float | None = None


CHIPS = (
    Chip("TPU v4", ("TPU v4",), 32 * GIB, 1228e9, 275e12, 275e12),
    Chip("TPU v5e", ("TPU v5 lite", "TPU v5e"), 16 * GIB, 819e9, 197e12, 394e12, 1, 200e9, 3.125e9),
    Chip("TPU v5p", ("TPU v5", "TPU v5p"), 95 * GIB, 2765e9, 459e12, 918e12, 1, 600e9, 6.25e9),
    Chip("TPU v6e", ("TPU v6 lite", "TPU v6e"), 32 * GIB, 1638e9, 918e12, 1836e12, 1, 400e9, 12.5e9),
    Chip("TPU v7", ("TPU7x",), 192 * GIB, 7380e9, 2307e12, None, devices_per_chip=2),
    Chip("A100 40 GB", ("NVIDIA A100-SXM4-40GB",), 40 * GIB, 1555e9, 312e12, 624e12),
    Chip("A100 80 GB", ("NVIDIA A100-SXM4-80GB",), 80 * GIB, 2039e9, 312e12, 624e12),
    Chip("H100", ("NVIDIA H100 80GB HBM3",), 80 * GIB, 3350e9, 989e12, 1979e12),
    Chip("H200", ("NVIDIA H200",), 141 * GIB, 4800e9, 989e12, 1979e12),
)


def find_chip(device_kind: str) -> Chip | None:
    """Return the chip with a jax ``device_kind``; None for a CPU and for any chip that is not in ``CHIPS``."""
    return next((chip for chip in CHIPS if device_kind in chip.device_kinds), None)
