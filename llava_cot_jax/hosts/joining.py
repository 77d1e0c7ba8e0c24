"""Connection of jax with the other processes of a run."""

import socket

from llava_cot_jax.errors import UserError
from llava_cot_jax.hosts.process_group import ProcessGroup, bypass_proxies


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
