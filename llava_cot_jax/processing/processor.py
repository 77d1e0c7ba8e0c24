"""The processor: messages and images become arrays for the model, and tokens become text."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, chain, groupby, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np

from llava_cot_jax.checks import check_instance, check_int, check_text, shown
from llava_cot_jax.errors import UserError
from llava_cot_jax.files import copy_file, read_json
from llava_cot_jax.model.checkpoint.auxiliary_files import expected_image_settings
from llava_cot_jax.model.checkpoint.folder import find_checkpoint
from llava_cot_jax.model.config import EXTRA_EMBEDDINGS, MllamaConfig, VisionConfig, image_settings
from llava_cot_jax.paths import files_in, is_remote, reading_errors
from llava_cot_jax.processing.control_tokens import control_tokens
from llava_cot_jax.processing.images import ImageSource, batch_images, check_vision
from llava_cot_jax.processing.messages import CHAT_TEMPLATE, IMAGE_TOKEN, PROMPT_DATE, Message, user_turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_CONFIG_NEEDED = "give the MllamaConfig of the model"
"""Remedy for a configuration of another type."""

_LOG = logging.getLogger(__name__)

_BEFORE_SPACE = re.compile(r"(?<=<\|end_header_id\|>\n\n)(?=\s)")
"""Pattern of the places after a header where a text begins with space, with which a blank line could merge."""


class UnfitTemplateError(UserError):
    """Error of a chat template that leaves out images, whatever the messages are."""


class Processor:
    """Turns prompts and images into the inputs of ``Mllama``. It uses the host only, and can be pickled.

    Attributes:
        config: Configuration of the model.
        tokenizer: Fast tokenizer of the checkpoint.
        control_tokens: Ids of the tokens that are hidden in an answer and refused in a text, by their names.

    Raises:
        UserError: The tokenizer and the configuration do not belong to the same model.
    """

    def __init__(self, config: MllamaConfig, tokenizer: PreTrainedTokenizerFast) -> None:
        check_instance("config", config, MllamaConfig, _CONFIG_NEEDED)
        if not hasattr(tokenizer, "get_added_vocab"):
            raise UserError(f"tokenizer is {shown(tokenizer)}; give a fast tokenizer, or use Processor.from_pretrained")
        image_id = tokenizer.get_added_vocab().get(IMAGE_TOKEN)
        if image_id != config.image_token_index:
            raise UserError(
                f"the tokenizer's {IMAGE_TOKEN} is {image_id}, but image_token_index of config.json is "
                f"{config.image_token_index}: take both files from one checkpoint"
            )
        if tokenizer.bos_token_id != config.text.bos_token_id:
            raise UserError(
                f"the tokenizer's bos_token is {tokenizer.bos_token} ({tokenizer.bos_token_id}), but bos_token_id of "
                f"config.json is {config.text.bos_token_id}: take both files from one checkpoint"
            )
        check_vision(config.vision)
        self.config = config
        self.tokenizer = tokenizer
        text = config.text
        ids = (text.bos_token_id, *text.eos_token_ids, text.pad_token_id, config.image_token_index)
        self.control_tokens = control_tokens(tokenizer, ids)
        self._added = {index: token for token, index in tokenizer.get_added_vocab().items()}
        self._special = re.compile("|".join(map(re.escape, self.control_tokens)))
        _check_table(config, tokenizer, self.control_tokens)

    @classmethod
    def from_pretrained(cls, path: str | Path, config: MllamaConfig | None = None) -> Self:
        """Read the tokenizer, chat template and image settings of a checkpoint.

        Args:
            path: Folder of the checkpoint, on a disk or in a bucket, or its id on the hub, or ``"shapes"``.
            config: Configuration of the model, such as ``Mllama.config``. None reads it from the checkpoint.

        Raises:
            UserError: A file is missing or damaged, or two of them contradict each other, or the chat template can
                write no question.
        """
        if config is not None:
            check_instance("config", config, MllamaConfig, _CONFIG_NEEDED)
        folder = find_checkpoint(path, weights=False)
        if config is None:
            config = MllamaConfig.from_pretrained(folder)
        _check_image_settings(folder, config.vision)
        processor = cls(config, _load_tokenizer(folder))
        processor._check_template(folder)
        return processor

    def prompt(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Return messages in the checkpoint's chat format, beginning with one BOS.

        A text that contains a control token (``<|eot_id|>``, ``<|image|>``) is refused, because it would end the
        message or stand for an image that does not exist. Any other added token, such as ``<SUMMARY>``, is text.

        Args:
            messages: The conversation, each message as ``Message`` describes.
            add_generation_prompt: Whether the prompt ends with the header of the assistant's answer.

        Raises:
            UserError: A message is malformed, a text contains a control token, or the checkpoint's template refuses the
                messages (the published one refuses a system message beside an image) or leaves out an image.
        """
        if not isinstance(messages, list | tuple):
            raise UserError(f"messages is {shown(messages)}; give a list of messages, such as user_turn returns")
        if not messages:
            raise UserError("there are no messages to make a prompt of")
        checked = [self._checked(message) for message in messages]
        try:
            rendered = self.tokenizer.apply_chat_template(
                checked,
                chat_template=None if self.tokenizer.chat_template else CHAT_TEMPLATE,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                date_string=PROMPT_DATE,
            )
        except Exception as fault:  # a template may do anything, such as to join a text and a list
            raise UserError(f"the chat template refuses the messages: {' '.join(str(fault).split())}") from fault
        text, bos = cast(str, rendered), self.tokenizer.bos_token
        images = sum(part["type"] == "image" for each in checked for part in each["content"] if isinstance(part, dict))
        if text.count(IMAGE_TOKEN) != images:
            raise UnfitTemplateError(
                f"the chat template writes {text.count(IMAGE_TOKEN)} {IMAGE_TOKEN} for {images} images: it is not for "
                "this model; take the one of Llama-3.2-Vision, or remove it, and the one of this package is used"
            )
        return text if text.startswith(bos) else bos + text

    def __call__(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[ImageSource]] | None = None,
        *,
        length: int | None = None,
    ) -> dict[str, np.ndarray]:
        """Return a batch for the model, with the names that a transformers processor uses.

        Args:
            prompts: Prompts that ``prompt`` returned, perhaps followed by the beginning of an answer. Special tokens in
                them count, and no BOS is added.
            images: Images of each prompt, one for each ``<|image|>`` in it. None if no prompt has an image.
            length: Number of tokens to pad every sequence to. None takes that of the longest sequence.

        Returns:
            ``input_ids`` and ``attention_mask``, int32 [batch, tokens], padded on the right. If there is any image,
            also ``pixel_values`` uint8 [batch, images, tiles, channels, size, size], ``aspect_ratio_ids`` int32
            [batch, images], ``aspect_ratio_mask`` int32 [batch, images, tiles] and ``cross_attention_mask`` int32
            [batch, tokens, images, tiles].

        Raises:
            UserError: Prompts and images do not match, a prompt is longer than ``length``, or ``open_image`` refuses an
                image.
        """
        if not isinstance(prompts, list | tuple) or not prompts:
            raise UserError("prompts must be a list of at least one string")
        for i, prompt in enumerate(prompts):
            check_text(f"prompt {i}", prompt)
        if images is not None and not isinstance(images, list | tuple):
            raise UserError(f"images is {shown(images)}; give a list with a list of images for each prompt")
        if length is not None:
            check_int("length", length)
        sequences = self.tokenize(prompts)
        return self.collate(sequences, [[] for _ in sequences] if images is None else images, length=length)

    def tokenize(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each prompt.

        Special tokens count, and no BOS is added. The blank line that ends a header is encoded apart from the text
        after it, as Meta's own chat format does: otherwise it would merge with line breaks that the text begins with.
        """
        pieces = [_BEFORE_SPACE.split(prompt) for prompt in prompts]
        encoded = iter(self._encode([piece for each in pieces for piece in each])["input_ids"] if pieces else ())
        return [list(chain.from_iterable(islice(encoded, len(each)))) for each in pieces]

    def tokenize_with_starts(self, prompt: str) -> tuple[list[int], list[int]]:
        """Return the token ids of a prompt, as ``tokenize`` does, and where each token starts in it, in characters."""
        pieces = _BEFORE_SPACE.split(prompt)
        encoded = self._encode(pieces, return_offsets_mapping=True)
        before = accumulate(map(len, pieces), initial=0)
        offsets = zip(before, encoded["offset_mapping"], strict=False)  # ``before`` has the whole length too
        starts = [place + start for place, each in offsets for start, _ in each]
        return list(chain.from_iterable(encoded["input_ids"])), starts

    def _encode(self, texts: list[str], **more: bool) -> Any:
        return self.tokenizer(texts, add_special_tokens=False, padding=False, truncation=False, verbose=False, **more)

    def collate(
        self,
        sequences: Sequence[list[int]],
        images: Sequence[Sequence[ImageSource]],
        *,
        length: int | None = None,
        num_images: int | None = None,
    ) -> dict[str, np.ndarray]:
        """Return the batch that ``__call__`` returns, from prompts that are tokenized already.

        Args:
            sequences: Token ids of each prompt.
            images: Images of each prompt, one for each ``<|image|>`` in it.
            length: Number of tokens to pad every sequence to. None takes that of the longest sequence.
            num_images: Number of images to pad every sequence to. None takes that of the sequence with the most.

        Raises:
            UserError: The same as for ``__call__``.
        """
        self._check_images(sequences, images)
        length = max(map(len, sequences)) if length is None else length
        inputs = self._pad(sequences, length)
        image_inputs = batch_images(images, self.config.vision, num_images)
        if image_inputs:
            padded_images = image_inputs["aspect_ratio_ids"].shape[1]
            visible = _visible_images(sequences, self.config.image_token_index, padded_images, length)
            inputs["cross_attention_mask"] = visible[..., None] * image_inputs["aspect_ratio_mask"][:, None]
        return inputs | image_inputs

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of token ids [tokens] without control tokens, and otherwise unchanged.

        Raises:
            UserError: The ids are no list of whole numbers, or the model has no such id.
        """
        array = np.asarray(ids)
        if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
            raise UserError(f"ids is {shown(ids)}; give the token ids of one text as a list of whole numbers")
        hidden = set(self.control_tokens.values())
        tokens = [token for token in array.astype(int).tolist() if token not in hidden]
        rows = self.config.text.vocab_size + EXTRA_EMBEDDINGS
        if wrong := [token for token in tokens if not 0 <= token < rows]:
            raise UserError(f"{wrong[0]} is not the id of a token: this model has the ids 0 to {rows - 1}")
        # Added tokens are set apart, as transformers takes their characters for those of a byte-level vocabulary.
        return "".join(
            "".join(map(self._added.__getitem__, run)) if added else self._decode_plain(list(run))
            for added, run in groupby(tokens, self._added.__contains__)
        )

    def _decode_plain(self, tokens: list[int]) -> str:
        return cast(str, self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False))

    def _check_template(self, folder: Path) -> None:
        """Say what the chat template of a checkpoint cannot write, before any weights are loaded.

        Raises:
            UserError: It can write neither a question about an image nor one without.
        """
        if not self.tokenizer.chat_template:
            _LOG.warning("%s has no chat template: that of Llama 3.2 is used", folder)
            return
        faults = []
        for images in (1, 0):
            try:
                self.prompt(user_turn("?", images))
            except UserError as fault:
                faults.append(f"{folder}: {fault}")
        if len(faults) == 2:
            raise UserError(faults[0])
        for said in faults:
            _LOG.warning("%s", said)

    def _checked(self, message: Message) -> dict[str, Any]:
        """Check a message. If it has no image, return its content as one string, which every template accepts."""
        if not isinstance(message, Mapping):
            raise UserError(f'a message must be a mapping with "role" and "content"; one is {shown(message)}')
        if set(message) != {"role", "content"} or not isinstance(message["role"], str):
            raise UserError(
                f'a message must have "role", which is a text, and "content", and nothing else; one has '
                f"{sorted(map(str, message))}"
            )
        role, content = message["role"], message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list | tuple):
            raise UserError(
                f"the content of a {role} message must be a text or a list of parts; it is {shown(content)}"
            )
        # The parts are joined, because two of them could spell a token together. A line break stands for an image.
        text = "".join("\n" if _is_image(part, role) else part["text"] for part in parts)
        check_text(f"the text of a {role} message", text)
        if found := self._special.search(role + "\n" + text):
            raise UserError(
                f"the text of a message contains the special token {found.group()}: remove it; "
                'an image is given as {"type": "image"}'
            )
        return {"role": role, "content": parts if any(_is_image(part, role) for part in parts) else text}

    def _check_images(self, sequences: Sequence[list[int]], images: Sequence[Sequence[ImageSource]]) -> None:
        """Check that each sequence has as many image tokens as images."""
        if len(images) != len(sequences):
            raise UserError(
                f"there are {len(sequences)} prompts, but images for {len(images)}: give a list of images for each"
            )
        for i, (ids, sources) in enumerate(zip(sequences, images, strict=True)):
            if not isinstance(sources, list | tuple):
                raise UserError(f"the images of prompt {i} must be a list, even if there is only one")
            tokens = ids.count(self.config.image_token_index)
            if tokens != len(sources):
                raise UserError(f"prompt {i} has {tokens} {IMAGE_TOKEN} for {len(sources)} images; one each is needed")

    def _pad(self, sequences: Sequence[list[int]], length: int) -> dict[str, np.ndarray]:
        """Return ``input_ids`` and ``attention_mask`` of sequences padded on the right."""
        ids = np.full((len(sequences), length), self.config.text.pad_token_id, np.int32)
        mask = np.zeros_like(ids)
        for i, sequence in enumerate(sequences):
            if len(sequence) > length:
                raise UserError(
                    f"prompt {i} has {len(sequence)} tokens, more than {length}: shorten it or raise the length"
                )
            ids[i, : len(sequence)] = sequence
            mask[i, : len(sequence)] = 1
        return {"input_ids": ids, "attention_mask": mask}


def _visible_images(sequences: Sequence[list[int]], image_token: int, num_images: int, length: int) -> np.ndarray:
    """Return which images each token sees, int32 [batch, length, num_images].

    A token sees an image from the image's own token on, until the next image. Images whose tokens follow one another
    are seen together, until the image after them or the end of the sequence.
    """
    visible = np.zeros((len(sequences), length, num_images), np.int32)
    for i, ids in enumerate(sequences):
        stop = following = len(ids)
        positions = [position for position, token in enumerate(ids) if token == image_token]
        for image, position in reversed(list(enumerate(positions))):
            if position + 1 < following:
                stop = following
            visible[i, position:stop, image] = 1
            following = position
    return visible


def _check_table(config: MllamaConfig, tokenizer: PreTrainedTokenizerFast, control: Mapping[str, int]) -> None:
    """Check that the model has a row for every entry of the tokenizer.

    Control tokens are never trained on, so that a row of the embedding suffices for them. Others need one of lm_head.

    Raises:
        UserError: The model lacks a row. Without this check, the entry would act as the last one.
    """
    vocab, rows = config.text.vocab_size, config.text.vocab_size + EXTRA_EMBEDDINGS
    if not 0 <= config.text.pad_token_id < rows:
        raise UserError(
            f"pad_token_id of config.json is {config.text.pad_token_id}, but the embedding has the rows 0 to {rows - 1}"
        )
    beyond = [(i, token) for token, i in tokenizer.get_vocab().items() if i >= (rows if token in control else vocab)]
    if beyond:
        index, token = min(beyond)
        raise UserError(
            f"the model has no row for {len(beyond)} entries of the tokenizer, the first of them {token} ({index}): "
            f"vocab_size of config.json is {vocab}; take both files from one checkpoint"
        )


def _is_image(part: Any, role: str) -> bool:
    """Whether a part of a message is an image. A part that is neither an image nor a text is refused."""
    match part:
        case {"type": "image"}:
            return True
        case {"type": "text", "text": str()}:
            return False
    raise UserError(f'the content of a {role} message must be a text, {{"type": "image"}} or {{"type": "text", ...}}')


def check_tokenizer(folder: Path) -> None:
    """Check that a checkpoint's folder has the files of a tokenizer.

    Raises:
        UserError: A file is missing.
    """
    if missing := sorted({"tokenizer.json", "tokenizer_config.json"} - files_in(folder)):
        raise UserError(f"{folder} lacks {' and '.join(missing)}: copy the tokenizer of the checkpoint there")


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Read the tokenizer of a checkpoint, with its chat template."""
    check_tokenizer(folder)
    from transformers import PreTrainedTokenizerFast

    names = files_in(folder)
    try:
        with _local_copy(folder, names) as copy:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(copy, local_files_only=True)
    except UserError:
        raise
    except Exception as fault:  # the tokenizers library raises plain Exception
        raise UserError(f"the tokenizer in {folder} cannot be read: {' '.join(str(fault).split())}") from fault
    # transformers reads chat_template.jinja by itself, and prefers it to chat_template.json.
    if "chat_template.json" in names and "chat_template.jinja" not in names:
        tokenizer.chat_template = read_json(folder / "chat_template.json").get("chat_template")
    return tokenizer


@contextmanager
def _local_copy(folder: Path, names: set[str]) -> Iterator[Path]:
    """Give ``folder``, or, if it is in a bucket, a copy of the files that transformers may read with a tokenizer."""
    if not is_remote(folder):
        yield folder
        return
    with TemporaryDirectory() as copy:
        for name in names:
            if name.endswith((".json", ".jinja")):
                with reading_errors(folder / name):
                    copy_file(folder / name, Path(copy) / name)
        yield Path(copy)


def _check_image_settings(folder: Path, vision: VisionConfig) -> None:
    """Check that the image settings which the checkpoint states are those that its config.json implies."""
    path, settings = image_settings(folder)
    for name, value in expected_image_settings(vision).items():
        if name == "do_convert_rgb":  # images are converted to RGB in any case
            continue
        if settings.get(name, value) != value:
            raise UserError(f"{path}: {name} is {settings[name]}, but the model of config.json needs {value}")
