"""Image files become uint8 tiles for the vision encoder.

The tiles equal, byte for byte, those of transformers' ``MllamaImageProcessorPil`` before it normalises them. Pixels
stay uint8, a quarter of the bytes to move, and the model normalises them on the device. For the common case, an upright
RGB file, little is done beyond Pillow's decoding and resizing.
"""

import io
import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from llava_cot_jax.errors import UserError
from llava_cot_jax.model.config import VisionConfig
from llava_cot_jax.paths import as_path
from llava_cot_jax.processing.grey import stated_depth, to_eight_bits

ImageSource = str | Path | bytes | Image.Image
"""Path of an image file, the bytes of one, or an image that Pillow has opened."""

MAX_PIXELS = 89_478_485
"""Largest number of pixels of an image that is decoded (256 MiB as RGB). Pillow warns of larger images."""


def open_image(source: ImageSource) -> Image.Image:
    """Open an image as RGB, turned upright as its EXIF data say.

    Transparent parts are laid on white, as the processor of transformers does (Meta's own pipeline shows the colours
    stored beneath). Grey of more than 8 bits is scaled to 8 bits by its true depth (``grey.to_eight_bits``), not
    clipped. An animation gives its first frame. An opened image that needs no change is returned itself.

    Raises:
        UserError: There is no such file, or it is no image, is damaged, or has no pixels or more than ``MAX_PIXELS``.
    """
    name = _name(source)
    if isinstance(source, Image.Image):
        return _decode(source, name)
    with _open_file(source, name) as file:
        return _decode(_identify(file, name), name)


def check_image(source: str | Path) -> None:
    """Check quickly, by the beginning of its file, that an image exists.

    Raises:
        UserError: There is no such file, or it is no image.
    """
    name = _name(source)
    with _open_file(source, name) as file:
        _identify(file, name)


def check_vision(vision: VisionConfig) -> None:
    """Check that ``cut_into_tiles`` can serve the configuration.

    Raises:
        UserError: The number of channels is not 3, or the canvases are not all those of at most ``max_num_tiles``
            tiles.
    """
    if vision.num_channels != 3:
        raise UserError(f"vision num_channels is {vision.num_channels}, but images are RGB: 3 is needed")
    canvases = _canvases(vision.max_num_tiles)
    if list(vision.supported_aspect_ratios) != canvases:
        raise UserError(f"vision supported_aspect_ratios must be {canvases} for {vision.max_num_tiles} tiles")


def cut_into_tiles(image: Image.Image, vision: VisionConfig, out: np.ndarray) -> tuple[int, int]:
    """Resize an RGB image to the canvas that fits it best, and cut it into tiles, row by row.

    Args:
        image: Image that ``open_image`` returned.
        vision: Configuration that passes ``check_vision``.
        out: Zeros, uint8 [max_num_tiles, 3, size, size], into which the tiles are written. Pixels that the image does
            not cover stay 0.

    Returns:
        The canvas: its height and width in tiles.
    """
    size = vision.image_size
    canvas, (height, width) = fit_canvas(image.height, image.width, vision.max_num_tiles, size)
    fitted = image.size == (width, height)  # Pillow would copy an image of the same size
    resized = image if fitted else image.resize((width, height), Image.Resampling.BILINEAR)
    for channel, name in enumerate("RGB"):
        # One channel at a time, because Pillow extracts it faster than NumPy transposes interleaved pixels.
        band = np.frombuffer(resized.tobytes("raw", name), np.uint8).reshape(height, width)
        for tile, (y, x) in enumerate(product(*map(range, canvas))):
            part = band[y * size : (y + 1) * size, x * size : (x + 1) * size]
            out[tile, channel, : part.shape[0], : part.shape[1]] = part
    return canvas


def batch_images(images: Sequence[Sequence[ImageSource]], vision: VisionConfig) -> dict[str, np.ndarray]:
    """Return the model's image inputs for a batch, given the images of each of its sequences.

    Sequences with fewer images than others are padded with images without pixels.

    Returns:
        ``pixel_values`` uint8 [batch, images, tiles, channels, size, size], 0 in unused tiles; ``aspect_ratio_ids``
        int32 [batch, images], the canvas's index in ``supported_aspect_ratios`` + 1, or 0 for padding;
        ``aspect_ratio_mask`` int32 [batch, images, tiles], 1 for used tiles, which come first, and for the first tile
        of padding. Empty if no sequence has an image.

    Raises:
        UserError: ``open_image`` refuses an image.
    """
    num_images = max(map(len, images), default=0)
    if not num_images:
        return {}
    shape = (len(images), num_images, vision.max_num_tiles)
    pixels = np.zeros((*shape, 3, vision.image_size, vision.image_size), np.uint8)
    ids = np.zeros(shape[:2], np.int32)
    mask = np.zeros(shape, np.int32)
    mask[:, :, 0] = 1
    for i, sources in enumerate(images):
        for j, source in enumerate(sources):
            canvas = cut_into_tiles(open_image(source), vision, pixels[i, j])
            ids[i, j] = vision.supported_aspect_ratios.index(canvas) + 1
            mask[i, j, : math.prod(canvas)] = 1
    return {"pixel_values": pixels, "aspect_ratio_ids": ids, "aspect_ratio_mask": mask}


def _canvases(max_num_tiles: int) -> list[tuple[int, int]]:
    """Return all canvases, as (height, width) in tiles, in the order of ``aspect_ratio_ids``."""
    return [(high, wide) for high in range(1, max_num_tiles + 1) for wide in range(1, max_num_tiles // high + 1)]


@lru_cache(maxsize=10_000)
def fit_canvas(height: int, width: int, max_num_tiles: int, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the canvas of an image, as (height, width) in tiles, and the (height, width) that it is resized to.

    The canvas is the one that enlarges the image least or, if none is large enough, the one that shrinks it least. Of
    several such canvases it is the smallest. The image keeps its proportions, and is not enlarged beyond the side of a
    tile.
    """
    scales = {(high, wide): min(high * size / height, wide * size / width) for high, wide in _canvases(max_num_tiles)}
    best = min((scale for scale in scales.values() if scale >= 1), default=max(scales.values()))
    canvas = min((canvas for canvas, scale in scales.items() if scale == best), key=math.prod)
    tallest, widest = (min(max(side, size), tiles * size) for side, tiles in zip((height, width), canvas, strict=True))
    tall, wide = tallest / height, widest / width
    if wide < tall:
        return canvas, (min(max(math.floor(height * wide), 1), tallest), widest)
    return canvas, (tallest, min(max(math.floor(width * tall), 1), widest))


def _name(source: ImageSource) -> str:
    """Return on one line how an error names the image."""
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
        return as_path(source).open("rb")
    except FileNotFoundError:
        raise UserError(f"{name} does not exist") from None
    except (OSError, ValueError) as fault:  # ValueError: a path with a null character
        raise UserError(f"{name} cannot be read: {_one_line(getattr(fault, 'strerror', None) or fault)}") from None


def _identify(file: BinaryIO, name: str) -> Image.Image:
    """Read the header of an image file."""
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        raise UserError(f"{name} is not an image that can be read; PNG, JPEG and WebP can") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(f"{name} has more than the {MAX_PIXELS} pixels allowed; scale it down") from None
    except Exception as fault:  # damaged data makes Pillow's readers raise almost anything
        raise UserError(f"{name} is damaged: {_one_line(fault)}") from fault


def _decode(image: Image.Image, name: str) -> Image.Image:
    """Decode an image whose header was read, and return it as upright RGB."""
    pixels = image.width * image.height
    if not pixels:
        raise UserError(f"{name} has no pixels ({image.width} x {image.height})")
    if pixels > MAX_PIXELS:
        raise UserError(f"{name} has {pixels} pixels, more than the {MAX_PIXELS} allowed; scale it down")
    try:
        depth = stated_depth(image)
        image.load()
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        # Pillow would copy an image that needs no turning.
        upright = ImageOps.exif_transpose(image) if turned else image
        return _on_white(to_eight_bits(upright, depth))
    except Exception as fault:  # damaged data makes Pillow's decoders raise almost anything
        raise UserError(f"{name} cannot be decoded, it may be damaged or cut short: {_one_line(fault)}") from fault


def _on_white(image: Image.Image) -> Image.Image:
    """Return the image as RGB, with transparent parts laid on white."""
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
