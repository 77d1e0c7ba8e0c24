"""Journal of replies: each is on the disk before it is used, so that a stop at any moment loses none of them."""

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from llava_cot_jax.annotation.outcomes import FAILED, REFUSED, UNUSABLE, RowRequest
from llava_cot_jax.errors import UserError
from llava_cot_jax.line_file import LineFile

USAGE = ("input_tokens", "output_tokens")
"""Keys of a reply by which an endpoint says how many tokens it read and wrote."""

_Kept = tuple[RowRequest, Mapping[str, Any]]
"""Request and its reply."""


class Journal:
    """File of replies, found by the keys of their requests. It holds in memory where each is, and not what it says.

    Requests that were refused, and tries that failed, have a line as well, so that they are counted in every run. A
    refusal is a reply to this run alone: the next one asks again.

    Args:
        path: Path of the file. One that is there already is continued.

    Attributes:
        path: Path of the file.
        requests: Number of requests that were sent.
        tokens: Numbers of tokens of all requests, by the keys of ``USAGE``.

    Raises:
        UserError: The file cannot be written, is no journal, or is open in another process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.requests, self.tokens = 0, dict.fromkeys(USAGE, 0)
        self._held: dict[str, Mapping[str, Any]] = {}
        self._refused: set[bytes] = set()
        self._places: dict[bytes, int] = {}
        self._waiting: dict[str, _Kept] = {}
        self._turn, self._access = asyncio.Lock(), Lock()
        self._file = LineFile(path)
        try:
            for number, (offset, line) in enumerate(self._file.lines(), 1):
                self._note_line(offset, line, number)
        except BaseException:
            self._file.close()
            raise

    def __len__(self) -> int:
        """Return the number of replies."""
        return len(self._places)

    def get(self, request: RowRequest) -> dict[str, Any] | None:
        """Return the reply to a request, or None if there is none yet."""
        if held := self._held.get(request.key):
            return dict(held)
        place = self._places.get(bytes.fromhex(request.key))
        if place is None:
            return None
        with self._access:
            reply: dict[str, Any] = json.loads(self._file.read_line(place))["reply"]
        return reply

    def was_refused(self, request: RowRequest) -> bool:
        """Whether the endpoint has refused a request, in this run or in an earlier one, and not answered it since."""
        return bytes.fromhex(request.key) in self._refused

    def hold(self, request: RowRequest, reply: Mapping[str, Any]) -> None:
        """Keep the reply to a request for this run alone."""
        self._held[request.key] = reply

    def release(self, request: RowRequest) -> None:
        """Forget a reply that was kept for this run alone."""
        self._held.pop(request.key, None)

    def add(self, request: RowRequest, reply: Mapping[str, Any]) -> None:
        """Keep the reply to a request, which is on the disk when this returns.

        Raises:
            UserError: It cannot be written.
        """
        self._count(reply)
        self._write({request.key: (request, reply)})

    async def add_soon(self, request: RowRequest, reply: Mapping[str, Any]) -> None:
        """Keep the reply to a request, or what stands for none. Those that come meanwhile are written together.

        Raises:
            UserError: It cannot be written.
        """
        self._waiting[request.key] = request, reply
        self._count(reply)
        if reply["finish"] == REFUSED:
            self.hold(request, reply)
        async with self._turn:
            if request.key in self._waiting:
                batch, self._waiting = self._waiting, {}
                await asyncio.shield(asyncio.to_thread(self._write, batch))

    def close(self) -> None:
        """Write what has come and is not written yet, and close the file."""
        try:
            if self._waiting:
                batch, self._waiting = self._waiting, {}
                self._write(batch)
        finally:
            with self._access:
                self._file.close()

    def _write(self, batch: Mapping[str, _Kept]) -> None:
        with self._access:
            offsets = self._file.append(_journal_line(*kept) for kept in batch.values())
            for (key, (_, reply)), offset in zip(batch.items(), offsets, strict=True):
                self._note_place(key, reply, offset)

    def _note_line(self, offset: int, line: bytes, number: int) -> None:
        try:
            content = json.loads(line)
            self._note_place(content["key"], content["reply"], offset)
            self._count(content["reply"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{self.path}, line {number} is no reply of this command: remove it, or name another output"
            ) from None

    def _note_place(self, key: str, reply: Mapping[str, Any], offset: int) -> None:
        digest, finish = bytes.fromhex(key), reply.get("finish")
        if finish == REFUSED:
            self._refused.add(digest)
        elif finish not in (UNUSABLE, FAILED):
            self._refused.discard(digest)
            self._places[digest] = offset

    def _count(self, reply: Mapping[str, Any]) -> None:
        self.requests += reply.get("finish") != UNUSABLE
        for name in USAGE:
            self.tokens[name] += reply.get(name) or 0


def _journal_line(request: RowRequest, reply: Mapping[str, Any]) -> bytes:
    content = {"key": request.key, **request.about, "reply": reply}
    return json.dumps(content, ensure_ascii=True, allow_nan=False).encode() + b"\n"
