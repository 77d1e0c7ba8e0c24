"""Memory that devices and this process have taken."""

import resource

import jax


def peak_device_memory() -> int | None:
    """Peak memory in bytes of the local device that took the most; None where no device reports it, as on a CPU."""
    statistics = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((found["peak_bytes_in_use"] for found in statistics if "peak_bytes_in_use" in found), default=None)


def peak_process_memory() -> int:
    """Peak resident memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_memory() -> int:
    """Peak memory in bytes of a device where devices report it, otherwise of this process."""
    on_device = peak_device_memory()
    return peak_process_memory() if on_device is None else on_device
