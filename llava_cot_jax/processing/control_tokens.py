"""Control tokens of a tokenizer: those that structure a conversation and are never a part of its text."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CONTROL_TOKEN = re.compile(
    r"<\|(begin_of_text|end_of_text|start_header_id|end_header_id|eom_id|eot_id|step_id|python_tag|image"
    r"|finetune_right_pad(_id)?|reserved_special_token_\d+)\|>"
)
"""Pattern of Llama 3.2's control tokens. A text that spells one would end a message, or stand for an image."""


def control_tokens(tokenizer: PreTrainedTokenizerFast, ids: Collection[int] = ()) -> dict[str, int]:
    """Return the control tokens of a tokenizer with their ids.

    These are Llama 3's own, whichever the tokenizer names as the beginning, the end, padding and unknown, and the added
    tokens among ``ids``. Any other added token, such as ``<SUMMARY>``, is text, even where it is marked as special.

    Args:
        tokenizer: Tokenizer.
        ids: Ids that the model's configuration gives a meaning to, such as those that end an answer.
    """
    named = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    return {
        token: index
        for token, index in tokenizer.get_added_vocab().items()
        if index in ids or token in named or CONTROL_TOKEN.fullmatch(token)
    }
