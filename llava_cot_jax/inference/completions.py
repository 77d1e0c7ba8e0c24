"""Texts of answers while their tokens come: whole characters, up to a stop string or the end of the answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llava_cot_jax.checks import check_text, shown
from llava_cot_jax.errors import UserError
from llava_cot_jax.processing.processor import Processor

INCOMPLETE = "\ufffd"
"""Character by which a decoder shows bytes that are no whole character, or not yet."""


@dataclass(frozen=True)
class Completion:
    """Answer to a prompt, as far as it is generated.

    Attributes:
        text: Its text, without special tokens, and without the stop string that ended it and what came after. While
            the answer is generated, the text has whole characters only, and no part of what may become a stop string.
        tokens: Ids of all tokens sampled, the one that ended the answer included.
        log_probs: Natural log-probability of each token as the model gives it: before temperature, top_k and top_p.
        ended: Why the answer ended: "eos", "stop", or "max_new_tokens" where it was cut off; "" while it is generated.
    """

    text: str
    tokens: list[int]
    log_probs: list[float]
    ended: str


def check_stop(stop: Any) -> tuple[str, ...]:
    """Return stop strings as a tuple. One alone may be given as a text.

    Raises:
        UserError: They are no texts, or one is empty.
    """
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, list | tuple):
        raise UserError(f"stop is {shown(stop)}; give a text, or a list of texts")
    for string in strings:
        check_text("a stop string", string)
        if not string:
            raise UserError("a stop string is empty; every answer would end at once")
    return tuple(strings)


class GrowingCompletion:
    """Completion whose tokens come piece by piece.

    Args:
        processor: Processor that decodes tokens.
        eos_token_ids: Tokens that end an answer.
        stop: Stop strings.
    """

    def __init__(self, processor: Processor, eos_token_ids: Sequence[int], stop: tuple[str, ...]) -> None:
        self._processor, self._eos, self._stop = processor, eos_token_ids, stop
        self.now = Completion("", [], [], "")

    def extend(self, tokens: np.ndarray, log_probs: np.ndarray, *, is_last: bool) -> None:
        """Append tokens up to the one that ends the answer.

        Args:
            tokens: Ids of the next tokens, int32 [n].
            log_probs: Their log-probabilities, float32 [n].
            is_last: Whether no more tokens may be sampled after these.
        """
        if self.now.ended:
            return
        known = len(self.now.tokens)
        ids = [*self.now.tokens, *tokens.tolist()]
        ends = [i for i in range(known, len(ids)) if ids[i] in self._eos]
        ended = "eos" if ends else "max_new_tokens" if is_last else ""
        ids = ids[: ends[0] + 1] if ends else ids
        text = self._processor.decode(ids)
        if any(string in text for string in self._stop):
            ended, ids, text = "stop", *self._cut(ids, known)
        elif not ended:
            text = self._without_beginning_of_stop(text.rstrip(INCOMPLETE))
        probabilities = [*self.now.log_probs, *log_probs.tolist()][: len(ids)]
        self.now = Completion(text, ids, probabilities, ended)

    def _cut(self, ids: list[int], known: int) -> tuple[list[int], str]:
        """Return the tokens up to the one that completes a stop string, and the text before the string."""
        for count in range(known + 1, len(ids) + 1):
            text = self._processor.decode(ids[:count])
            if found := [text.index(string) for string in self._stop if string in text]:
                return ids[:count], text[: min(found)]
        raise AssertionError("no stop string is in the tokens")

    def _without_beginning_of_stop(self, text: str) -> str:
        """Return ``text`` without the end that a stop string may begin with."""
        longest = max(map(len, self._stop), default=0)
        for start in range(max(len(text) - longest, 0), len(text)):
            if any(string.startswith(text[start:]) for string in self._stop):
                return text[:start]
        return text
