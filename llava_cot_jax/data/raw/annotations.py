"""Annotations of a raw data set: JSON Lines or a JSON array in LLaVA's format, read and checked row by row."""

import hashlib
import json
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from llava_cot_jax.checks import shown
from llava_cot_jax.data.raw.forms import recognise_file
from llava_cot_jax.data.raw.images import Member, RawImages
from llava_cot_jax.data.raw.json_rows import split_rows
from llava_cot_jax.data.raw.names import Found, contradictory_folders, normalise_path
from llava_cot_jax.data.raw.row_parts import conversations_of, paths_of
from llava_cot_jax.data.rows import Turn
from llava_cot_jax.errors import UserError
from llava_cot_jax.processing.control_tokens import CONTROL_TOKEN
from llava_cot_jax.processing.messages import MARKER, remove_markers
from llava_cot_jax.stages import is_staged

SYSTEM, SPEAKERS = "system", ("human", "gpt")

_AFTER_ALL_PATHS = chr(0x10FFFF)
"""Character that begins the name of a file among paths, so that it sorts after each of them."""

_SHOWN_CHARACTERS = 30

UNKNOWN_SOURCE = "(unknown)"
"""Source of a row that has no image, or whose image path does not name a source."""


_IN_PARTS = f": write its parts as one text, with {MARKER} on a line of its own for each image"


class Reason(StrEnum):
    """Reason for which a row is skipped."""

    BROKEN_JSON = "broken JSON"
    NOT_A_ROW = "no conversation"
    NO_IMAGE = "no image"
    BAD_TURNS = "bad turns"
    BAD_TEXT = "bad text"
    MISSING_IMAGE = "missing image"
    BROKEN_IMAGE = "broken image"


class Remark(StrEnum):
    """Remark on a row that is used, which a user may want to look at."""

    MORE_MARKERS = "more markers than images"
    FEWER_MARKERS = "fewer markers than images"
    LATER_MARKERS = "markers in later turns"
    INNER_MARKERS = "markers kept as text"
    SYSTEM_TURN = "system turns"


@dataclass(frozen=True, slots=True)
class AnnotationRow:
    """A row in the right format whose images exist.

    Attributes:
        line: Number of the line in the annotations, or of the element of an array, from 1. It is the key of the
            record, since ids may repeat.
        offset: Offset of the row in the file, in bytes.
        length: Length of the row in the file, in bytes.
        id: Id of the row.
        source: Data set that the first image comes from, or ``UNKNOWN_SOURCE``.
        found: Image files that the paths in the row mean, and how they were found.
        images: Image files that were found.
        unstaged: Number of answers that lack a stage.
        remarks: Remarks on the row.
    """

    line: int
    offset: int
    length: int
    id: str
    source: str
    found: tuple[Found, ...]
    images: tuple[Member, ...]
    unstaged: int
    remarks: tuple[Remark, ...] = ()

    @property
    def image_paths(self) -> tuple[str, ...]:
        """Paths of the images, the same for all spellings of them."""
        return tuple(one.path for one in self.found)


@dataclass(frozen=True, slots=True)
class SkippedRow:
    """A row that is skipped.

    Attributes:
        line: Number of the line in the annotations, from 1.
        id: Id of the row, empty if it has none.
        source: Data set that the first image comes from, or ``UNKNOWN_SOURCE``.
        image: Path of the image at fault, or of the first image in the row; empty if it has none.
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
        return list({image.name: image for entry in self.entries for image in entry.images}.values())


def read_annotations(path: Path, images: RawImages, limit: int | None = None) -> Annotations:
    """Check the format of every row of a file, and find its images. Blank lines are skipped.

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
        if (text := content[begin:end]).strip(b" \t\r\n,"):
            row = _check_row(text, line, begin, images)
            if isinstance(row, AnnotationRow):
                read.entries.append(row)
            else:
                read.skipped.append(row)
    if not read.entries and not read.skipped:
        within = f" in its first {limit} lines" if limit else ""
        raise UserError(f"annotations {path} has no rows{within}: fetch it again, or name another file")
    contradictory = contradictory_folders(one for entry in read.entries for one in entry.found)
    certain: list[AnnotationRow] = []
    uncertain: list[SkippedRow] = []
    for entry in read.entries:
        if unclear := next((one for one in entry.found if one.left_out in contradictory), None):
            uncertain.append(_skip_uncertain(entry, unclear))
        else:
            certain.append(entry)
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
    turns = conversations_of(_parse(file.read(entry.length)))
    return [{key: turn[key] for key in ("from", "value")} for turn in turns]


def _parse(text: bytes) -> Any:
    """Return the content of a row, after which a comma may stand, as between the elements of an array."""
    return json.loads(text.strip().removesuffix(b",").decode("utf-8-sig"))


def make_turns(conversations: Sequence[Mapping[str, Any]], images: int) -> tuple[Turn, ...]:
    """Pair the questions with their answers, and give each question its images.

    A marker at the edge of a question, as ``remove_markers`` finds it, stands for an image before the text of that
    question. Where there are not as many such markers as images, all images come before the first question.

    Args:
        conversations: Turns of LLaVA's format: perhaps one of ``system``, then ``human`` and ``gpt`` in turn.
        images: Number of images of the row.

    Raises:
        ValueError: Human and gpt do not take turns, a text is empty, or a question has no answer.
    """
    if not conversations:
        raise ValueError("there are no turns")
    first = conversations[0]
    begins = int(isinstance(first, Mapping) and first.get("from") == SYSTEM)
    for i, turn in enumerate(conversations):
        expected = SYSTEM if i < begins else SPEAKERS[(i - begins) % 2]
        if not isinstance(turn, Mapping):
            raise ValueError(f"turn {i + 1} is {shown(turn)}, not an object with from and value")
        if missing := [key for key in ("from", "value") if key not in turn]:
            raise ValueError(f"turn {i + 1} has no {' and no '.join(missing)}, only {', '.join(turn) or 'nothing'}")
        speaker, text = turn["from"], turn["value"]
        if speaker != expected:
            raise ValueError(f"turn {i + 1} is from {shown(speaker)}, not from {expected}")
        if not isinstance(text, str):
            raise ValueError(f"turn {i + 1} has {shown(text)} in place of a text{_IN_PARTS * isinstance(text, list)}")
        words = remove_markers(text)[0] if speaker == SPEAKERS[0] else text
        if not (words.strip() or speaker == SYSTEM):
            raise ValueError(f"turn {i + 1} is empty")
    texts = [turn["value"] for turn in conversations]
    questions, answers = [remove_markers(text) for text in texts[begins::2]], texts[begins + 1 :: 2]
    if len(questions) != len(answers) or not answers:
        raise ValueError("the last question has no answer")
    counts = [markers for _, markers in questions]
    if sum(counts) != images:
        counts = [images] + [0] * (len(questions) - 1)
    systems = [*texts[:begins], *[""] * len(questions)]
    return tuple(
        Turn(question, answer, count, system)
        for (question, _), answer, count, system in zip(questions, answers, counts, systems, strict=False)
    )


def _make_remarks(conversations: Sequence[Mapping[str, Any]], images: int) -> Iterator[Remark]:
    """Return the remarks on a row whose turns are right."""
    questions = [remove_markers(turn["value"]) for turn in conversations if turn["from"] == SPEAKERS[0]]
    markers = sum(count for _, count in questions)
    if markers > images:
        yield Remark.MORE_MARKERS
    if 0 < markers < images:
        yield Remark.FEWER_MARKERS
    if any(count for _, count in questions[1:]):
        yield Remark.LATER_MARKERS
    answers = [turn["value"] for turn in conversations if turn["from"] != SPEAKERS[0]]
    if any(MARKER in text for text in (*(question for question, _ in questions), *answers)):
        yield Remark.INNER_MARKERS
    if conversations[0]["from"] == SYSTEM:
        yield Remark.SYSTEM_TURN


def in_validation(image_path: str, share: float) -> bool:
    """Whether rows about an image are for validation. This depends on the image path and the share alone."""
    draw = int.from_bytes(hashlib.sha256(image_path.encode()).digest()[:8])
    return draw < share * 2**64


def link_images(entries: Iterable[AnnotationRow]) -> dict[str, str]:
    """Return one path for each image path, the same for all images that rows have together, directly or over others.

    Rows whose images have the same path there belong in the same split. It is the least of the paths.
    """
    parents: dict[str, str] = {}

    def root(path: str) -> str:
        while (parent := parents.setdefault(path, path)) != path:
            parents[path] = path = parents[parent]
        return path

    def link(path: str, other: str) -> None:
        least, root_of_other = sorted((root(path), root(other)))
        parents[root_of_other] = least

    for entry in entries:
        for one in entry.found:
            link(entry.image_paths[0], one.path)
            link(one.path, f"{_AFTER_ALL_PATHS}{one.name}")  # one file may have several paths
    return {path: root(path) for path in list(parents)}


def _check_row(text: bytes, line: int, offset: int, images: RawImages) -> AnnotationRow | SkippedRow:
    try:
        row = _parse(text)
    except (ValueError, RecursionError) as fault:
        return SkippedRow(line, "", UNKNOWN_SOURCE, "", Reason.BROKEN_JSON, _describe_broken(fault))
    if not isinstance(row, dict):
        detail = _in_unicode(f"it is {shown(row)}, not a JSON object")
        return SkippedRow(line, "", UNKNOWN_SOURCE, "", Reason.NOT_A_ROW, detail)
    id = "" if row.get("id") is None else _in_unicode(str(row["id"]))
    paths, fault_of_images = _try_paths(row)
    first = _in_unicode(paths[0]) if paths else ""
    source = _source_of(first)

    def skip(reason: Reason, detail: str = "", path: str = first) -> SkippedRow:
        return SkippedRow(line, id, source, path, reason, detail)

    try:
        conversations = conversations_of(row)
    except ValueError as fault:
        return skip(Reason.NOT_A_ROW, _in_unicode(str(fault)))
    if fault_of_images:
        return skip(Reason.NO_IMAGE, _in_unicode(fault_of_images))
    try:
        turns = make_turns(conversations, len(paths))
    except ValueError as fault:
        return skip(Reason.BAD_TURNS, _in_unicode(str(fault)))
    remarks = tuple(_make_remarks(conversations, len(paths)))
    if not paths and Remark.MORE_MARKERS in remarks:
        return skip(Reason.NO_IMAGE, f"a question has the marker {MARKER}, but the row has no image")
    if fault_of_text := _fault_of_text(row, conversations):
        return skip(Reason.BAD_TEXT, fault_of_text)
    found: list[Found] = []
    members: list[Member] = []
    for path in paths:
        file = images.find(path)
        member = images.member(file.name) if file else None
        if file is None or member is None:
            return skip(Reason.MISSING_IMAGE, images.explain(path), path)
        found.append(file)
        members.append(member)
    source = _source_of(found[0].path if found else "")
    unstaged = sum(not is_staged(turn.answer) for turn in turns)
    return AnnotationRow(line, offset, len(text), id, source, tuple(found), tuple(members), unstaged, remarks)


def _skip_uncertain(entry: AnnotationRow, found: Found) -> SkippedRow:
    path = f"{found.left_out}/{found.path}"
    detail = f"{found.name} is there, but rows with another folder in place of {found.left_out} name it too"
    return SkippedRow(entry.line, entry.id, entry.source, path, Reason.MISSING_IMAGE, detail)


def _try_paths(row: Mapping[str, Any]) -> tuple[list[str], str]:
    """Return the paths of a row's images, and what is wrong with them, or nothing."""
    try:
        return paths_of(row), ""
    except ValueError as fault:
        return [], str(fault)


def _describe_broken(fault: Exception) -> str:
    """Return why a text is no JSON, with the text at which that was found."""
    if isinstance(fault, UnicodeDecodeError):
        return f"byte {fault.start + 1} of it, {fault.object[fault.start]:#04x}, is not UTF-8"
    if not isinstance(fault, json.JSONDecodeError):
        return str(fault)
    there = _in_unicode(fault.doc[fault.pos : fault.pos + _SHOWN_CHARACTERS])
    place = f"at character {fault.pos + 1}: {there!r}" if there else "at its end"
    return f"{fault.msg.removesuffix(' at')}, {place}"


def _fault_of_text(row: Mapping[str, Any], conversations: Sequence[Mapping[str, Any]]) -> str:
    """Return what in a row's texts cannot be written in tokens, or nothing."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "it has half of a surrogate pair, which is no character"
    for i, turn in enumerate(conversations, 1):
        if found := CONTROL_TOKEN.search(turn["value"]):
            return f"turn {i} spells the control token {found.group()}"
    return ""


def _in_unicode(text: str) -> str:
    """Return a text in which a question mark stands for each half of a surrogate pair."""
    return text.encode(errors="replace").decode()


def _source_of(image_path: str) -> str:
    """Return the first folder of the path, or ``UNKNOWN_SOURCE``."""
    folder, found, _ = (normalise_path(image_path.replace("\\", "/")) or "").partition("/")
    return folder if found else UNKNOWN_SOURCE
