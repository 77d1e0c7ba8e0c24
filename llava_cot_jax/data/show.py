"""Rows as a person would look at them: what is trained of the text, and the tiles that the model sees."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np
from PIL import Image, ImageDraw
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from llava_cot_jax.data.chat import Conversation
from llava_cot_jax.data.rows import Row
from llava_cot_jax.data.shapes.tokenizer import shapes_config, shapes_tokenizer
from llava_cot_jax.data.sources import SHAPES
from llava_cot_jax.model.config import VisionConfig
from llava_cot_jax.processing.images import batch_images, open_image
from llava_cot_jax.processing.processor import Processor

OPENS, CLOSES = "⟦", "⟧"
"""Around what is trained on: colours alone would be lost in a file."""

SIDE = 224
"""Pixels that an image, and each tile, takes on a sheet at most."""

GAP = 8


def processor_to_look_with(data: str, checkpoint: str | None) -> Processor:
    """The checkpoint's, or without one the tokenizer that comes along, with tiles as the data's model has them.

    Raises:
        UserError: no such checkpoint.
    """
    if checkpoint is not None:
        return Processor.from_pretrained(checkpoint)
    config = shapes_config()
    return Processor(config if data == SHAPES else replace(config, vision=VisionConfig()), shapes_tokenizer())


def describe(index: int, row: Row, conversation: Conversation, tokenizer: PreTrainedTokenizerFast) -> Text:
    """A row's facts on one line, then its text as the model gets it, trained stretches in green and between marks."""
    image = open_image(row.image)
    text = Text(
        f"row {index} ({row.id}) from {row.source}: image {image.width} x {image.height}, {conversation.turns} of "
        f"{len(row.turns)} turns, {len(conversation.ids)} tokens, {int(conversation.loss_mask.sum())} trained\n",
        style="bold",
    )
    marked = zip(conversation.ids, conversation.loss_mask.tolist(), strict=True)
    for trained, tokens in groupby(marked, key=lambda pair: pair[1]):
        stretch = str(tokenizer.decode([token for token, _ in tokens], clean_up_tokenization_spaces=False))
        text.append(
            f"{OPENS}{stretch}{CLOSES}" if trained else stretch, style="not bold green" if trained else "not bold"
        )
    return text.append("\n")


def draw_sheet(rows: Sequence[tuple[int, Row]], vision: VisionConfig) -> Image.Image:
    """A picture of rows below one another, each with its image and beside it the tiles as they lie on its canvas.

    Args:
        rows: with the index of each.
        vision: how images are cut.
    """
    strips = [_strip(f"row {index} ({row.id})", row, vision) for index, row in rows]
    sheet = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), "white")
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    return sheet


def _strip(label: str, row: Row, vision: VisionConfig) -> Image.Image:
    image = open_image(row.image)
    arrays = batch_images([[image]], vision)
    tiles = arrays["pixel_values"][0, 0]  # [tiles, 3, size, size]
    high, wide = vision.supported_aspect_ratios[int(arrays["aspect_ratio_ids"][0, 0]) - 1]
    top = 2 * GAP + 12
    strip = Image.new("RGB", (2 * GAP + SIDE + (SIDE + GAP) * wide, top + (SIDE + GAP) * high), "white")
    text = f"{label}: {image.width} x {image.height}, {high} x {wide} tiles of {vision.image_size}"
    # Pillow's own font has no more than Latin letters.
    ImageDraw.Draw(strip).text((GAP, GAP), text.encode("latin-1", "replace").decode("latin-1"), fill="black")
    strip.paste(_fit(image), (GAP, top))
    for tile in range(high * wide):
        y, x = divmod(tile, wide)
        pixels = Image.fromarray(np.ascontiguousarray(tiles[tile].transpose(1, 2, 0)))
        strip.paste(_fit(pixels), (2 * GAP + SIDE + (SIDE + GAP) * x, top + (SIDE + GAP) * y))
    return strip


def _fit(image: Image.Image) -> Image.Image:
    """The image scaled to fill SIDE x SIDE as far as its shape allows; small ones keep hard edges."""
    scale = SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BILINEAR)
