"""Stop of a run after a step, when the user presses Ctrl-C, as a SIGTERM stops it."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from llava_cot_jax.interruption import end_at_once

_FIRST = "Ctrl-C: the run stops after the step under way and saves a checkpoint. A second Ctrl-C ends it at once."


class Interruption:
    """Ctrl-C that a run heard.

    Attributes:
        heard: Whether Ctrl-C was pressed.
    """

    def __init__(self) -> None:
        self.heard = False


@contextmanager
def stop_on_interrupt() -> Iterator[Interruption]:
    """Turn the first Ctrl-C within the block into a SIGTERM, which stops all hosts of a run after the same step.

    A second one ends this process at once, with exit code 130. A thread listens, because the main thread hears no
    signal while it compiles a program. Where jax does not listen for SIGTERM, Ctrl-C raises ``KeyboardInterrupt``.
    The warning of what happens is for whoever pressed it, at this process, which need not be the first of the run.
    """
    interruption = Interruption()
    in_main_thread = threading.current_thread() is threading.main_thread()
    is_ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as background jobs of a shell ignore it
    if not in_main_thread or is_ignored or not jax.distributed.is_initialized():
        yield interruption
        return

    def listen() -> None:
        while received := receiver.recv(64):
            for _ in range(received.count(signal.SIGINT)):
                if interruption.heard:
                    end_at_once()
                interruption.heard = True
                logging.getLogger(__name__).warning(_FIRST)
                os.kill(os.getpid(), signal.SIGTERM)

    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    threading.Thread(target=listen, daemon=True).start()
    descriptor = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    handler = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield interruption
    finally:
        signal.signal(signal.SIGINT, handler)
        signal.set_wakeup_fd(descriptor)
        sender.close()  # which ends the thread
