"""From a row's turns to the tokens that a model trains on.

The image stands in the first user turn. Trained are the assistant's answers and the ``<|eot_id|>``
that ends each; nothing is ever cut inside an answer.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llava_cot_jax.data.rows import MARKER, Turn
from llava_cot_jax.data.settings import ChatSettings, Variant
from llava_cot_jax.errors import UserError
from llava_cot_jax.processing.messages import Message, user_turn
from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.stages import STAGES, locate_stages

EOT = "<|eot_id|>"
HEADER = "<|start_header_id|>assistant<|end_header_id|>"
BLANK = "\n\n"

ANSWER = re.compile(re.escape(HEADER + BLANK) + "(.*?)" + re.escape(EOT), re.DOTALL)
"""An assistant's turn in Llama 3's chat format. No text of a turn can spell a special token."""


NOT_TRAINED, NO_STAGE = -1, 0
"""Marks of characters and tokens; the stages are numbered from 1."""


class LeftOut(Exception):
    """A conversation that cannot be trained on; the message says why."""


@dataclass(frozen=True)
class Conversation:
    """The tokens of a conversation.

    Attributes:
        ids: the tokens, BOS first.
        loss_mask: bool [tokens], which of them are trained on (each is predicted from those before).
        stage: int8 [tokens], 1 to 4 for trained tokens of the stages in ``STAGES``, their tags
            included; 0 elsewhere.
        turns: how many of the row's turns are there.
    """

    ids: list[int]
    loss_mask: np.ndarray
    stage: np.ndarray
    turns: int


@dataclass(frozen=True)
class Piece:
    """A stretch of an answer's text, and the number of its stage or NO_STAGE."""

    text: str
    stage: int


class Chat:
    """Turns conversations into tokens. Works on the host alone; can be pickled."""

    def __init__(self, processor: Processor, settings: ChatSettings) -> None:
        self._processor = processor
        self._settings = settings
        self._eot = processor.tokenizer.convert_tokens_to_ids(EOT)
        self._second_bos = [processor.config.text.bos_token_id] if settings.upstream else []

    def encode(self, turns: Sequence[Turn]) -> Conversation:
        """The tokens of one conversation.

        Raises:
            LeftOut: nothing of it can be trained on.
            UserError: the checkpoint's chat template is not Llama 3's.
        """
        answers = self._answers(turns)
        text = self._render(turns, answers)
        encoding = self._processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        count, length = self._fit(encoding["input_ids"])
        marks = self._mark(text, answers)
        start = np.asarray(encoding["offset_mapping"])[:, 0]  # [tokens], in characters
        trained = np.concatenate([np.full(len(self._second_bos), NOT_TRAINED), marks[start]])[:length]
        return Conversation(
            ids=(self._second_bos + encoding["input_ids"])[:length],
            loss_mask=trained != NOT_TRAINED,
            stage=np.maximum(trained, 0).astype(np.int8),
            turns=count,
        )

    def lengths(self, conversations: Sequence[Sequence[Turn]]) -> list[int | str]:
        """For each conversation its number of tokens, as ``encode`` makes them, or why it is left out."""
        texts: list[str | LeftOut] = []
        for turns in conversations:
            try:
                texts.append(self._render(turns, self._answers(turns)))
            except LeftOut as reason:
                texts.append(reason)
        rendered = [text for text in texts if isinstance(text, str)]
        ids = iter(self._processor.tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"])
        found: list[int | str] = []
        for text in texts:
            try:
                found.append(str(text) if isinstance(text, LeftOut) else self._fit(next(ids))[1])
            except LeftOut as reason:
                found.append(str(reason))
        return found

    def _answers(self, turns: Sequence[Turn]) -> list[list[Piece]]:
        """The pieces of each answer that the variant keeps, up to the first of which nothing is left."""
        found = [_pieces(without_marker(turn.answer), self._settings.variant) for turn in turns]
        count = next((i for i, pieces in enumerate(found) if not _text(pieces)), len(found))
        if not count:
            raise LeftOut("of its first answer nothing is left to train on")
        return found[:count]

    def _render(self, turns: Sequence[Turn], answers: list[list[Piece]]) -> str:
        """The conversation in the checkpoint's chat format."""
        messages: list[Message] = []
        for i, (turn, pieces) in enumerate(zip(turns, answers, strict=False)):
            messages += user_turn(without_marker(turn.question), images=int(i == 0))
            messages.append({"role": "assistant", "content": _text(pieces)})
        try:
            text = self._processor.prompt(messages, add_generation_prompt=False)
        except UserError as mistake:
            raise LeftOut(str(mistake)) from mistake
        if ANSWER.findall(text) != [_text(pieces) for pieces in answers]:
            raise UserError(
                f"the checkpoint's chat template does not write an answer as {HEADER}, a blank line, the answer and "
                f"{EOT}: training needs Llama 3's chat format"
            )
        return text

    def _fit(self, ids: list[int]) -> tuple[int, int]:
        """How many turns fit, and how many tokens those are."""
        # Every message ends with the token; each second one is an answer.
        ends = np.flatnonzero(np.asarray(ids) == self._eot)[1::2] + 1 + len(self._second_bos)
        count = int(np.searchsorted(ends, self._settings.max_length, side="right"))
        if not count:
            raise LeftOut(f"its first answer does not fit into {self._settings.max_length} tokens")
        return count, int(ends[count - 1])

    def _mark(self, text: str, answers: list[list[Piece]]) -> np.ndarray:
        """int8 [characters]: NOT_TRAINED, or the stage."""
        marks = np.full(len(text), NOT_TRAINED, np.int8)
        for match, pieces in zip(ANSWER.finditer(text), answers, strict=True):
            position = match.start(1)
            marks[position - len(BLANK) * self._settings.upstream : match.end()] = NO_STAGE
            for piece in pieces:
                marks[position : position + len(piece.text)] = piece.stage
                position += len(piece.text)
        return marks


def without_marker(text: str) -> str:
    """The text without ``<image>`` markers and the space around them."""
    return "\n".join(part for part in map(str.strip, text.split(MARKER)) if part)


def _pieces(answer: str, variant: Variant) -> list[Piece]:
    """What the variant keeps of an answer."""
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
