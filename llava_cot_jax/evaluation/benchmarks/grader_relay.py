"""Relay on this machine between VLMEvalKit and a judge: it keeps each reply, and it alone knows the judge's key."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Lock, Thread
from types import TracebackType
from typing import Any, BinaryIO, Self

from llava_cot_jax.errors import TransientError, UserError
from llava_cot_jax.evaluation.benchmarks.grader import Grader
from llava_cot_jax.paths import writing_errors

REPLIES = "judge_replies.jsonl"
"""File in the folder of an evaluation that has the judge's replies."""


class ReplyFile:
    """File of a judge's replies, each of which is on the disk before it is used.

    The same request may be made several times, as by a scorer that tries again: its n-th reply in a scoring is the n-th
    one that is kept. While it is open, no other process can open it so.

    Args:
        path: Path of the file. Its last line is dropped where it was not written whole.

    Raises:
        UserError: It cannot be written, or another process has it open.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, Lock()
        self._replies: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self._used: Counter[str] = Counter()
        with writing_errors(path):
            self._file: BinaryIO = path.open("ab+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read()
        except BlockingIOError:
            self._file.close()
            raise UserError(f"{path} is being written by another process: wait for it") from None
        except BaseException:
            self._file.close()
            raise

    def take(self, digest: str) -> dict[str, Any] | None:
        """Return the next reply to a request that is kept, or None where it must be asked for.

        Args:
            digest: Digest of the request.
        """
        with self._lock:
            used, kept = self._used[digest], self._replies[digest]
            self._used[digest] += 1
            return kept[used] if used < len(kept) else None

    def keep(self, digest: str, request: Mapping[str, Any], reply: dict[str, Any]) -> None:
        """Keep a reply.

        Args:
            digest: Digest of the request.
            request: The request.
            reply: The reply.

        Raises:
            UserError: It cannot be written.
        """
        line = json.dumps({"digest": digest, "request": request, "reply": reply}) + "\n"
        with self._lock, writing_errors(self._path):
            self._file.write(line.encode())
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._file.close()

    def _read(self) -> None:
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
                self._replies[row["digest"]].append(row["reply"])
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{self._path}, line {number} is no reply of a judge: remove the file") from None
            whole += len(line)
        with writing_errors(self._path):
            self._file.truncate(whole)


class GraderRelay:
    """Server on the loopback interface that passes requests on to a judge.

    Only who has its password may ask it, since it adds the judge's key.

    Args:
        grader: The judge.
        replies: Replies that are kept.
        on_failure: Function that is called once a request has failed.

    Attributes:
        token: The password.
        failure: Error of the request that failed, if one did.
        requests: Number of requests that were answered.
        kept: Number of those whose replies were kept from before.
        retries: Number of tries that were made again.
    """

    def __init__(self, grader: Grader, replies: ReplyFile, on_failure: Callable[[], Any]) -> None:
        self._grader, self._replies, self._on_failure = grader, replies, on_failure
        self.token = secrets.token_hex(16)
        self.failure: Exception | None = None
        self.requests = self.kept = self.retries = 0
        self._lock, self._ended = Lock(), Event()
        self._server = _Server(("127.0.0.1", 0), _handler(self))

    @property
    def address(self) -> str:
        """Address to which requests are posted."""
        return f"http://127.0.0.1:{self._server.server_port}/v1/chat/completions"

    def __enter__(self) -> Self:
        Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()

    def counts(self) -> dict[str, int]:
        """Return how many requests there were, how many had kept replies, and how many tries were made again."""
        return {"requests": self.requests, "kept": self.kept, "retries": self.retries}

    def reply_to(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """Return the reply to a request, or None where this or another request has failed."""
        if self.failure:
            return None
        try:
            digest = self._grader.digest(request)
            kept = self._replies.take(digest)
            reply = kept or self._grader.ask(request, wait=self._wait)
            if kept is None:
                self._replies.keep(digest, request, reply)
        except Exception as fault:
            with self._lock:
                self.failure = self.failure or fault
            self._ended.set()
            self._on_failure()
            return None
        with self._lock:
            self.requests += 1
            self.kept += kept is not None
        return reply

    def _wait(self, seconds: float) -> None:
        """Wait before another try, of which there is none once any request has failed."""
        with self._lock:
            self.retries += 1
        if self._ended.wait(seconds):
            raise TransientError("the scoring has ended")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a thread may be waiting for the judge

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a connection that the process of the kit broke off, which was ended."""


def _handler(relay: GraderRelay) -> type[BaseHTTPRequestHandler]:
    """Return a class that handles the requests to a relay."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if not secrets.compare_digest(self.headers.get("Authorization", "").split(" ")[-1], relay.token):
                self._answer(401, {"error": {"message": "wrong password"}})
            elif (reply := relay.reply_to(json.loads(body))) is None:
                self._answer(502, {"error": {"message": "the judge does not answer"}})
            else:
                self._answer(200, reply)

        def _answer(self, status: int, content: dict[str, Any]) -> None:
            encoded = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(encoded)))
            self.end_headers()
            self.wfile.write(encoded)

        def log_message(self, format: str, *args: Any) -> None:
            """Write no line for each request."""

    return Handler
