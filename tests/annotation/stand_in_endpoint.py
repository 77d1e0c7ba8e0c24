"""A stand-in for a chat endpoint: it answers well or badly as a test says, and knows what it was asked."""

import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TAGS = ("SUMMARY", "CAPTION", "REASONING", "CONCLUSION")


def staged(conclusion: str, **changed: str) -> str:
    """A good answer with this conclusion, in which the bodies of sections may be others."""
    bodies = dict(zip(TAGS, ("look at it", "a picture", "it shows so", conclusion), strict=True)) | changed
    return "\n\n".join(f"<{tag}> {body} </{tag}>" for tag, body in bodies.items())


@dataclass(frozen=True)
class Asked:
    """A request.

    Attributes:
        number: Its number, from 1.
        body: Its JSON.
        time: When it came, in seconds.
    """

    number: int
    body: dict[str, Any]
    time: float

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.body, sort_keys=True).encode()).hexdigest()

    def _texts(self) -> Iterator[str]:
        for message in self.body["messages"]:
            parts = message["content"] if isinstance(message["content"], list) else [{"text": message["content"]}]
            yield from (part["text"] for part in parts if "text" in part)

    def _found(self, label: str) -> str:
        return [match[1] for text in self._texts() for match in re.finditer(rf"^{label}: (.*)$", text, re.MULTILINE)][
            -1
        ]

    @property
    def is_check(self) -> bool:
        return any("Their conclusion:" in text for text in self._texts())

    @property
    def question(self) -> str:
        return self._found("Question")

    @property
    def standard_answer(self) -> str:
        return self._found("Standard answer")

    @property
    def conclusion(self) -> str:
        return self._found("Their conclusion")

    @property
    def attempt(self) -> int:
        """Number of the try, by the replies that were told what is wrong with them."""
        return sum("cannot be used" in text for text in self._texts()) + 1


@dataclass(frozen=True)
class Response:
    """A response.

    Attributes:
        text: Text of the completion.
        finish: Its finish reason.
        status: Status of the response; another than 200 has ``text`` for a message.
        headers: Further headers.
        late: Seconds before it comes.
        breaks: Whether the connection is closed in the middle of the body.
        cut: Whether the JSON ends in the middle.
        usage: Whether it says how many tokens it took; or what it says in place of that.
        trickle: Seconds before each byte of the body; 0 sends it at once.
        raw: The body itself, if it is not that of a completion.
        whole: Whole answer beside the conclusion, as ``serve`` gives it.
        refusal: Text by which the model declines in the field of that name.
        before: Function that is called before it is sent.
        after: Function that is called once it is sent.
        half: Function that is called once half of the body is sent.
    """

    text: str = ""
    finish: str = "stop"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    late: float = 0.0
    breaks: bool = False
    cut: bool = False
    usage: Any = True
    trickle: float = 0.0
    raw: bytes | None = None
    whole: str | None = None
    refusal: str | None = None
    before: Callable[[], object] = lambda: None
    half: Callable[[], object] = lambda: None
    after: Callable[[], object] = lambda: None


def well(asked: Asked) -> Response:
    """A good answer, or the verdict that compares the texts."""
    if asked.is_check:
        return Response("yes" if asked.conclusion.lower() == asked.standard_answer.lower() else "No, it says another.")
    return Response(staged(asked.standard_answer))


class StandIn:
    """The endpoint, while it runs.

    Attributes:
        behave: Function of a request that says the response.
        asked: Requests so far, in their order.
        most: Largest number of requests at a time.
        model: Name by which it calls the model; None is that in the request.
    """

    def __init__(self, behave: Callable[[Asked], Response] = well) -> None:
        self.behave = behave
        self.asked: list[Asked] = []
        self.keys: set[str] = set()
        self.model: str | None = None
        self.most = self._now = 0
        self._lock = threading.Lock()
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stand_in._lock:
                    asked = Asked(len(stand_in.asked) + 1, body, time.monotonic())
                    stand_in.asked.append(asked)
                    stand_in.keys.add(self.headers.get("Authorization", ""))
                    stand_in._now += 1
                    stand_in.most = max(stand_in.most, stand_in._now)
                try:
                    self._respond(asked, stand_in.behave(asked))
                except (BrokenPipeError, ConnectionResetError):  # the client was killed
                    self.close_connection = True
                finally:
                    with stand_in._lock:
                        stand_in._now -= 1

            def _respond(self, asked: Asked, response: Response) -> None:
                if response.late:
                    time.sleep(response.late)
                response.before()
                content = response.raw or json.dumps(_content(asked, response, stand_in.model)).encode()
                if response.cut:
                    content = content[: len(content) // 2]
                self.send_response(response.status)
                for name, value in {"Content-Type": "application/json", **response.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                for byte in content if response.trickle else b"":
                    self.wfile.write(bytes([byte]))
                    time.sleep(response.trickle)
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                response.half()
                if response.breaks:
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self.wfile.write(content[len(content) // 2 :])
                self.wfile.flush()
                response.after()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 256
            daemon_threads = True

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def serve_forever(self) -> None:
        self._server.serve_forever(poll_interval=0.05)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _content(asked: Asked, response: Response, model: str | None) -> dict[str, Any]:
    if response.status != 200:
        return {"error": {"message": response.text, "type": "error", "code": None}}
    message = {"role": "assistant", "content": response.text, "refusal": response.refusal}
    beside = {} if response.whole is None else {"llava_cot": {"text": response.whole, "seed": 0}}
    usage = {"prompt_tokens": 1000, "completion_tokens": 200, "total_tokens": 1200}
    return {
        "id": f"completion-{asked.number}",
        "object": "chat.completion",
        "created": 0,
        "model": model or asked.body["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": response.finish, "logprobs": None} | beside],
        **({"usage": usage if response.usage is True else response.usage} if response.usage else {}),
    }


@contextmanager
def running(behave: Callable[[Asked], Response] = well) -> Iterator[StandIn]:
    """Run the endpoint in a thread."""
    stand_in = StandIn(behave)
    thread = threading.Thread(target=stand_in.serve_forever, daemon=True)
    thread.start()
    try:
        yield stand_in
    finally:
        stand_in.close()
        thread.join()
