"""Rows of questions with standard answers, and the rows of LLaVA-CoT-100k's form that are made of them."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_cot_jax.checks import check_number, check_text, shown
from llava_cot_jax.data.raw.images import ImageFolder, Member, RawImages
from llava_cot_jax.data.raw.names import Found, contradictory_folders, normalise_path
from llava_cot_jax.data.raw.row_parts import IMAGE_KEYS, paths_of
from llava_cot_jax.errors import UserError
from llava_cot_jax.processing.control_tokens import CONTROL_TOKEN
from llava_cot_jax.processing.messages import MARKER, remove_markers
from llava_cot_jax.question_files import json_lines

_ONE = ("question", "answer", "hint")
_SEVERAL = ("questions", "answers", "hints")
_ROW_KEYS = ("id", *IMAGE_KEYS, *_ONE, *_SEVERAL)

StandardAnswer = str | int | float
"""Answer that is known to be right."""


@dataclass(frozen=True)
class TurnToAnnotate:
    """Question whose standard answer is known.

    Attributes:
        question: Text of the question, as the row has it.
        answers: Standard answers, any of which will do.
        hint: Words that help to answer it; empty where there are none.
    """

    question: str
    answers: tuple[StandardAnswer, ...]
    hint: str = ""


@dataclass(frozen=True)
class NamedImage:
    """Image of a row.

    Attributes:
        path: Path in the row.
        name: Name of the file among the images.
        size: Size of the file in bytes.
        checksum: CRC-32 of the file's content.
    """

    path: str
    name: str
    size: int
    checksum: int

    @property
    def identity(self) -> tuple[str, int, int]:
        """Name, size and checksum, which are other ones for another image."""
        return self.name, self.size, self.checksum


@dataclass(frozen=True)
class RowToAnnotate:
    """Row of questions about the same images, each after the answer to the one before.

    Attributes:
        id: Text or whole number that tells it from all others.
        images: Its images, which come before the first question.
        turns: The questions, at least one.
        fault: Reason why it cannot be asked, such as a missing image; empty where there is none.
    """

    id: str | int
    images: tuple[NamedImage, ...]
    turns: tuple[TurnToAnnotate, ...]
    fault: str = ""

    def asked(self, turn: int) -> str:
        """Return the text of a question without the markers that stand for images."""
        question = self.turns[turn].question
        return remove_markers(question)[0] if self.images else question

    def annotated(self, kept: Mapping[int, str]) -> dict[str, Any]:
        """Return the row that ``prepare`` reads.

        Args:
            kept: Answers of the turns that were not rejected, by their index.
        """
        paths = [image.path for image in self.images]
        images: dict[str, Any] = {"image": paths[0] if len(paths) == 1 else paths} if paths else {}
        conversations: list[dict[str, str]] = []
        for turn, answer in sorted(kept.items()):
            conversations += [
                {"from": "human", "value": self.turns[turn].question},
                {"from": "gpt", "value": answer},
            ]
        return {"id": self.id, **images, "conversations": conversations}


def read_rows_to_annotate(path: Path, content: bytes, images: RawImages, root: Path) -> list[RowToAnnotate]:
    """Read a JSONL file of rows.

    Args:
        path: Path of the file, for messages.
        content: Content of the file.
        images: Images that the rows name.
        root: Folder or archive of the images.

    Raises:
        UserError: A line is no such row, two rows have the same id, a path leads out of the images, or no image that
            the rows name is there.
    """
    rows: dict[str | int, RowToAnnotate] = {}
    found: dict[str | int, list[Found]] = {}
    for place, content_of_row in json_lines(path, content):
        try:
            row, found_of_row = _read_row(content_of_row, images, root)
        except ValueError as fault:
            raise UserError(f"{place}: {fault}") from None
        if row.id in rows:
            raise UserError(f"{place} has the id {shown(row.id)} of an earlier line: give each row an id of its own")
        rows[row.id], found[row.id] = row, found_of_row
    contradictory = contradictory_folders(one for several in found.values() for one in several)
    for identifier, several in found.items():
        if unclear := next((one for one in several if one.left_out in contradictory), None):
            why = f"{unclear.name} is there, but rows with another folder in place of {unclear.left_out} name it too"
            rows[identifier] = replace(rows[identifier], images=(), fault=why)
    if not rows:
        raise UserError(f"{path} has no rows: give one JSON object with id, image, question and answer on each line")
    missing = [row for row in rows.values() if row.fault]
    if len(missing) == len(rows):
        raise UserError(f"{path}: no row has its image in {root}; row {shown(missing[0].id)}: {missing[0].fault}")
    return list(rows.values())


def _read_row(row: Mapping[str, Any], images: RawImages, root: Path) -> tuple[RowToAnnotate, list[Found]]:
    """Return a row, and how its images were found.

    Raises:
        ValueError: A key or a value is not what it must be, or an image is none of ``images``.
    """
    if unknown := [key for key in row if key not in _ROW_KEYS]:
        raise ValueError(f"it has the key {shown(unknown[0])}; the keys of a row are {', '.join(_ROW_KEYS)}")
    identifier = row.get("id")
    if isinstance(identifier, bool) or not isinstance(identifier, str | int):
        raise ValueError(f"id is {shown(identifier)}; it must be a text or a whole number")
    check_text("id", str(identifier))
    turns = _read_turns(row)
    paths = paths_of(row)
    if not paths and any(remove_markers(turn.question)[1] for turn in turns):
        raise ValueError(f"a question has the marker {MARKER}, but the row has no image: name it, or remove the marker")
    named: list[NamedImage] = []
    found: list[Found] = []
    for path in paths:
        one = images.find(path)
        member = images.member(one.name) if one else None
        if one is None or member is None:
            if normalise_path(path) is None:
                raise ValueError(_outside(path, root))
            return RowToAnnotate(identifier, (), turns, f"image {path}: {images.explain(path)}"), []
        if root.is_dir() and not (root / one.name).resolve().is_relative_to(root.resolve()):  # by a link
            raise ValueError(_outside(path, root))
        try:
            checksum = _checksum(images, member)
        except UserError as fault:
            return RowToAnnotate(identifier, (), turns, f"image {path}: {fault}"), []
        named.append(NamedImage(path, member.name, member.size, checksum))
        found.append(one)
    return RowToAnnotate(identifier, tuple(named), turns), found


def _checksum(images: RawImages, member: Member) -> int:
    """Return the CRC-32 of an image, which a zip knows.

    Raises:
        UserError: It cannot be read.
    """
    return zlib.crc32(images.read(member.name)) if isinstance(images, ImageFolder) else member.version


def _outside(path: str, root: Path) -> str:
    return f"image {shown(path)} leads out of {root}: put the image there, and name it by its path in there"


def _read_turns(row: Mapping[str, Any]) -> tuple[TurnToAnnotate, ...]:
    one, several = [[key for key in keys if row.get(key) is not None] for keys in (_ONE, _SEVERAL)]
    if one and several:
        raise ValueError(f"it has {one[0]} and {several[0]}: give question and answer, or lists of both")
    if not several:
        return (_read_turn(row.get("question"), row.get("answer"), row.get("hint")),)
    questions, answers = row.get("questions"), row.get("answers")
    hints = row.get("hints")
    if hints is None and isinstance(questions, list):
        hints = [None] * len(questions)
    if not all(isinstance(given, list) for given in (questions, answers, hints)) or not questions:
        raise ValueError("questions and answers must be lists of the same length, and so must hints, if there are any")
    if not len(questions) == len(answers or ()) == len(hints or ()):
        raise ValueError(
            f"it has {len(questions)} questions, {len(answers or ())} answers and {len(hints or ())} hints: give one "
            "of each for every turn, and null where there is no hint"
        )
    return tuple(_read_turn(*turn) for turn in zip(questions, answers or (), hints or (), strict=True))


def _read_turn(question: Any, answer: Any, hint: Any) -> TurnToAnnotate:
    answers = answer if isinstance(answer, list) else [] if answer is None else [answer]
    if not answers:
        raise ValueError("a question has no standard answer: give a text, a number, or a list of these")
    for each in answers:
        if isinstance(each, bool) or not isinstance(each, str | int | float):
            raise ValueError(f"an answer is {shown(each)}; it must be a text or a number, or a list of these")
        if not isinstance(each, str):
            check_number("an answer", each)
    hint = "" if hint is None else hint
    for name, text in (("a question", question), ("a hint", hint), *(("an answer", str(each)) for each in answers)):
        check_text(name, text)
        if not text.strip() and name != "a hint":
            raise ValueError(f"{name} is empty: give a text")
        if token := CONTROL_TOKEN.search(text):
            raise ValueError(f"{name} spells the control token {token[0]}, which no conversation may have")
    if not remove_markers(question)[0].strip():
        raise ValueError("a question has markers of images and no words")
    return TurnToAnnotate(question, tuple(answers), hint)
