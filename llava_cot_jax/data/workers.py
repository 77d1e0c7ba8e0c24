"""Worker processes that do not outlive their parent."""

import multiprocessing as mp
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any, TypeVar

from llava_cot_jax.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def die_with_parent() -> None:
    """Call once in a worker process: it ends as soon as its parent has, even by SIGKILL."""
    parent = mp.parent_process()
    assert parent is not None, "not a worker process"
    sentinel = parent.sentinel

    def watch() -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="die_with_parent").start()


def parallel(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Generator[tuple[int, Result], None, None]:
    """Apply ``function`` to every item, in ``workers`` processes, or with 0 in this one.

    Close the generator where you may leave it early: until then the workers go on. Ctrl-C reaches
    this process alone, so that it can end the workers in good order.

    Args:
        function: can be pickled, and is sent to each worker once, with what it holds; the first
            exception that it raises ends the iteration.

    Yields:
        The item's index and its result, in the order of completion.

    Raises:
        UserError: a worker process died, out of memory perhaps.
    """
    if workers == 0:
        yield from enumerate(map(function, items))
        return
    # Not forked: JAX and the tokenizers run threads, and a fork may copy a lock that one of them holds.
    pool = ProcessPoolExecutor(workers, mp.get_context("spawn"), initializer=_begin, initargs=(function,))
    try:
        with _interrupts_blocked():  # processes that start here inherit it
            futures = {pool.submit(_call, item): i for i, item in enumerate(items)}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool:
        raise UserError("a worker process died; it may have run out of memory: use fewer workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_function: Callable[[Any], Any]
"""What a worker process was started for."""


def _begin(function: Callable[[Any], Any]) -> None:
    global _function
    die_with_parent()
    _function = function


def _call(item: Any) -> Any:
    return _function(item)
