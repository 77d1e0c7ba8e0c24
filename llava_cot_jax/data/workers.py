"""Worker processes that do not outlive their parent."""

import multiprocessing as mp
import os
import signal
import sys
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


_LEFTOVER_MEMORY = "ignore:resource_tracker:UserWarning"
"""Option ``-W`` of Python for the warnings of its resource tracker."""


def die_with_parent() -> None:
    """End this worker process as soon as its parent has ended, even by SIGKILL. To be called once."""
    parent = mp.parent_process()
    assert parent is not None, "not a worker process"
    sentinel = parent.sentinel

    def watch() -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="die_with_parent").start()


def expect_leftover_memory() -> None:
    """Let the processes that Python starts from here on free shared memory that was left over, without a warning.

    A worker that ends while it sends a batch cannot know whether the batch was received. So Python's resource tracker,
    a process that Python starts beside the first worker, frees it, which it would report as a leak.
    """
    if _LEFTOVER_MEMORY not in sys.warnoptions:
        sys.warnoptions.append(_LEFTOVER_MEMORY)


def parallel(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Generator[tuple[int, Result], None, None]:
    """Apply ``function`` to every item, in worker processes or in this process.

    The workers go on until the generator is exhausted or closed, so a caller that may stop early has to close it.
    Ctrl-C reaches this process alone, so that it can end the workers in good order.

    Args:
        function: Function that can be pickled. It is sent to each worker once, with all that it refers to; the first
            exception that it raises ends the iteration.
        items: Arguments of the calls, one per call.
        workers: Number of worker processes; with 0, this process does the work.

    Yields:
        The index of an item and its result, in the order of completion.

    Raises:
        UserError: A worker process died, perhaps because memory ran out.
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
"""Function that this worker process applies to items."""


def _begin(function: Callable[[Any], Any]) -> None:
    global _function
    die_with_parent()
    _function = function


def _call(item: Any) -> Any:
    return _function(item)
