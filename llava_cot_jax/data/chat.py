"""Conversion of a row's turns into the tokens that a model trains on.

The images of a turn come before the text of its question. The assistant's answers are trained on, each with the
``<|eot_id|>`` that ends it. No answer is ever cut. Of a turn with a ``ProbeTarget`` only the verifier's reply is:

    question and images | answer | end of turn, verifier's question, stem | yes or no
    ------------- not trained --------------------------------------------  target
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llava_cot_jax.data.rows import Turn
from llava_cot_jax.data.settings import ChatSettings, Variant
from llava_cot_jax.errors import UserError
from llava_cot_jax.processing.messages import Message, user_message
from llava_cot_jax.processing.probe import Probe, token_ids
from llava_cot_jax.processing.processor import Processor, UnfitTemplateError
from llava_cot_jax.stage_format import STAGES
from llava_cot_jax.stages import locate_stages

EOT = "<|eot_id|>"
HEADER = "<|start_header_id|>assistant<|end_header_id|>"
BLANK = "\n\n"

ANSWER = re.compile(re.escape(HEADER + BLANK) + "(.*?)" + re.escape(EOT), re.DOTALL)
"""Pattern of an assistant's turn in Llama 3's chat format. The text of a turn cannot contain a control token."""

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
        images: Number of the row's images that the tokens include.
        probe: The verifier's question after the tokens' answer; None where the answer itself is trained.
    """

    ids: list[int]
    loss_mask: np.ndarray
    stage: np.ndarray
    turns: int
    images: int
    probe: "EncodedProbe | None" = None


@dataclass(frozen=True)
class EncodedProbe:
    """Question of the verifier at the end of a conversation's tokens.

    Attributes:
        length: Number of its tokens, from the end of the answer's turn on.
        answers: Tokens that may follow: that the answer is right, and that it is not.
        value: Probability to train of the first of them; the second has the rest.
        weight: Weight of the conversation among all that have a probe.
    """

    length: int
    answers: tuple[int, int]
    value: float
    weight: float


@dataclass(frozen=True)
class ConversationSize:
    """Size of a ``Conversation``.

    Attributes:
        tokens: Number of its tokens.
        images: Number of its images.
        cut_turns: Number of the row's turns that it leaves out.
    """

    tokens: int
    images: int
    cut_turns: int


@dataclass(frozen=True)
class Piece:
    """Part of an answer's text, with the number of its stage or ``NO_STAGE``."""

    text: str
    stage: int


class Chat:
    """Encoder of conversations into tokens. It works on the host alone and can be pickled.

    Raises:
        UserError: The token that ends a turn in Llama 3's chat format does not end an answer of the model.
    """

    def __init__(self, processor: Processor, settings: ChatSettings) -> None:
        self._processor = processor
        self._settings = settings
        self._eot = processor.control_tokens.get(EOT)
        if self._eot not in processor.config.text.eos_token_ids:
            raise UserError(
                f"{EOT} ends no answer of this checkpoint, by its config.json, generation_config.json and tokenizer: "
                "training needs Llama 3's chat format"
            )
        self._image = processor.config.image_token_index
        self._second_bos = [processor.config.text.bos_token_id] if settings.upstream_quirks else []
        self._probes: dict[Probe, tuple[int, tuple[int, int]]] = {}  # number of tokens, and the two answers

    def encode(self, turns: Sequence[Turn]) -> Conversation:
        """Encode one conversation.

        Raises:
            SkippedConversation: No part of the conversation can be trained on.
            UserError: The checkpoint's chat template is not that of Llama 3, or a reply to the verifier's question is
                not one natural next token.
        """
        if turns[0].target:
            return self._encode_probe(turns[0])
        answers = self._answers(turns)
        text = self._render(turns, answers)
        tokens, start = self._processor.tokenize_with_starts(text)
        count, length = self._fit(tokens)
        ids = (self._second_bos + tokens)[:length]
        marks = self._mark(text, answers)
        trained = np.concatenate([np.full(len(self._second_bos), NOT_TRAINED), marks[start]])[:length]
        return Conversation(
            ids=ids,
            loss_mask=trained != NOT_TRAINED,
            stage=np.maximum(trained, 0).astype(np.int8),
            turns=count,
            images=ids.count(self._image),
        )

    def _encode_probe(self, turn: Turn) -> Conversation:
        """Encode a turn, of whose answer the verifier is asked."""
        target = turn.target
        assert target is not None
        (ids,) = self._processor.tokenize([self._render_probe(turn)])
        nothing = np.zeros(len(ids), np.int8)
        probe = EncodedProbe(*self._read_probe(target.probe), target.value, target.weight)
        return Conversation(ids, nothing.astype(bool), nothing, 1, turn.images, probe)

    def _read_probe(self, probe: Probe) -> tuple[int, tuple[int, int]]:
        """Return the number of tokens of what the verifier is asked, and the tokens of the two answers.

        Raises:
            UserError: An answer is not one natural next token.
        """
        if probe not in self._probes:
            yes, no = probe.answer_ids(self._processor)
            self._probes[probe] = len(token_ids(self._processor, probe.text(self._processor))), (yes, no)
        return self._probes[probe]

    def _render_probe(self, turn: Turn) -> str:
        """Write a question, its answer, and what the verifier is asked about it, as the search has them.

        Raises:
            SkippedConversation: One of them cannot be used.
            UserError: The checkpoint's chat template leaves out images, or an answer of the verifier is not one token.
        """
        assert turn.target is not None
        self._read_probe(turn.target.probe)
        self._check_images(turn.images)
        if found := [name for name in self._processor.control_tokens if name in turn.answer]:
            raise SkippedConversation(f"its answer contains the special token {found[0]}")
        self._check_unicode(turn.question + turn.answer)
        try:
            prompt = self._processor.prompt([user_message(turn.question, turn.images)])
        except UnfitTemplateError:
            raise
        except UserError as mistake:
            raise SkippedConversation(str(mistake)) from mistake
        return prompt + turn.answer + turn.target.probe.text(self._processor)

    def sizes(self, conversations: Sequence[Sequence[Turn]]) -> list[ConversationSize | str]:
        """Return the size of what ``encode`` gives for each conversation, or the reason why it is skipped."""
        texts: list[str | SkippedConversation] = []
        for turns in conversations:
            try:
                is_probe = turns[0].target is not None
                texts.append(self._render_probe(turns[0]) if is_probe else self._render(turns, self._answers(turns)))
            except SkippedConversation as reason:
                texts.append(reason)
        rendered = [text for text in texts if isinstance(text, str)]
        ids = iter(self._processor.tokenize(rendered))
        found: list[ConversationSize | str] = []
        for turns, text in zip(conversations, texts, strict=True):
            try:
                found.append(str(text) if isinstance(text, SkippedConversation) else self._size(turns, next(ids)))
            except SkippedConversation as reason:
                found.append(str(reason))
        return found

    def _size(self, turns: Sequence[Turn], ids: list[int]) -> ConversationSize:
        if turns[0].target:
            if len(ids) > self._settings.max_length:
                raise SkippedConversation(
                    f"its answer with the verifier's question does not fit into {self._settings.max_length} tokens"
                )
            return ConversationSize(len(ids), turns[0].images, cut_turns=0)
        count, length = self._fit(ids)
        images = ids[: length - len(self._second_bos)].count(self._image)
        return ConversationSize(length, images, cut_turns=len(turns) - count)

    def _answers(self, turns: Sequence[Turn]) -> list[list[Piece]]:
        """Return the pieces that the variant keeps of each answer, up to the first answer of which it keeps nothing."""
        found = [_pieces(turn.answer.strip(), self._settings.variant) for turn in turns]
        count = next((i for i, pieces in enumerate(found) if not _text(pieces)), len(found))
        if not count:
            raise SkippedConversation("nothing is left to train on of its first answer")
        return found[:count]

    def _render(self, turns: Sequence[Turn], answers: list[list[Piece]]) -> str:
        """Write the conversation in the checkpoint's chat format."""
        kept = turns[: len(answers)]
        self._check_images(sum(turn.images for turn in kept))
        about_images = any(turn.images for turn in kept)
        messages: list[Message] = []
        for turn, pieces in zip(kept, answers, strict=True):
            messages += question_messages(turn, about_images)
            messages.append({"role": "assistant", "content": _text(pieces)})
        self._check_unicode("".join(turn.system + turn.question + turn.answer for turn in kept))
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

    @staticmethod
    def _check_unicode(text: str) -> None:
        """Check that a text has characters alone, and no half of a surrogate pair, which no tokenizer takes.

        Raises:
            SkippedConversation: It has one.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise SkippedConversation("it has half of a surrogate pair, which is no character") from None

    def _check_images(self, count: int) -> None:
        """Check that a conversation has no fewer images and no more than the settings allow.

        Raises:
            SkippedConversation: It has.
        """
        if count > self._settings.max_images:
            raise SkippedConversation(f"it has more than {self._settings.max_images} images (chat.max_images)")
        if not count and not self._settings.text_only:
            raise SkippedConversation("it has no image (chat.text_only is false)")

    def _fit(self, ids: list[int]) -> tuple[int, int]:
        """Return how many turns fit into the maximum length, and their number of tokens."""
        # Every message ends with this token. The last one is an answer, and so is every second one before it; where
        # there is no image, the first one is the system's.
        messages = np.flatnonzero(np.asarray(ids) == self._eot)
        ends = messages[len(messages) % 2 + 1 :: 2] + 1 + len(self._second_bos)
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


def question_messages(turn: Turn, about_images: bool) -> list[Message]:
    """Return the messages of a turn up to its answer.

    Llama 3.2's chat format has no system message beside an image: there, the system's text comes before that of the
    question, in the same message.

    Args:
        turn: Turn of a conversation.
        about_images: Whether any turn of the conversation has an image.
    """
    question, system = turn.question.strip(), turn.system.strip()
    if not system:
        return [user_message(question, turn.images)]
    if about_images:
        return [user_message(f"{system}{BLANK}{question}", turn.images)]
    return [{"role": "system", "content": system}, user_message(question)]


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
