"""Orders that all processes of one model follow alike, which the first of them gives."""

import pickle
from collections.abc import Sequence

import numpy as np
from jax.experimental import multihost_utils

from llava_cot_jax.rounding import round_up_to_power_of_two
from llava_cot_jax.serving.orders import Order, OrderQueue

HEARTBEAT_SECONDS = 5.0
"""Time after which the other processes hear from the first one, so that no wait of theirs is given up."""

_SMALLEST = 1024


class SharedOrders:
    """Orders of the first process, in every process. All processes take them equally often.

    Args:
        own: Orders of this process, if it is the first; None in the others.
    """

    def __init__(self, own: OrderQueue | None) -> None:
        self._own = own

    def take(self, wait: bool) -> Sequence[Order]:
        """Return the orders that there are; with ``wait``, not before there is one, or a time has passed."""
        content = b"" if self._own is None else _packed(self._own.take(wait, HEARTBEAT_SECONDS))
        size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
        if not size:
            return []
        sent = np.zeros(max(_SMALLEST, round_up_to_power_of_two(size)), np.uint8)
        sent[: len(content)] = np.frombuffer(content, np.uint8)
        found = np.asarray(multihost_utils.broadcast_one_to_all(sent))
        orders: Sequence[Order] = pickle.loads(found[:size].tobytes())  # written by the first process of the run
        return orders


def _packed(orders: Sequence[Order]) -> bytes:
    return pickle.dumps(list(orders)) if orders else b""
