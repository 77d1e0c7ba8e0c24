"""Addresses and ports to listen at."""

import contextlib
import ipaddress
import socket
from typing import Any

from llava_cot_jax.errors import UserError

_BACKLOG = 2048


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a host.

    Raises:
        UserError: There is no such host.
    """
    return all(ipaddress.ip_address(place[4][0].partition("%")[0]).is_loopback for place in _places(host, 0))


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        UserError: The host is none of this machine, or the port is in use.
    """
    if not 0 <= port < 1 << 16:
        raise UserError(f"port is {port}; it must be from 0, which takes any that is free, to 65535")
    family, _, _, _, place = _places(host, port)[0]
    with contextlib.ExitStack() as cleanup:
        try:
            listener = cleanup.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
            listener.listen(_BACKLOG)
        except OSError as fault:
            raise UserError(
                f"cannot listen at {host} port {port}: {fault.strerror}; give another --port or --host"
            ) from None
        cleanup.pop_all()
    return listener


def url_of(listener: socket.socket) -> str:
    """Return the base URL that clients of OpenAI's API take."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def _places(host: str, port: int) -> list[Any]:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as fault:
        raise UserError(f"there is no host {host}: {getattr(fault, 'strerror', None) or fault}") from None
