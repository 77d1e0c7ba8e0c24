"""From messages and images to the arrays that the model takes, and from tokens back to text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self, cast

import jinja2
import numpy as np

from llava_cot_jax.errors import UserError
from llava_cot_jax.model.checkpoint.folder import find_checkpoint
from llava_cot_jax.model.config import MllamaConfig, VisionConfig, image_settings, read_json
from llava_cot_jax.paths import files_in, is_remote, reading_errors
from llava_cot_jax.processing.images import ImageSource, batch_images, check_vision
from llava_cot_jax.processing.messages import CHAT_TEMPLATE, IMAGE_TOKEN, PROMPT_DATE, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Processor:
    """Turns prompts and images into what ``Mllama`` is called with. Works on the host alone; can be pickled.

    Attributes:
        config: the model's configuration.
        tokenizer: the checkpoint's fast tokenizer.

    Raises:
        UserError: tokenizer and configuration are not of the same model.
    """

    def __init__(self, config: MllamaConfig, tokenizer: PreTrainedTokenizerFast) -> None:
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
        self._special = re.compile("|".join(map(re.escape, tokenizer.get_added_vocab())))

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Self:
        """Read the tokenizer, chat template and image settings of a checkpoint.

        Args:
            path: its folder, on a disk or in a bucket, its id on the hub, or ``"shapes"``.

        Raises:
            UserError: a file is missing or broken, or two of them contradict each other.
        """
        folder = find_checkpoint(path)
        config = MllamaConfig.from_pretrained(folder)
        _check_image_settings(folder, config.vision)
        return cls(config, _load_tokenizer(folder))

    def prompt(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The messages in the checkpoint's chat format, beginning with one BOS.

        Texts are plain text: one that spells a special token (``<|eot_id|>``, ``<|image|>``) is
        refused, for it would end the message or claim an image that is not there.

        Args:
            messages: the conversation; see ``Message``.
            add_generation_prompt: whether to end with the assistant's header, for it to answer.

        Raises:
            UserError: a malformed message, a special token in a text, or messages that the checkpoint's
                template refuses (the published one: a system message beside an image).
        """
        if not messages:
            raise UserError("there are no messages to make a prompt of")
        try:
            rendered = self.tokenizer.apply_chat_template(
                [self._plain(message) for message in messages],
                chat_template=None if self.tokenizer.chat_template else CHAT_TEMPLATE,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                date_string=PROMPT_DATE,
            )
        except jinja2.TemplateError as fault:
            raise UserError(f"the chat template refuses the messages: {' '.join(str(fault).split())}") from fault
        text, bos = cast(str, rendered), self.tokenizer.bos_token
        return text if text.startswith(bos) else bos + text

    def __call__(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[ImageSource]] | None = None,
        *,
        length: int | None = None,
    ) -> dict[str, np.ndarray]:
        """A batch for the model, named as a transformers processor names it.

        Args:
            prompts: what ``prompt`` returned, perhaps with the beginning of an answer appended. Taken
                as they stand: special tokens in them count, and no BOS is added.
            images: the images of each prompt, as many as it has ``<|image|>``; None where no prompt has any.
            length: tokens to fill every row up to; by default those of the longest.

        Returns:
            ``input_ids`` and ``attention_mask`` int32 [batch, tokens], padding on the right; where there
            is any image ``pixel_values`` uint8 [batch, images, tiles, channels, size, size],
            ``aspect_ratio_ids`` int32 [batch, images], ``aspect_ratio_mask`` int32 [batch, images, tiles]
            and ``cross_attention_mask`` int32 [batch, tokens, images, tiles].

        Raises:
            UserError: rows and images that do not match, a row longer than ``length``, or an image that
                ``open_image`` refuses.
        """
        if isinstance(prompts, str) or not prompts:
            raise UserError("prompts must be a list of at least one string")
        rows: list[list[int]] = self.tokenizer(
            list(prompts), add_special_tokens=False, padding=False, truncation=False, verbose=False
        )["input_ids"]
        return self.collate(rows, [[] for _ in rows] if images is None else images, length=length)

    def collate(
        self, rows: Sequence[list[int]], images: Sequence[Sequence[ImageSource]], *, length: int | None = None
    ) -> dict[str, np.ndarray]:
        """The batch that ``__call__`` returns, of rows that are tokens already.

        Raises:
            UserError: as for ``__call__``.
        """
        self._check_images(rows, images)
        width = max(map(len, rows)) if length is None else length
        inputs = self._pad(rows, width)
        pictures = batch_images(images, self.config.vision)
        if pictures:
            seen = _seen_images(rows, self.config.image_token_index, pictures["aspect_ratio_ids"].shape[1], width)
            inputs["cross_attention_mask"] = seen[..., None] * pictures["aspect_ratio_mask"][:, None]
        return inputs | pictures

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids [tokens], special tokens left out and nothing else changed."""
        tokens = np.asarray(ids).astype(int).tolist()
        return cast(str, self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _plain(self, message: Message) -> dict[str, Any]:
        """The message, checked; its content as one string where it has no image, which every template takes."""
        if set(message) != {"role", "content"} or not isinstance(message["role"], str):
            raise UserError(f'a message must have "role", a text, and "content" alone; one has {sorted(message)}')
        role, content = message["role"], message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        # Joined, because a token could be spelt across two parts; a line break stands for an image.
        spoken = "".join("\n" if _is_image(part, role) else part["text"] for part in parts)
        if found := self._special.search(role + "\n" + spoken):
            raise UserError(
                f"the text of a message holds the special token {found.group()}: remove it; "
                'an image is given as {"type": "image"}'
            )
        return {"role": role, "content": parts if any(_is_image(part, role) for part in parts) else spoken}

    def _check_images(self, rows: Sequence[list[int]], images: Sequence[Sequence[ImageSource]]) -> None:
        if len(images) != len(rows):
            raise UserError(f"there are {len(rows)} prompts, but images for {len(images)}: give a list for each")
        for i, (ids, sources) in enumerate(zip(rows, images, strict=True)):
            if not isinstance(sources, list | tuple):
                raise UserError(f"the images of prompt {i} must be a list, even of one")
            tokens = ids.count(self.config.image_token_index)
            if tokens != len(sources):
                raise UserError(f"prompt {i} has {tokens} {IMAGE_TOKEN} for {len(sources)} images; one each is needed")

    def _pad(self, rows: Sequence[list[int]], width: int) -> dict[str, np.ndarray]:
        ids = np.full((len(rows), width), self.config.text.pad_token_id, np.int32)
        mask = np.zeros_like(ids)
        for i, row in enumerate(rows):
            if len(row) > width:
                raise UserError(f"prompt {i} has {len(row)} tokens, more than {width}: shorten it or raise the length")
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
        return {"input_ids": ids, "attention_mask": mask}


def _seen_images(rows: Sequence[list[int]], image_token: int, images: int, width: int) -> np.ndarray:
    """int32 [batch, width, images], 1 where a token sees an image: from the image's own token until the next image.

    Images whose tokens follow one another are seen together, until the image after them or the end of the row.
    """
    seen = np.zeros((len(rows), width, images), np.int32)
    for i, ids in enumerate(rows):
        stop = following = len(ids)
        places = [place for place, token in enumerate(ids) if token == image_token]
        for image, place in reversed(list(enumerate(places))):
            if place + 1 < following:
                stop = following
            seen[i, place:stop, image] = 1
            following = place
    return seen


def _is_image(part: Any, role: str) -> bool:
    match part:
        case {"type": "image"}:
            return True
        case {"type": "text", "text": str()}:
            return False
    raise UserError(f'the content of a {role} message must be a text, {{"type": "image"}} or {{"type": "text", ...}}')


def check_tokenizer(folder: Path) -> None:
    """Whether the files of a tokenizer are in a checkpoint's folder.

    Raises:
        UserError: one is missing.
    """
    if missing := sorted({"tokenizer.json", "tokenizer_config.json"} - files_in(folder)):
        raise UserError(f"{folder} lacks {' and '.join(missing)}: copy the tokenizer of the checkpoint there")


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    check_tokenizer(folder)
    from transformers import PreTrainedTokenizerFast

    names = files_in(folder)
    try:
        with _on_disk(folder, names) as copy:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(copy, local_files_only=True)
    except UserError:
        raise
    except Exception as fault:  # the tokenizers library raises plain Exception
        raise UserError(f"the tokenizer in {folder} cannot be read: {' '.join(str(fault).split())}") from fault
    # transformers reads chat_template.jinja by itself, and gives it precedence over chat_template.json.
    if "chat_template.json" in names and "chat_template.jinja" not in names:
        tokenizer.chat_template = read_json(folder / "chat_template.json").get("chat_template")
    return tokenizer


@contextmanager
def _on_disk(folder: Path, names: set[str]) -> Iterator[Path]:
    """``folder``; of one in a bucket, a copy of the files that transformers may read with a tokenizer."""
    if not is_remote(folder):
        yield folder
        return
    with TemporaryDirectory() as copy:
        for name in names:
            if name.endswith((".json", ".jinja")):
                with reading_errors(folder / name):
                    (Path(copy) / name).write_bytes((folder / name).read_bytes())
        yield Path(copy)


def _check_image_settings(folder: Path, vision: VisionConfig) -> None:
    """Hold the image settings that the checkpoint states against those that follow from its config.json."""
    path, settings = image_settings(folder)
    wanted = {
        "size": {"height": vision.image_size, "width": vision.image_size},
        "max_image_tiles": vision.max_num_tiles,
        "resample": 2,  # bilinear
        "rescale_factor": 1 / 255,
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
        **dict.fromkeys(("do_resize", "do_pad", "do_rescale", "do_normalize"), True),
    }
    for name, value in wanted.items():
        if settings.get(name, value) != value:
            raise UserError(f"{path}: {name} is {settings[name]}, but the model of config.json needs {value}")
