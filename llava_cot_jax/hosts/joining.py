"""Devices of a process: together with those of the other processes of its run, or for itself."""

import os
import socket

from llava_cot_jax.errors import UserError
from llava_cot_jax.hosts.process_group import ProcessGroup, bypass_proxies
from llava_cot_jax.tpu_chips import count_tpu_chips

_BOUNDS = {1: "1,1,1", 4: "2,2,1", 8: "2,4,1"}
"""Arrangement of the chips of a TPU host, by their number."""

_CHOSEN_BY = {"TPU_PROCESS_BOUNDS", "TPU_VISIBLE_CHIPS", "TPU_VISIBLE_DEVICES"}
"""Variables by which the user says which chips a process has."""


def join_hosts(group: ProcessGroup) -> None:
    """Connect jax with the other processes of the run, or with this one alone, which lets it hear of a SIGTERM.

    Raises:
        UserError: jax cannot start, for example because of one of its own environment variables.
    """
    import jax

    address, bind = group.address, None
    if group.count == 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = bind = f"127.0.0.1:{probe.getsockname()[1]}"
    bypass_proxies(address)
    jax.config.update("jax_check_proxy_envs", False)  # a warning of what was just prevented
    try:
        jax.distributed.initialize(
            address,
            group.count,
            group.index,
            local_device_ids=group.local_devices,
            cluster_detection_method="deactivate",
            coordinator_bind_address=bind,
        )
    except (ValueError, RuntimeError) as fault:
        raise UserError(f"jax cannot connect the processes of the run at {address}: {fault}") from fault


def keep_to_own_devices(group: ProcessGroup) -> None:
    """Let jax use the accelerators of this process alone, before it uses any.

    On a host of a TPU slice, libtpu would wait for the other hosts. Nothing changes where the user has set its
    variables.
    """
    import jax

    chips = count_tpu_chips()
    if chips in _BOUNDS and not _CHOSEN_BY & os.environ.keys():
        for name in ("PROCESS", "HOST"):  # the second is the older name, which a cluster may have set
            os.environ |= {f"TPU_{name}_BOUNDS": "1,1,1", f"TPU_CHIPS_PER_{name}_BOUNDS": _BOUNDS[chips]}
    if chosen := os.environ.get("JAX_LOCAL_DEVICE_IDS"):
        jax.config.update("jax_cuda_visible_devices", chosen)
    elif group.local_devices is not None:
        jax.config.update("jax_cuda_visible_devices", ",".join(map(str, group.local_devices)))
