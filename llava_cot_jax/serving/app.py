"""Routes of the endpoint: chat completions, models and health."""

import asyncio
import hmac
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from llava_cot_jax.errors import UserError
from llava_cot_jax.processing.conversation import read_conversation
from llava_cot_jax.processing.messages import Message
from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.serving.api_errors import ApiError, invalid_value
from llava_cot_jax.serving.chat_request import ChatRequest, read_body
from llava_cot_jax.serving.dispatcher import Asked, Dispatcher
from llava_cot_jax.serving.image_urls import ImageLoader
from llava_cot_jax.serving.orders import Answered, NoAnswer, Report, StageWon
from llava_cot_jax.serving.replies import KEEP_ALIVE, LAST_EVENT, ChatChoice, ReplyHeader, as_event, make_choice
from llava_cot_jax.serving.searches import SearchMenu

BODY_SECONDS = 300.0
"""Time in which a body must have come."""

PING_SECONDS = 15.0
"""Time without an event after which a comment keeps a stream alive."""

_CLOSED_BY_CLIENT = 499

_SEEDS = 1 << 32

_Result = TypeVar("_Result")

_Next = tuple[int, Report] | None
"""Number of a choice and a report of it; None where none has come for a time."""


@dataclass(frozen=True)
class Endpoint:
    """Endpoint of a model.

    Attributes:
        menu: The searches.
        listed: Names of the searches that the list of models has.
        processor: Processor of the model's checkpoint.
        loader: Loader of the images.
        dispatcher: Dispatcher of the questions.
        most_bytes: Largest number of bytes of a body.
        seed: Seed of a request that has none.
        key: Key that a request must have; None where none is needed.
        readers: Threads in which bodies and images are read.
        compilations: Function that returns the number of programs that were compiled since the server was ready.
    """

    menu: SearchMenu
    listed: tuple[str, ...]
    processor: Processor
    loader: ImageLoader
    dispatcher: Dispatcher
    most_bytes: int
    seed: int
    key: str | None
    readers: ThreadPoolExecutor
    compilations: Callable[[], int]

    def app(self) -> Starlette:
        """Return the application."""
        routes = [
            Route("/v1/chat/completions", self.answer_chat, methods=["POST"]),
            Route("/v1/models", self.list_models, methods=["GET"]),
            Route("/health", self.tell_health, methods=["GET"]),
        ]
        handlers: Any = {ApiError: _refuse, HTTPException: _refuse_route, ClientDisconnect: _close}
        handlers[Exception] = _fail
        return Starlette(routes=routes, exception_handlers=handlers)

    async def tell_health(self, request: Request) -> Response:
        """Say whether questions are taken, and how many answers are waited for."""
        state = self.dispatcher.state
        content = {
            "status": "ok" if state == "ready" else state,
            "unanswered": self.dispatcher.unanswered,
            "compilations": self.compilations(),
        }
        return JSONResponse(content, 200 if state == "ready" else 503)

    async def list_models(self, request: Request) -> Response:
        """List the model, alone and with its searches."""
        self._check_key(request)
        names = [self.menu.name, *(f"{self.menu.name}:{search}" for search in self.listed)]
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "llava_cot_jax"} for name in names]
        return JSONResponse({"object": "list", "data": models})

    async def answer_chat(self, request: Request) -> Response:
        """Answer a question."""
        self._check_key(request)
        in_thread = asyncio.get_running_loop().run_in_executor
        with self.dispatcher.being_read():
            chat = await in_thread(self.readers, read_body, await self._read(request))
            search = self.menu.choose(chat)
            messages = await in_thread(self.readers, self._load, chat)
        seed = self.seed if chat.seed is None else chat.seed
        seeds = [(seed + i) % _SEEDS for i in range(chat.choices)]
        asked = self.dispatcher.ask(search.strategy, messages, seeds, tells_stages=chat.stream)
        model = chat.model or self.menu.name
        header = ReplyHeader(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), model, search)
        if not chat.stream:
            return JSONResponse(header.whole(await self._unless_gone(request, asked, self._collect(asked, chat))))
        # A mistake that shows soon has a status of its own, which can be sent only before the first event.
        first = await self._unless_gone(request, asked, _first_report(asked))
        return _EventResponse(self._events(asked, chat, header, first), lambda: self.dispatcher.drop(asked))

    def _check_key(self, request: Request) -> None:
        given = request.headers.get("authorization", "")
        if self.key is not None and not hmac.compare_digest(given.encode(), f"Bearer {self.key}".encode()):
            message = "the key is missing or wrong: send the header Authorization: Bearer KEY"
            raise ApiError(401, "invalid_api_key", message)

    async def _read(self, request: Request) -> bytes:
        """Return the body of a request.

        Raises:
            ApiError: It is too large, or does not come.
        """
        too_large = ApiError(413, "body_too_large", f"the body has more than {self.most_bytes} bytes (--max_body_mb)")
        length = request.headers.get("content-length", "")
        is_announced = length.isascii() and length.isdigit() and int(length[:20]) > self.most_bytes
        if is_announced and request.headers.get("expect", "").lower() == "100-continue":
            raise too_large
        body, size = bytearray(), 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    size += len(part)
                    if size <= self.most_bytes and not is_announced:
                        body += part
                    else:  # the rest is read and let go: a client that is still sending reads no answer
                        body.clear()
        except TimeoutError:
            raise ApiError(408, "body_timeout", f"the body has not come in {BODY_SECONDS:.0f} s") from None
        if size > self.most_bytes:
            raise too_large
        return bytes(body)

    def _load(self, chat: ChatRequest) -> list[Message]:
        """Return the messages of a request with its images, all of which can be used.

        Raises:
            ApiError: An image cannot be read, a message is malformed, or the prompt exceeds the model's context.
        """
        messages = chat.with_images(self.loader.load(chat.image_urls))
        try:
            conversation = read_conversation(messages)
            prompt = self.processor.prompt(conversation.asked(*self.menu.format.around_question))
        except UserError as fault:
            raise invalid_value("messages", str(fault)) from None
        # The thread that owns jax, which all wait for, would take long to encode a prompt of many megabytes.
        (tokens,), context = self.processor.tokenize([prompt]), self.processor.config.text.max_position_embeddings
        if len(tokens) > context:
            message = f"the prompt has {len(tokens)} tokens, more than the context of {context}: shorten the question"
            raise invalid_value("messages", message)
        return messages

    async def _unless_gone(self, request: Request, asked: Asked, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Return what ``work`` returns. The question is let go where that fails.

        Raises:
            ClientDisconnect: The client is gone.
            ApiError: ``work`` raises it.
        """
        gone, working = asyncio.create_task(_wait_until_gone(request)), asyncio.create_task(work)
        try:
            await asyncio.wait({gone, working}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise ClientDisconnect
            return working.result()
        except BaseException:
            self.dispatcher.drop(asked)
            raise
        finally:
            gone.cancel()
            working.cancel()

    async def _collect(self, asked: Asked, chat: ChatRequest) -> list[ChatChoice]:
        """Return all choices.

        Raises:
            ApiError: One of them has no answer.
        """
        found: dict[int, ChatChoice] = {}
        while len(found) < chat.choices:
            index, report = await asked.reports.get()
            if isinstance(report, NoAnswer):
                raise _error_of(report)
            if isinstance(report, Answered):
                found[index] = await self._choice(report, chat)
        return [found[i] for i in range(chat.choices)]

    async def _choice(self, report: Answered, chat: ChatRequest) -> ChatChoice:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.readers, make_choice, report, chat, self.processor)

    async def _events(self, asked: Asked, chat: ChatRequest, header: ReplyHeader, first: _Next) -> AsyncIterator[bytes]:
        """Yield the events of an answer."""
        found: dict[int, ChatChoice] = {}
        told = [""] * chat.choices
        for index in range(chat.choices):
            yield header.event(index, {"role": "assistant", "content": ""})
        following = first
        while len(found) < chat.choices:
            match following:
                case None:
                    yield KEEP_ALIVE
                case _, NoAnswer() as report:
                    yield as_event(_error_of(report).body)
                    return
                case index, StageWon(texts):
                    delta = "\n\n".join(([""] if told[index] else []) + texts)
                    told[index] += delta
                    yield header.event(index, {"reasoning_content": delta})
                case index, Answered() as report:
                    found[index] = choice = await self._choice(report, chat)
                    if rest := (choice.reasoning or "").removeprefix(told[index]):
                        yield header.event(index, {"reasoning_content": rest})
                    yield header.event(index, {"content": choice.content})
                    yield header.event(index, {}, choice.finish_reason, llava_cot=choice.about)
            if len(found) < chat.choices:
                following = await _next_report(asked)
        if chat.include_usage:
            yield header.usage_event([found[i] for i in range(chat.choices)])
        yield LAST_EVENT


class _EventResponse(StreamingResponse):
    """Response of events.

    Args:
        events: The events.
        on_end: Function that is called at the end, be it that the client is gone before the first event.
    """

    def __init__(self, events: AsyncIterator[bytes], on_end: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


async def _next_report(asked: Asked) -> _Next:
    """Return the next report of a question, or None where it is time to keep the stream alive."""
    try:
        return await asyncio.wait_for(asked.reports.get(), PING_SECONDS)
    except TimeoutError:
        return None


async def _first_report(asked: Asked) -> _Next:
    """Return what ``_next_report`` does.

    Raises:
        ApiError: The question has no answer.
    """
    following = await _next_report(asked)
    if following is not None and isinstance(following[1], NoAnswer):
        raise _error_of(following[1])
    return following


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _error_of(report: NoAnswer) -> ApiError:
    if report.is_mistake:
        return invalid_value("messages", report.message)
    return ApiError(500, "internal_error", report.message)


async def _refuse(request: Request, fault: ApiError) -> Response:
    return JSONResponse(fault.body, fault.status, fault.headers)


async def _refuse_route(request: Request, fault: HTTPException) -> Response:
    code = "method_not_allowed" if fault.status_code == 405 else "not_found"
    error = ApiError(fault.status_code, code, f"there is no {request.method} {request.url.path}: {fault.detail}")
    return JSONResponse(error.body, error.status, fault.headers)


async def _fail(request: Request, fault: Exception) -> Response:
    """Return the answer to a request at which the server fails. uvicorn logs the failure."""
    return await _refuse(request, ApiError(500, "internal_error", f"the server has failed: {type(fault).__name__}"))


async def _close(request: Request, fault: ClientDisconnect) -> Response:
    """Return what is written where nobody reads it."""
    return Response(status_code=_CLOSED_BY_CLIENT)
