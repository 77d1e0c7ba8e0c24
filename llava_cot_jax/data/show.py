"""Display of rows: their text with the trained parts marked, and the tiles of their images."""

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
from llava_cot_jax.data.sources import SHAPES_DATA
from llava_cot_jax.model.config import VisionConfig
from llava_cot_jax.processing.images import batch_images, open_image
from llava_cot_jax.processing.processor import Processor

OPENS, CLOSES = "⟦", "⟧"
"""Marks around text that is trained on, since a text file keeps no colours."""

SHEET_SIDE = 224
"""Longest side in pixels of an image or tile on a sheet."""

GAP = 8
"""Space in pixels around images and tiles on a sheet."""


def display_processor(data: str, checkpoint: str | None) -> Processor:
    """Return the processor to show rows with.

    Args:
        data: Data set, a prepared folder or ``shapes``.
        checkpoint: Checkpoint whose processor is used. None takes the tokenizer that comes with the package, and tiles
            as the published models cut them, or for ``shapes`` as its small model does.

    Raises:
        UserError: The checkpoint does not exist.
    """
    if checkpoint is not None:
        return Processor.from_pretrained(checkpoint)
    config = shapes_config()
    return Processor(config if data == SHAPES_DATA else replace(config, vision=VisionConfig()), shapes_tokenizer())


def describe_row(index: int, row: Row, conversation: Conversation, tokenizer: PreTrainedTokenizerFast) -> Text:
    """Return a row's facts on one line, then its text as the model reads it, with trained parts in green and marked."""
    sizes = [f"image {image.width} x {image.height}" for image in map(open_image, row.images)] or ["no image"]
    text = Text(
        f"row {index} ({row.id}) from {row.source}: {', '.join(sizes)}, {conversation.turns} of "
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
    """Draw the images of rows below one another, each with its tiles beside it, arranged as on the canvas.

    Args:
        rows: Rows to draw, each with its index. At least one has an image.
        vision: Vision configuration by which images are cut into tiles.
    """
    strips = [
        _strip(f"row {index} ({row.id})" + (f", image {i}" if len(row.images) > 1 else ""), image, vision)
        for index, row in rows
        for i, image in enumerate(map(open_image, row.images), 1)
    ]
    sheet = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), "white")
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    return sheet


def _strip(label: str, image: Image.Image, vision: VisionConfig) -> Image.Image:
    arrays = batch_images([[image]], vision)
    tiles = arrays["pixel_values"][0, 0]  # [tiles, 3, size, size]
    high, wide = vision.supported_aspect_ratios[int(arrays["aspect_ratio_ids"][0, 0]) - 1]
    top = 2 * GAP + 12
    strip = Image.new(
        "RGB", (2 * GAP + SHEET_SIDE + (SHEET_SIDE + GAP) * wide, top + (SHEET_SIDE + GAP) * high), "white"
    )
    text = f"{label}: {image.width} x {image.height}, {high} x {wide} tiles of {vision.image_size}"
    # Pillow's built-in font has Latin letters only.
    ImageDraw.Draw(strip).text((GAP, GAP), text.encode("latin-1", "replace").decode("latin-1"), fill="black")
    strip.paste(_fit(image), (GAP, top))
    for tile in range(high * wide):
        y, x = divmod(tile, wide)
        pixels = Image.fromarray(np.ascontiguousarray(tiles[tile].transpose(1, 2, 0)))
        strip.paste(_fit(pixels), (2 * GAP + SHEET_SIDE + (SHEET_SIDE + GAP) * x, top + (SHEET_SIDE + GAP) * y))
    return strip


def _fit(image: Image.Image) -> Image.Image:
    """Scale an image so that its longest side is ``SHEET_SIDE``; enlarged images keep hard edges."""
    scale = SHEET_SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BILINEAR)
