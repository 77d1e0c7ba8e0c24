"""Messages, and the chat template that writes them."""

from collections.abc import Mapping
from typing import Any

from llava_cot_jax.checks import check_int, check_text

Message = Mapping[str, Any]
"""Message ``{"role": ..., "content": ...}``. Its content is a text, or a list of ``{"type": "image"}`` and
``{"type": "text", "text": ...}``."""

IMAGE_TOKEN = "<|image|>"

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


def user_turn(question: str, images: int = 0) -> list[Message]:
    """Return the messages that ask a question about a number of images, which come before its text.

    Raises:
        UserError: The question is no text, or the number is no whole number of at least 0.
    """
    check_text("question", question)
    check_int("images", images, least=0)
    return [{"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": question}]}]
