"""The server: its socket, its signals, and the thread that owns jax beside the event loop."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Thread
from typing import Any

import uvicorn
from starlette.applications import Starlette

from llava_cot_jax.search.strategies import Strategy
from llava_cot_jax.serving.dispatcher import Dispatcher
from llava_cot_jax.serving.orders import Deliver

_KEEP_ALIVE_SECONDS = 75

LAST_READ_SECONDS = 30
"""Time after the last answer in which clients must have read theirs, once the server stops."""


@dataclass
class Answering:
    """Work of the thread that owns jax.

    Attributes:
        prepare: Function that loads the model and compiles, with the function that takes reports. It returns the
            searches that are compiled.
        run: Function that answers until it is told to stop.
        stop: Function that tells it to.
        is_shared: Whether other processes do the same, so that it must be told to stop even before it answers.
    """

    prepare: Callable[[Deliver], list[Strategy]]
    run: Callable[[], None]
    stop: Callable[[], None]
    is_shared: bool = False


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to ``serve_requests``."""
        yield


def serve_requests(
    listener: socket.socket, app: Starlette, dispatcher: Dispatcher, answering: Answering, on_ready: Callable[[], None]
) -> bool:
    """Serve until SIGTERM or Ctrl-C, after which what was begun is finished. A second signal ends the process at once.

    Args:
        listener: Socket that listens.
        app: The application.
        dispatcher: Dispatcher of its questions.
        answering: What the thread that owns jax does.
        on_ready: Function that is called when questions are taken.

    Returns:
        Whether the thread that owns jax has ended. One that is loading and compiling is not waited for.

    Raises:
        UserError: The model cannot be loaded, or a search cannot be used with it.
    """
    return asyncio.run(_serve(listener, app, dispatcher, answering, on_ready))


async def _serve(
    listener: socket.socket, app: Starlette, dispatcher: Dispatcher, answering: Answering, on_ready: Callable[[], None]
) -> bool:
    loop = asyncio.get_running_loop()
    config = uvicorn.Config(
        app, log_config=None, log_level="warning", access_log=False, lifespan="off", ws="none", server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS, timeout_graceful_shutdown=LAST_READ_SECONDS,
    )  # fmt: skip
    server = _Server(config)
    ended: asyncio.Future[None] = loop.create_future()
    work = Thread(target=_work, args=(loop, dispatcher, answering, on_ready, ended), daemon=True)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _on_signal, number, dispatcher, stopping)
    work.start()
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    told = asyncio.create_task(stopping.wait())
    awaited: set[asyncio.Future[Any]] = {serving, told, ended}
    await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
    was_ready = dispatcher.has_been_ready
    dispatcher.stop()
    idle = asyncio.create_task(dispatcher.idle.wait())
    awaited = {idle, ended}
    await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
    dispatcher.give_up()  # what a failure has left without an answer
    server.should_exit = True
    await serving
    for task in (told, idle):
        task.cancel()
    if not ended.done():
        if not (was_ready or answering.is_shared):
            return False
        answering.stop()
    await ended
    return True


def _work(
    loop: asyncio.AbstractEventLoop,
    dispatcher: Dispatcher,
    answering: Answering,
    on_ready: Callable[[], None],
    ended: "asyncio.Future[None]",
) -> None:
    """Load, compile and answer. Tell the event loop when questions can be taken, and how this ends."""

    def call(function: Callable[..., object], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed
            loop.call_soon_threadsafe(function, *arguments)

    def settle(fault: BaseException | None) -> None:
        if not ended.done():
            ended.set_exception(fault) if fault else ended.set_result(None)

    def begin(strategies: list[Strategy]) -> None:
        dispatcher.ready(strategies)
        on_ready()

    try:
        call(begin, answering.prepare(lambda number, report: call(dispatcher.report, number, report)))
        answering.run()
    except BaseException as fault:
        call(settle, fault)
    else:
        call(settle, None)


def _on_signal(number: int, dispatcher: Dispatcher, stopping: asyncio.Event) -> None:
    if stopping.is_set():
        print("ended before all was answered", file=sys.stderr, flush=True)
        os._exit(128 + number)
    if dispatcher.unanswered:
        print(f"stopping: {dispatcher.unanswered} answers are still to be given", file=sys.stderr, flush=True)
    dispatcher.stop()
    stopping.set()
