"""Stand-in for a chat endpoint that judges answers, on the loopback interface."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread


class StandIn:
    """Endpoint that replies as a function says, and remembers what it was asked.

    Args:
        reply: Function of the text of a request, and of how often the same request was made before. It returns a text,
            an HTTP status, such a status with headers, bytes that are sent as they are, or None, by which the
            connection breaks.
    """

    def __init__(self, reply: Callable) -> None:
        self.reply, self.lock = reply, Lock()
        self.bodies: list[dict] = []
        self.keys: set[str | None] = set()
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                stand_in.answer(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, format: str, *args) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    @property
    def texts(self) -> list[str]:
        """Texts of all requests, but for those that only see whether it answers."""
        return [text for body in self.bodies if (text := body["messages"][-1]["content"]) != "hello"]

    def answer(self, handler: BaseHTTPRequestHandler, body: dict) -> None:
        with self.lock:
            before = self.bodies.count(body)
            self.bodies.append(body)
            self.keys.add(handler.headers.get("Authorization"))
        text = body["messages"][-1]["content"]
        found = "hi" if text == "hello" else self.reply(text, before)
        status, headers, content = 200, {}, found
        if found is None:
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{")
            handler.close_connection = True
            return
        if isinstance(found, int):
            found = (found, {})
        if isinstance(found, tuple):
            (status, headers), content = found, b'{"error": {"message": "not now"}}'
        if isinstance(content, str):
            content = json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode()
        handler.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)


@contextmanager
def judge(reply: Callable) -> Iterator[StandIn]:
    """Run a stand-in within the block."""
    stand_in = StandIn(reply)
    Thread(target=stand_in.server.serve_forever, daemon=True).start()
    try:
        yield stand_in
    finally:
        stand_in.server.shutdown()
        stand_in.server.server_close()


def mmvet_row(text: str) -> tuple[str, str]:
    """Return right answer and prediction of the row that MM-Vet's judge is asked about."""
    _, right, prediction, _ = text.splitlines()[-1].split(" | ")
    return right, prediction


def mathvista_prediction(text: str) -> str:
    """Return the prediction out of which MathVista's judge is asked to take an answer."""
    return text.rpartition("Model respone: ")[2].removesuffix("Extracted answer:")
