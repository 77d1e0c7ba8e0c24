"""Questions that ``generate`` is asked, with their images: as arguments, from standard input, or drawn."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llava_cot_jax.checks import shown
from llava_cot_jax.errors import UserError
from llava_cot_jax.paths import as_path, reading_errors

if TYPE_CHECKING:
    from llava_cot_jax.processing.conversation import QuestionOrMessages
    from llava_cot_jax.processing.messages import Message

STDIN = "-"
"""Argument that stands for standard input."""

_LONGEST_NAME = 60
"""Length, in characters, above which a ``data:`` URL is cut as the name of an image."""


@dataclass(frozen=True)
class UserQuestion:
    """A question to answer.

    Attributes:
        question: Text of the question: of a conversation, that of the user's last message.
        images: Names of the images that the question is about.
        sources: The images: paths, ``data:`` URLs, or the bytes of a file.
        right_answer: Right answer, which is known for drawn pictures.
        messages: Messages of a conversation, which ``sources`` are the images of; None where the text is all.
    """

    question: str
    images: list[str] = field(default_factory=list)
    sources: list[str | bytes] = field(default_factory=list)
    right_answer: str | None = None
    messages: list[Message] | None = None

    @property
    def asked(self) -> QuestionOrMessages:
        """Question as the model is asked it: the text, or the messages of the conversation."""
        return self.question if self.messages is None else self.messages

    @property
    def header(self) -> str:
        """The question on one line, with the names of its images, to print before its answer."""
        question = " ".join(self.question.split())
        return f"{question} ({', '.join(self.images)})" if self.images else question


def read_questions(questions: Sequence[str], images: Sequence[str]) -> list[UserQuestion]:
    """Return the questions that the user asks, each with its images.

    Args:
        questions: Texts of the questions; "-" is the text of standard input.
        images: Images: all for one question; or one for all questions, or one for each. "-" is the file in standard
            input.

    Raises:
        UserError: The numbers do not match, standard input is asked for twice or has nothing, or an image is none.
    """
    from llava_cot_jax.processing.images import check_image, is_data_url

    if [*questions, *images].count(STDIN) > 1:
        raise UserError("standard input, -, can be read once: give it for one question or one image")
    if len(questions) > 1 and len(images) not in (0, 1, len(questions)):
        raise UserError(f"{len(images)} images for {len(questions)} questions: give none, one, or one for each")
    sources: list[str | bytes] = [_read_stdin() if image == STDIN else image for image in images]
    for source in sources:
        check_image(source)
    names = [_shortened(image) if is_data_url(image) else image for image in images]
    asked = []
    for i, question in enumerate(questions):
        own = slice(i, i + 1) if len(questions) > 1 and len(images) > 1 else slice(None)
        asked.append(UserQuestion(_text(question), names[own], sources[own]))
    return asked


def read_messages(path: str, images: Sequence[str]) -> UserQuestion:
    """Return the question that a conversation ends with.

    Args:
        path: JSON file with the messages, as transformers takes them; "-" is standard input.
        images: Images of the messages that have no source there, in order; "-" is the file in standard input.

    Raises:
        UserError: The file cannot be read or has no messages, or an image is missing or none.
    """
    from llava_cot_jax.processing.conversation import read_conversation
    from llava_cot_jax.processing.images import check_image, is_data_url

    if [path, *images].count(STDIN) > 1:
        raise UserError("standard input, -, can be read once: give it for the messages or for one image")
    name = "standard input" if path == STDIN else path
    if path == STDIN:
        content = _read_stdin()
    else:
        with reading_errors(as_path(path)):
            content = as_path(path).read_bytes()
    try:
        messages = json.loads(content)
    except (ValueError, RecursionError) as fault:
        raise UserError(f"{name} is not JSON: {' '.join(str(fault).split())}") from None
    try:
        conversation = read_conversation(messages if isinstance(messages, list) else [messages], images)
        for source in conversation.images:
            if not isinstance(source, str):
                raise UserError(f"an image of a message is {shown(source)}; it must be a path or a URL")
    except UserError as fault:
        raise UserError(f"{name}: {fault}") from None
    named = [str(source) for source in conversation.images]
    sources: list[str | bytes] = [_read_stdin() if each == STDIN else each for each in named]
    for source in sources:
        check_image(source)
    names = [_shortened(each) if is_data_url(each) else each for each in named]
    return UserQuestion(conversation.question, names, sources, messages=conversation.messages)


def _shortened(url: str) -> str:
    return url if len(url) <= _LONGEST_NAME else f"{url[:_LONGEST_NAME]}..."


def draw_pictures(folder: str, count: int, seed: int) -> list[UserQuestion]:
    """Draw pictures of coloured shapes into a folder, and return a question about each.

    Raises:
        UserError: ``draw_questions`` refuses an argument, or the folder cannot be written.
    """
    from llava_cot_jax.data.shapes.drawn import draw_questions

    drawn = draw_questions(as_path(folder), count, seed)
    paths = [str(Path(folder) / each.image.name) for each in drawn]
    return [UserQuestion(each.question, [path], [path], each.answer) for each, path in zip(drawn, paths, strict=True)]


def _text(question: str) -> str:
    """Return the text of a question, which standard input has for "-"."""
    if question != STDIN:
        if not question.strip():
            raise UserError("a question is empty: give its text after --question")
        return _typed_text(question)
    try:
        return _read_stdin().decode().strip()
    except UnicodeDecodeError as fault:
        raise UserError(f"the question in standard input is no text in UTF-8: {fault}") from None


def _typed_text(argument: str) -> str:
    """Return an argument that was typed in UTF-8 where Python, by the locale, has taken it for another encoding."""
    try:
        return os.fsencode(argument).decode()
    except UnicodeError:
        return argument


def _read_stdin() -> bytes:
    if sys.stdin is None:  # Python's sign that the process was started without one
        raise UserError("standard input is closed: - stands for what another command writes there")
    try:
        content = sys.stdin.buffer.read()
    except OSError as fault:
        raise UserError(f"standard input cannot be read: {fault.strerror or fault}") from None
    if not content.strip():
        raise UserError("standard input is empty: - stands for what another command writes there")
    return content
