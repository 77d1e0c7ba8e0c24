"""The annotations of a raw data set: a JSON Lines file in LLaVA's format, read and checked row by row."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO

from llava_cot_jax.data.raw.images import Member, RawImages, shortest
from llava_cot_jax.data.rows import MARKER, Turn
from llava_cot_jax.errors import UserError
from llava_cot_jax.stages import is_staged

SPEAKERS = ("human", "gpt")

UNKNOWN = "(unknown)"
"""The source of a row that does not say it."""


class Reason(StrEnum):
    """Why a row is left out."""

    BROKEN_JSON = "broken JSON"
    NOT_A_ROW = "no conversation"
    NO_IMAGE = "no image"
    BAD_TURNS = "bad turns"
    MISSING_IMAGE = "missing image"
    BROKEN_IMAGE = "broken image"


@dataclass(frozen=True, slots=True)
class Entry:
    """A row without structural fault.

    Attributes:
        line: its number in the annotations, from 1: the key of its record, for ids may repeat.
        offset: where the line begins, in bytes.
        id: as the row has it.
        source: the data set that the picture comes from.
        image_path: as the row has it, without detours.
        image: the file that it names.
        unstaged: how many of its answers lack a stage.
    """

    line: int
    offset: int
    id: str
    source: str
    image_path: str
    image: Member
    unstaged: int


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A row that is not used. ``id`` and ``image`` are empty where it has none."""

    line: int
    id: str
    source: str
    image: str
    reason: Reason
    detail: str


@dataclass(frozen=True)
class Annotations:
    """The rows of a file.

    Attributes:
        entries: those that can be used, as far as their images decode.
        left_out: the others.
        sha256: of the whole file.
    """

    entries: list[Entry]
    left_out: list[LeftOut]
    sha256: str


def read_annotations(path: Path, images: RawImages, limit: int | None = None) -> Annotations:
    """Read the file once, hold every row against the format, and find its image. Blank lines are no rows.

    Args:
        limit: read rows from so many lines only.

    Raises:
        UserError: the file cannot be read.
    """
    read = Annotations([], [], "")
    digest = hashlib.sha256()
    offset = 0
    with open_annotations(path) as file:
        for line, text in enumerate(file, 1):
            digest.update(text)
            if text.strip() and (limit is None or line <= limit):
                row = _check(text, line, offset, images)
                if isinstance(row, Entry):
                    read.entries.append(row)
                else:
                    read.left_out.append(row)
            offset += len(text)
    return Annotations(read.entries, read.left_out, digest.hexdigest())


def open_annotations(path: Path) -> BinaryIO:
    """The file, opened to read bytes.

    Raises:
        UserError: it cannot be opened.
    """
    try:
        return path.open("rb")
    except OSError as fault:
        raise UserError(f"annotations {path} cannot be read: {fault.strerror}") from None


def read_conversations(file: BinaryIO, entry: Entry) -> list[dict[str, str]]:
    """The conversation of a row that was checked, from its place in the opened file."""
    file.seek(entry.offset)
    return [{key: turn[key] for key in ("from", "value")} for turn in json.loads(file.readline())["conversations"]]


def make_turns(conversations: Sequence[Mapping[str, Any]]) -> tuple[Turn, ...]:
    """The questions with their answers.

    Raises:
        ValueError: human and gpt do not take turns, one of them says nothing, or a question has no answer.
    """
    if not conversations:
        raise ValueError("there are none")
    for i, turn in enumerate(conversations):
        speaker, text = (turn.get("from"), turn.get("value")) if isinstance(turn, Mapping) else (None, None)
        if speaker != SPEAKERS[i % 2]:
            raise ValueError(f"turn {i + 1} is from {speaker!r}, not from {SPEAKERS[i % 2]}")
        if not isinstance(text, str) or not text.replace(MARKER, "").strip():
            raise ValueError(f"turn {i + 1} is empty")
    if len(conversations) % 2:
        raise ValueError("the last question has no answer")
    texts = [turn["value"] for turn in conversations]
    return tuple(Turn(question, answer) for question, answer in zip(texts[::2], texts[1::2], strict=True))


def in_validation(image_path: str, share: float) -> bool:
    """Whether rows about the image are for validation: decided by its path alone, whatever else there is."""
    draw = int.from_bytes(hashlib.sha256(image_path.encode()).digest()[:8])
    return draw < share * 2**64


def _check(text: bytes, line: int, offset: int, images: RawImages) -> Entry | LeftOut:
    try:
        row = _parse(text)
    except (ValueError, RecursionError) as fault:
        return LeftOut(line, "", UNKNOWN, "", Reason.BROKEN_JSON, getattr(fault, "msg", str(fault)))
    if not isinstance(row, dict):
        return LeftOut(line, "", UNKNOWN, "", Reason.NOT_A_ROW, "the line is no JSON object")
    id = "" if row.get("id") is None else str(row["id"])
    path = row["image"] if isinstance(row.get("image"), str) else ""
    source = _source(path)

    def leave(reason: Reason, detail: str = "") -> LeftOut:
        return LeftOut(line, id, source, path, reason, detail)

    conversations = row.get("conversations")
    if not isinstance(conversations, list):
        return leave(Reason.NOT_A_ROW)
    if not path:
        return leave(Reason.NO_IMAGE)
    try:
        turns = make_turns(conversations)
    except ValueError as fault:
        return leave(Reason.BAD_TURNS, str(fault))
    image_path, image = shortest(path), images.find(path)
    if image_path is None or image is None:
        return leave(Reason.MISSING_IMAGE)
    unstaged = sum(not is_staged(turn.answer) for turn in turns)
    return Entry(line, offset, id, source, image_path, image, unstaged)


def _parse(text: bytes) -> Any:
    row = json.loads(text)
    if b"\\ud" in text.lower():
        # Half of a surrogate pair is JSON, but no text that can be written.
        json.dumps(row, ensure_ascii=False).encode()
    return row


def _source(image_path: str) -> str:
    """The first folder of the path."""
    folder, found, _ = (shortest(image_path) or "").partition("/")
    return folder if found else UNKNOWN
