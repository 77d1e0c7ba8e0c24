"""TPU chips of this machine, which are found without jax."""

from pathlib import Path

_DEVICES = Path("/sys/bus/pci/devices")

_GOOGLE = "0x1ae0"
"""PCI vendor of TPUs, and of Google's network cards."""

_TPUS = {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}
"""PCI devices that are TPUs, as jax 0.10.2 has them (``jax/_src/hardware_utils.py``)."""


def count_tpu_chips() -> int:
    """Return the number of TPU chips of this machine."""
    return sum(
        path.read_text().strip() == _GOOGLE and (path.parent / "device").read_text().strip() in _TPUS
        for path in _DEVICES.glob("*/vendor")
    )
