"""What a chip can do."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """An accelerator and its nominal figures, from its vendor's data sheet, without sparsity.

    Attributes:
        name: what it is called.
        kinds: the ``device_kind``s under which jax shows it.
        memory: bytes.
        bandwidth: of that memory, bytes a second.
        flops: bfloat16 FLOPs a second, dense.
        int8_ops: int8 operations a second; None where the vendor states none.
        devices: the jax devices that one chip is; its figures are those of all of them together.
        links: bytes a second that it sends to its neighbours, over all its links; None where there are none,
            or the topology is not known here.
        network: bytes a second that it sends over the data centre's network, between slices; likewise.
    """

    name: str
    kinds: tuple[str, ...]
    memory: int
    bandwidth: float
    flops: float
    int8_ops: float | None
    devices: int = 1
    links: float | None = None
    network: float | None = None


CHIPS = (
    Chip("TPU v4", ("TPU v4",), 32 * GIB, 1228e9, 275e12, 275e12),
    Chip("TPU v5e", ("TPU v5 lite", "TPU v5e"), 16 * GIB, 819e9, 197e12, 394e12, links=200e9, network=3.125e9),
    Chip("TPU v5p", ("TPU v5", "TPU v5p"), 95 * GIB, 2765e9, 459e12, 918e12, links=600e9, network=6.25e9),
    Chip("TPU v6e", ("TPU v6 lite", "TPU v6e"), 32 * GIB, 1638e9, 918e12, 1836e12, links=400e9, network=12.5e9),
    Chip("TPU v7", ("TPU7x",), 192 * GIB, 7380e9, 2307e12, None, devices=2),
    Chip("A100 40 GB", ("NVIDIA A100-SXM4-40GB",), 40 * GIB, 1555e9, 312e12, 624e12),
    Chip("A100 80 GB", ("NVIDIA A100-SXM4-80GB",), 80 * GIB, 2039e9, 312e12, 624e12),
    Chip("H100", ("NVIDIA H100 80GB HBM3",), 80 * GIB, 3350e9, 989e12, 1979e12),
    Chip("H200", ("NVIDIA H200",), 141 * GIB, 4800e9, 989e12, 1979e12),
)


def find_chip(device_kind: str) -> Chip | None:
    """The chip behind a jax ``device.device_kind``; None for a CPU, or another that is not in the table."""
    return next((chip for chip in CHIPS if device_kind in chip.kinds), None)
