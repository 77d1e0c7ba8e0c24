"""Conversations that end with a user's question: their messages, their images, and what a judge is told of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_cot_jax.checks import check_text, shown
from llava_cot_jax.errors import UserError
from llava_cot_jax.processing.images import ImageSource
from llava_cot_jax.processing.messages import Message, user_turn

SOURCE_KEYS = ("image", "url", "path")
"""Keys by which a part of a message may hold its image, as in transformers."""

QuestionOrMessages = str | Sequence[Message]
"""A question: its text, or the messages of a conversation, of which the last is the user's."""


@dataclass(frozen=True)
class UserConversation:
    """Conversation that ends with a user's question. ``Processor.prompt`` checks the rest of its messages.

    Attributes:
        messages: Messages, in which an image is ``{"type": "image"}`` alone.
        images: Images in their order.
    """

    messages: list[Message]
    images: list[ImageSource]

    @property
    def question(self) -> str:
        """Text of the user's last message."""
        return _text(self.messages[-1])

    @property
    def told(self) -> str:
        """Question as a judge is told it: after earlier messages, if there are any, each on a line with its role."""
        if len(self.messages) == 1:
            return self.question
        return "\n".join(f"{message['role']}: {_text(message)}" for message in self.messages)

    def asked(self, before: str, after: str) -> list[Message]:
        """Return the messages with texts put before and after that of the last one. Its images keep their places."""
        *earlier, last = self.messages
        parts = _parts(last)
        if not (before or after) or not isinstance(parts, list | tuple):
            return self.messages
        if not any(map(_is_text, parts)):
            parts = [*parts, {"type": "text", "text": ""}]
        parts = list(parts)
        first, *_, final = [i for i, part in enumerate(parts) if _is_text(part)] * 2
        parts[first] = {**parts[first], "text": before + parts[first]["text"]}
        parts[final] = {**parts[final], "text": parts[final]["text"] + after}
        return [*earlier, {**last, "content": parts}]


def read_conversation(question: QuestionOrMessages, images: Sequence[ImageSource] = ()) -> UserConversation:
    """Return the conversation that a question is, whose images are in its messages, or beside them in order.

    Args:
        question: Text, which comes after its images; or messages as transformers takes them. A part of a message that
            is an image has its source by one of ``SOURCE_KEYS``, or none, where the images are given beside.
        images: Images of the text, or of those parts of the messages that have none.

    Raises:
        UserError: There are no messages, the last one is not the user's, or there is not one image for each place.
    """
    if isinstance(question, str):
        check_text("a question", question)
        return UserConversation(user_turn(question, len(images)), list(images))
    if not isinstance(question, list | tuple):
        raise UserError(f"a question is {shown(question)}; it must be a text, or a list of messages")
    if not question:
        raise UserError("there are no messages: the last one must be the user's question")
    beside, found, places = iter(images), [], 0
    messages: list[Message] = []
    for message in question:
        parts = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(parts, list | tuple):
            messages.append(message)
            continue
        kept: list[Any] = []
        for part in parts:
            if not (isinstance(part, Mapping) and part.get("type") == "image"):
                kept.append(part)
                continue
            kept.append({"type": "image"})
            if sources := _sources(part):
                found.append(sources[0])
            else:
                places += 1
                found.extend([image] if (image := next(beside, None)) is not None else [])
        messages.append({**message, "content": kept})
    if places != len(images):
        raise UserError(
            f"the messages have {places} images without a source, and {len(images)} images are given beside them: give "
            f"one for each, or its source in the message ({', '.join(SOURCE_KEYS)})"
        )
    last = messages[-1]
    if isinstance(last, Mapping) and last.get("role") not in (None, "user"):
        raise UserError(f"the last message is of role {shown(last['role'])}: it must be the user's question")
    return UserConversation(messages, found)


def _sources(part: Mapping[str, Any]) -> list[ImageSource]:
    """Return the source of an image in a message, if it has one."""
    if unknown := sorted(map(str, set(part) - {"type", *SOURCE_KEYS})):
        raise UserError(f"an image of a message has the key {unknown[0]}; its source is {', '.join(SOURCE_KEYS)}")
    sources = [part[key] for key in SOURCE_KEYS if key in part]
    if len(sources) > 1:
        raise UserError(f"an image of a message has {len(sources)} sources: give one of {', '.join(SOURCE_KEYS)}")
    if sources and sources[0] is None:
        raise UserError("an image of a message has the source None: leave the key out where the image is given beside")
    return sources


def _parts(message: Any) -> Any:
    """Return the content of a message as parts."""
    content = message.get("content") if isinstance(message, Mapping) else None
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _text(message: Message) -> str:
    """Return the text of a message, with its parts joined."""
    parts = _parts(message)
    return "".join(part["text"] for part in parts if _is_text(part)) if isinstance(parts, list | tuple) else ""
