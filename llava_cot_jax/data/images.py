"""From an image file to the uint8 tiles that the vision tower takes.

The cutting is that of transformers' ``MllamaImageProcessorPil`` with the arithmetic left out: pixels
stay uint8, a quarter of the bytes to move, and the model normalises them on the device.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.models.mllama.image_processing_pil_mllama import (
    MllamaImageProcessorPil,
    get_all_supported_aspect_ratios,
)

from llava_cot_jax.errors import UserError
from llava_cot_jax.model.config import VisionConfig

ImageSource = str | Path | bytes | Image.Image
"""A local path, the bytes of an image file, or an image that Pillow has opened."""

MAX_PIXELS = 89_478_485
"""The largest image that is decoded (256 MiB as RGB). Pillow warns from the same size on."""


def open_image(source: ImageSource) -> Image.Image:
    """The image as RGB, turned upright as its EXIF says.

    What is transparent is laid on white, as the processor of transformers does (Meta's own pipeline
    shows the colours stored beneath). Grey of more than 8 bits is scaled to 8, not clipped. Of an
    animation, the first frame.

    Raises:
        UserError: no such file, no image, a damaged one, one without pixels or of more than ``MAX_PIXELS``.
    """
    name = _name(source)
    if isinstance(source, Image.Image):
        return _decode(source, name)
    with _open_file(source, name) as file:
        return _decode(_identify(file, name), name)


@dataclass(frozen=True)
class Tiles:
    """One image cut into tiles.

    Attributes:
        pixels: uint8 [max_num_tiles, channels, size, size]; 0 in the tiles that are not used.
        aspect_ratio_id: index of the canvas in ``supported_aspect_ratios``, + 1.
        used: how many tiles are used; these come first.
    """

    pixels: np.ndarray
    aspect_ratio_id: int
    used: int


def make_image_processor(vision: VisionConfig) -> MllamaImageProcessorPil:
    """The transformers image processor that cuts as ``vision`` says and leaves the pixels as they are.

    Raises:
        UserError: ``vision`` takes another number of channels than 3, or other canvases than all
            those of at most ``max_num_tiles`` tiles.
    """
    if vision.num_channels != 3:
        raise UserError(f"vision num_channels is {vision.num_channels}, but images are RGB: 3 is needed")
    canvases = get_all_supported_aspect_ratios(vision.max_num_tiles)
    if list(vision.supported_aspect_ratios) != canvases:
        raise UserError(f"vision supported_aspect_ratios must be {canvases} for {vision.max_num_tiles} tiles")
    return MllamaImageProcessorPil(
        size={"height": vision.image_size, "width": vision.image_size},
        max_image_tiles=vision.max_num_tiles,
        do_rescale=False,
        do_normalize=False,
    )


def cut(image: Image.Image, image_processor: MllamaImageProcessorPil) -> Tiles:
    """Resize an RGB image to the canvas that fits it best, pad it with 0, and cut it into tiles."""
    output = image_processor([image])
    # The processor counts in float32, but every value is a byte that Pillow's resizing wrote.
    pixels = output["pixel_values"][0, 0].astype(np.uint8)
    return Tiles(pixels, aspect_ratio_id=int(output["aspect_ratio_ids"][0, 0]), used=output["num_tiles"][0][0])


def batch_tiles(rows: Sequence[Sequence[Tiles]]) -> dict[str, np.ndarray]:
    """The images of a batch's rows as one array of each kind; rows with fewer images are filled up.

    Returns:
        ``pixel_values`` uint8 [batch, images, tiles, channels, size, size]; ``aspect_ratio_ids`` int32
        [batch, images], 0 where a row has fewer images; ``aspect_ratio_mask`` int32 [batch, images,
        tiles], 1 for used tiles and always for the first. Nothing if no row has an image.
    """
    images = max((len(row) for row in rows), default=0)
    if not images:
        return {}
    shape = next(tiles.pixels.shape for row in rows for tiles in row)
    pixels = np.zeros((len(rows), images, *shape), np.uint8)
    ids = np.zeros((len(rows), images), np.int32)
    mask = np.zeros((len(rows), images, shape[0]), np.int32)
    mask[:, :, 0] = 1
    for i, row in enumerate(rows):
        for j, tiles in enumerate(row):
            pixels[i, j] = tiles.pixels
            ids[i, j] = tiles.aspect_ratio_id
            mask[i, j, : tiles.used] = 1
    return {"pixel_values": pixels, "aspect_ratio_ids": ids, "aspect_ratio_mask": mask}


def _name(source: ImageSource) -> str:
    """What an error calls the image, on one line."""
    if isinstance(source, bytes):
        return f"the image of {len(source)} bytes"
    path = getattr(source, "filename", "") if isinstance(source, Image.Image) else source
    return f"image {_one_line(path)}" if path else "the image"


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _open_file(source: str | Path | bytes, name: str) -> BinaryIO:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    try:
        return Path(source).open("rb")
    except FileNotFoundError:
        raise UserError(f"{name} does not exist") from None
    except (OSError, ValueError) as fault:  # ValueError: a path with a null character
        raise UserError(f"{name} cannot be read: {_one_line(getattr(fault, 'strerror', None) or fault)}") from None


def _identify(file: BinaryIO, name: str) -> Image.Image:
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        raise UserError(f"{name} is not an image that can be read; PNG, JPEG and WebP can") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(f"{name} has more than the {MAX_PIXELS} pixels allowed; scale it down") from None
    except Exception as fault:  # damaged data makes Pillow's readers raise almost anything
        raise UserError(f"{name} is damaged: {_one_line(fault)}") from fault


def _decode(image: Image.Image, name: str) -> Image.Image:
    pixels = image.width * image.height
    if not pixels:
        raise UserError(f"{name} has no pixels ({image.width} x {image.height})")
    if pixels > MAX_PIXELS:
        raise UserError(f"{name} has {pixels} pixels, more than the {MAX_PIXELS} allowed; scale it down")
    try:
        upright = ImageOps.exif_transpose(image)
        return _on_white(_eight_bits(upright))
    except Exception as fault:  # damaged data makes Pillow's decoders raise almost anything
        raise UserError(f"{name} cannot be decoded, it may be damaged or cut short: {_one_line(fault)}") from fault


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits (modes I;16, I and F) scaled to mode L, where Pillow would clip at 255."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.nan_to_num(np.asarray(image, np.float32))
    # Integers count to 65535. Floats do not say: take the smallest usual full scale that holds them all.
    scales = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    highest = float(values.max())
    full = next((scale for scale in scales if highest <= scale), highest)
    return Image.fromarray(np.rint(np.clip(values, 0.0, full) * np.float32(255.0 / full)).astype(np.uint8))
