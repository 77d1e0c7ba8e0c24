"""Annotations of a raw data set: JSON Lines or a JSON array in LLaVA's format, read and checked row by row."""

import hashlib
import json
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from llava_cot_jax.data.raw.forms import recognise_file
from llava_cot_jax.data.raw.images import Member, RawImages
from llava_cot_jax.data.raw.json_rows import split_rows
from llava_cot_jax.data.raw.names import Found, contradictory_folders, normalise_path
from llava_cot_jax.data.rows import MARKER, Turn
from llava_cot_jax.errors import UserError
from llava_cot_jax.stages import is_staged

SPEAKERS = ("human", "gpt")

UNKNOWN_SOURCE = "(unknown)"
"""Source of a row whose image path does not name one."""


class Reason(StrEnum):
    """Reason for which a row is skipped."""

    BROKEN_JSON = "broken JSON"
    NOT_A_ROW = "no conversation"
    NO_IMAGE = "no image"
    BAD_TURNS = "bad turns"
    MISSING_IMAGE = "missing image"
    BROKEN_IMAGE = "broken image"


@dataclass(frozen=True, slots=True)
class AnnotationRow:
    """A row in the right format whose image exists.

    Attributes:
        line: Number of the line in the annotations, or of the element of an array, from 1. It is the key of the
            record, since ids may repeat.
        offset: Offset of the row in the file, in bytes.
        length: Length of the row in the file, in bytes.
        id: Id of the row.
        source: Data set that the picture comes from.
        found: Image file that the path in the row means, and how it was found.
        image: Image file that was found.
        unstaged: Number of answers that lack a stage.
    """

    line: int
    offset: int
    length: int
    id: str
    source: str
    found: Found
    image: Member
    unstaged: int

    @property
    def image_path(self) -> str:
        """Path of the image, the same for all spellings of it."""
        return self.found.path


@dataclass(frozen=True, slots=True)
class SkippedRow:
    """A row that is skipped.

    Attributes:
        line: Number of the line in the annotations, from 1.
        id: Id of the row, empty if it has none.
        source: Data set that the picture comes from, or ``UNKNOWN_SOURCE``.
        image: Path of the image in the row, empty if it has none.
        reason: Reason for which the row is skipped.
        detail: Fault that was found, or empty where the reason says it all.
    """

    line: int
    id: str
    source: str
    image: str
    reason: Reason
    detail: str


@dataclass(frozen=True)
class Annotations:
    """Rows of a file of annotations.

    Attributes:
        entries: Rows that can be used if their images can be decoded.
        skipped: Rows that cannot be used.
        sha256: SHA-256 of the whole file, hexadecimal.
    """

    entries: list[AnnotationRow]
    skipped: list[SkippedRow]
    sha256: str

    @property
    def members(self) -> list[Member]:
        """Image files of the rows in ``entries``, each once, in their order."""
        return list({entry.image.name: entry.image for entry in self.entries}.values())


def read_annotations(path: Path, images: RawImages, limit: int | None = None) -> Annotations:
    """Check the format of every row of a file, and find its image. Blank lines are skipped.

    Args:
        path: File of annotations.
        images: Images of the data set.
        limit: Number of lines, or of elements of an array, to use, from the first. None uses all.

    Raises:
        UserError: The file cannot be read, or is in another form.
    """
    read = Annotations([], [], "")
    with open_annotations(path) as file:
        # It is closed with the last reference to it, since searches in it may still refer to it after an error.
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for line, (begin, end) in enumerate(islice(split_rows(content, path), limit), 1):
        if (text := content[begin:end]).strip():
            row = _check_row(text, line, begin, images)
            if isinstance(row, AnnotationRow):
                read.entries.append(row)
            else:
                read.skipped.append(row)
    contradictory = contradictory_folders(entry.found for entry in read.entries)
    certain = [entry for entry in read.entries if entry.found.left_out not in contradictory]
    uncertain = [_skip_uncertain(entry) for entry in read.entries if entry.found.left_out in contradictory]
    skipped = sorted([*read.skipped, *uncertain], key=lambda row: row.line)
    return Annotations(certain, skipped, hashlib.sha256(content).hexdigest())


def open_annotations(path: Path) -> BinaryIO:
    """Open the file of annotations to read bytes.

    Raises:
        UserError: The file cannot be opened, or is neither JSON Lines nor a JSON array.
    """
    try:
        if path.is_dir():
            raise UserError(f"annotations {path} is a folder: name a file in it, such as train.jsonl")
        if path.exists() and not path.is_file():
            raise UserError(f"annotations {path} is no file on a disk: write the rows to one, and name that")
        if path.is_symlink() and not path.exists():
            raise UserError(f"annotations {path} is a link to {path.readlink()}, which is not there: fetch that")
        form = recognise_file(path)
        file = path.open("rb")
    except OSError as fault:
        raise UserError(f"annotations {path} cannot be read: {fault.strerror}") from None
    if form or not os.fstat(file.fileno()).st_size:
        file.close()
        described = f"{form.what}: {form.remedy_for_rows(path)}" if form else "empty: fetch it again"
        raise UserError(f"annotations {path} is {described}")
    return file


def read_conversations(file: BinaryIO, entry: AnnotationRow) -> list[dict[str, str]]:
    """Read the conversation of a checked row from the open file."""
    file.seek(entry.offset)
    row = json.loads(file.read(entry.length))
    return [{key: turn[key] for key in ("from", "value")} for turn in row["conversations"]]


def make_turns(conversations: Sequence[Mapping[str, Any]]) -> tuple[Turn, ...]:
    """Pair the questions with their answers.

    Raises:
        ValueError: Human and gpt do not take turns, a text is empty, or a question has no answer.
    """
    if not conversations:
        raise ValueError("there are no turns")
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
    """Whether rows about an image are for validation. This depends on the image path and the share alone."""
    draw = int.from_bytes(hashlib.sha256(image_path.encode()).digest()[:8])
    return draw < share * 2**64


def _check_row(text: bytes, line: int, offset: int, images: RawImages) -> AnnotationRow | SkippedRow:
    try:
        row = _parse(text)
    except (ValueError, RecursionError) as fault:
        return SkippedRow(line, "", UNKNOWN_SOURCE, "", Reason.BROKEN_JSON, getattr(fault, "msg", str(fault)))
    if not isinstance(row, dict):
        return SkippedRow(line, "", UNKNOWN_SOURCE, "", Reason.NOT_A_ROW, "it is no JSON object")
    id = "" if row.get("id") is None else str(row["id"])
    path = row["image"] if isinstance(row.get("image"), str) else ""
    source = _source_of(path)

    def skip(reason: Reason, detail: str = "") -> SkippedRow:
        return SkippedRow(line, id, source, path, reason, detail)

    conversations = row.get("conversations")
    if not isinstance(conversations, list):
        return skip(Reason.NOT_A_ROW)
    if not path:
        return skip(Reason.NO_IMAGE)
    try:
        turns = make_turns(conversations)
    except ValueError as fault:
        return skip(Reason.BAD_TURNS, str(fault))
    found = images.find(path)
    image = images.member(found.name) if found else None
    if found is None or image is None:
        return skip(Reason.MISSING_IMAGE, images.explain(path))
    unstaged = sum(not is_staged(turn.answer) for turn in turns)
    return AnnotationRow(line, offset, len(text), id, _source_of(found.path), found, image, unstaged)


def _skip_uncertain(entry: AnnotationRow) -> SkippedRow:
    path = f"{entry.found.left_out}/{entry.image_path}"
    detail = f"{entry.found.name} is there, but rows with another folder in place of {entry.found.left_out} name it too"
    return SkippedRow(entry.line, entry.id, entry.source, path, Reason.MISSING_IMAGE, detail)


def _parse(text: bytes) -> Any:
    row = json.loads(text)
    if b"\\ud" in text.lower():
        # Half of a surrogate pair is valid JSON, but cannot be encoded as UTF-8.
        json.dumps(row, ensure_ascii=False).encode()
    return row


def _source_of(image_path: str) -> str:
    """Return the first folder of the path, or ``UNKNOWN_SOURCE``."""
    folder, found, _ = (normalise_path(image_path.replace("\\", "/")) or "").partition("/")
    return folder if found else UNKNOWN_SOURCE
