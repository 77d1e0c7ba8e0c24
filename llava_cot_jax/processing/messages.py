"""Messages, and the chat template that writes them."""

import re
from collections.abc import Mapping
from typing import Any

from llava_cot_jax.checks import check_int, check_text

Message = Mapping[str, Any]
"""Message ``{"role": ..., "content": ...}``. Its content is a text, or a list of ``{"type": "image"}`` and
``{"type": "text", "text": ...}``."""

IMAGE_TOKEN = "<|image|>"

MARKER = "<image>"
"""Marker that LLaVA's data sets, and many users, write for an image at an edge of a question."""

_LEADING_RUN = re.compile(rf"(?:\s*{MARKER})+\s*")
_TRAILING_RUN = re.compile(rf"(?:\s*{MARKER[::-1]})+\s*")
"""Pattern of the last markers of a text, for the text read backwards, where a match is found in linear time."""

PROMPT_DATE = "26 Jul 2024"
"""Date that a prompt without an image names. It is fixed, so that answers do not change from day to day."""

CHAT_TEMPLATE = r"""
{%- macro body(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {{- '<|image|>' if part.type == 'image' else part.text -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- macro turn(role, text) -%}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' + text + '<|eot_id|>' -}}
{%- endmacro -%}
{%- set seen = namespace(image=false) -%}
{%- for message in messages if message.content is not string -%}
    {%- for part in message.content if part.type == 'image' -%}
        {%- set seen.image = true -%}
    {%- endfor -%}
{%- endfor -%}
{%- set system = body(messages[0].content) | trim if messages[0].role == 'system' else '' -%}
{%- if seen.image and system -%}
    {{- raise_exception('a system message cannot go with an image; put its text into the user message') -}}
{%- endif -%}
{{- bos_token -}}
{%- if not seen.image -%}
    {%- set date = date_string if date_string is defined else 'PROMPT_DATE' -%}
    {{- turn('system', 'Cutting Knowledge Date: December 2023\nToday Date: ' + date + '\n\n' + system) -}}
{%- endif -%}
{%- for message in (messages[1:] if messages[0].role == 'system' else messages) -%}
    {{- turn(message.role, body(message.content)) -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{%- endif -%}
""".replace("PROMPT_DATE", PROMPT_DATE)
"""Llama 3.2's chat template, for checkpoints without one, such as the base models."""


def remove_markers(question: str) -> tuple[str, int]:
    """Return a question without the ``<image>`` markers at its edges, and their number.

    Markers at the beginning or end stand for images if a line break is among them or between them and the text, or if
    the question has no other markers. They go with the white space around them. Every other marker is a word of the
    text and stays, as both in ``What differs between <image> and <image>``.
    """
    text, total, removed = question, question.count(MARKER), 0
    if run := _LEADING_RUN.match(text):
        count = run.group().count(MARKER)
        if "\n" in run.group().lstrip() or count == total:
            text, removed = text[run.end() :], count
    if run := _TRAILING_RUN.match(text[::-1]):
        count = run.group().count(MARKER[::-1])
        if "\n" in run.group().lstrip() or count == total:
            text, removed = text[: len(text) - run.end()], removed + count
    return text, removed


def user_message(text: str, images: int = 0) -> Message:
    """Return the message of a user whose text, taken as it is, comes after a number of images."""
    return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def user_turn(question: str, images: int = 0) -> list[Message]:
    """Return the messages that ask a question about a number of images, which come before its text.

    The text is what ``question_text`` gives.

    Raises:
        UserError: The question is no text, or the number is no whole number of at least 0.
    """
    check_text("question", question)
    check_int("images", images, least=0)
    return [user_message(question_text(question, images), images)]


def question_text(question: str, images: int) -> str:
    """Return the text of a question about a number of images, without markers that stand for images.

    ``remove_markers`` removes them, as it does where rows are prepared to train on. Without images, every marker is a
    word of the text.
    """
    return remove_markers(question)[0] if images else question
