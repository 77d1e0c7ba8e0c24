"""Conversion of a row's turns into the tokens that a model trains on.

The image stands in the first user turn. The assistant's answers are trained on, each with the ``<|eot_id|>`` that ends
it. No answer is ever cut.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llava_cot_jax.data.rows import MARKER, Turn
from llava_cot_jax.data.settings import ChatSettings, Variant
from llava_cot_jax.errors import UserError
from llava_cot_jax.processing.messages import Message, user_turn
from llava_cot_jax.processing.processor import Processor, UnfitTemplateError
from llava_cot_jax.stages import STAGES, locate_stages

EOT = "<|eot_id|>"
HEADER = "<|start_header_id|>assistant<|end_header_id|>"
BLANK = "\n\n"

ANSWER = re.compile(re.escape(HEADER + BLANK) + "(.*?)" + re.escape(EOT), re.DOTALL)
"""Pattern of an assistant's turn in Llama 3's chat format. The text of a turn cannot contain a special token."""

NOT_TRAINED, NO_STAGE = -1, 0
"""Marks of characters and tokens that belong to no stage; the stages are numbered from 1."""


class SkippedConversation(Exception):
    """Error for a conversation that cannot be trained on. The message gives the reason."""


@dataclass(frozen=True)
class Conversation:
    """Tokens of a conversation.

    Attributes:
        ids: Token ids, BOS first.
        loss_mask: Whether each token is trained on, that is predicted from those before it, bool [tokens].
        stage: Stage of each trained token, 1 to 4 in the order of ``STAGES``, tags included; 0 for every other token.
            int8 [tokens].
        turns: Number of the row's turns that the tokens include.
    """

    ids: list[int]
    loss_mask: np.ndarray
    stage: np.ndarray
    turns: int


@dataclass(frozen=True)
class Piece:
    """Part of an answer's text, with the number of its stage or ``NO_STAGE``."""

    text: str
    stage: int


class Chat:
    """Encoder of conversations into tokens. It works on the host alone and can be pickled."""

    def __init__(self, processor: Processor, settings: ChatSettings) -> None:
        self._processor = processor
        self._settings = settings
        self._eot = processor.tokenizer.convert_tokens_to_ids(EOT)
        self._second_bos = [processor.config.text.bos_token_id] if settings.upstream_quirks else []

    def encode(self, turns: Sequence[Turn]) -> Conversation:
        """Encode one conversation.

        Raises:
            SkippedConversation: No part of the conversation can be trained on.
            UserError: The checkpoint's chat template is not that of Llama 3.
        """
        answers = self._answers(turns)
        text = self._render(turns, answers)
        ids, start = self._processor.tokenize_with_starts(text)
        count, length = self._fit(ids)
        marks = self._mark(text, answers)
        trained = np.concatenate([np.full(len(self._second_bos), NOT_TRAINED), marks[start]])[:length]
        return Conversation(
            ids=(self._second_bos + ids)[:length],
            loss_mask=trained != NOT_TRAINED,
            stage=np.maximum(trained, 0).astype(np.int8),
            turns=count,
        )

    def lengths(self, conversations: Sequence[Sequence[Turn]]) -> list[int | str]:
        """Return the number of tokens that ``encode`` gives for each conversation, or the reason why it is skipped."""
        texts: list[str | SkippedConversation] = []
        for turns in conversations:
            try:
                texts.append(self._render(turns, self._answers(turns)))
            except SkippedConversation as reason:
                texts.append(reason)
        rendered = [text for text in texts if isinstance(text, str)]
        ids = iter(self._processor.tokenize(rendered))
        found: list[int | str] = []
        for text in texts:
            try:
                found.append(str(text) if isinstance(text, SkippedConversation) else self._fit(next(ids))[1])
            except SkippedConversation as reason:
                found.append(str(reason))
        return found

    def _answers(self, turns: Sequence[Turn]) -> list[list[Piece]]:
        """Return the pieces that the variant keeps of each answer, up to the first answer of which it keeps nothing."""
        found = [_pieces(without_marker(turn.answer), self._settings.variant) for turn in turns]
        count = next((i for i, pieces in enumerate(found) if not _text(pieces)), len(found))
        if not count:
            raise SkippedConversation("nothing is left to train on of its first answer")
        return found[:count]

    def _render(self, turns: Sequence[Turn], answers: list[list[Piece]]) -> str:
        """Write the conversation in the checkpoint's chat format."""
        messages: list[Message] = []
        for i, (turn, pieces) in enumerate(zip(turns, answers, strict=False)):
            messages += user_turn(without_marker(turn.question), images=int(i == 0))
            messages.append({"role": "assistant", "content": _text(pieces)})
        try:
            text = self._processor.prompt(messages, add_generation_prompt=False)
        except UnfitTemplateError:
            raise
        except UserError as mistake:
            raise SkippedConversation(str(mistake)) from mistake
        if ANSWER.findall(text) != [_text(pieces) for pieces in answers]:
            raise UserError(
                f"the checkpoint's chat template does not write an answer as {HEADER}, a blank line, the answer and "
                f"{EOT}: training needs Llama 3's chat format"
            )
        return text

    def _fit(self, ids: list[int]) -> tuple[int, int]:
        """Return how many turns fit into the maximum length, and their number of tokens."""
        # Every message ends with this token, and every second message is an answer.
        ends = np.flatnonzero(np.asarray(ids) == self._eot)[1::2] + 1 + len(self._second_bos)
        count = int(np.searchsorted(ends, self._settings.max_length, side="right"))
        if not count:
            raise SkippedConversation(f"its first answer does not fit into {self._settings.max_length} tokens")
        return count, int(ends[count - 1])

    def _mark(self, text: str, answers: list[list[Piece]]) -> np.ndarray:
        """Mark each character with its stage, ``NO_STAGE`` or ``NOT_TRAINED``, int8 [characters]."""
        marks = np.full(len(text), NOT_TRAINED, np.int8)
        for match, pieces in zip(ANSWER.finditer(text), answers, strict=True):
            position = match.start(1)
            marks[position - len(BLANK) * self._settings.upstream_quirks : match.end()] = NO_STAGE
            for piece in pieces:
                marks[position : position + len(piece.text)] = piece.stage
                position += len(piece.text)
        return marks


def without_marker(text: str) -> str:
    """Return the text without ``<image>`` markers and the space around them."""
    return "\n".join(part for part in map(str.strip, text.split(MARKER)) if part)


def _pieces(answer: str, variant: Variant) -> list[Piece]:
    """Return the pieces of an answer that the variant keeps."""
    stages = [(STAGES.index(name) + 1, stage) for name, stage in locate_stages(answer).items()]
    if not stages:
        return [Piece(answer, NO_STAGE)]
    if variant == "conclusion":
        return [Piece(stage.body, number) for number, stage in stages if STAGES[number - 1] == "CONCLUSION"]
    pieces: list[Piece] = []
    position = 0
    for number, stage in stages:
        if variant == "staged":
            pieces += [Piece(answer[position : stage.start], NO_STAGE), Piece(answer[stage.start : stage.end], number)]
            position = stage.end
        elif stage.body:
            pieces += [Piece(BLANK if pieces else "", NO_STAGE), Piece(stage.body, number)]
    return pieces if variant == "untagged" else [*pieces, Piece(answer[position:], NO_STAGE)]


def _text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)
