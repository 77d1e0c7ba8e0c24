"""From an image file to the uint8 tiles that the vision tower takes.

The tiles are those of transformers' ``MllamaImageProcessorPil`` before its arithmetic, byte for byte:
pixels stay uint8, a quarter of the bytes to move, and the model normalises them on the device. For the
common case, an upright RGB file, little is done beyond Pillow's decoding and resizing.
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

ImageSource = str | Path | bytes | Image.Image
"""A local path, the bytes of an image file, or an image that Pillow has opened."""

MAX_PIXELS = 89_478_485
"""The largest image that is decoded (256 MiB as RGB). Pillow warns from the same size on."""


def open_image(source: ImageSource) -> Image.Image:
    """The image as RGB, turned upright as its EXIF says.

    What is transparent is laid on white, as the processor of transformers does (Meta's own pipeline
    shows the colours stored beneath). Grey of more than 8 bits is scaled to 8, not clipped. Of an
    animation, the first frame. An opened image that needs none of this is returned itself.

    Raises:
        UserError: no such file, no image, a damaged one, one without pixels or of more than ``MAX_PIXELS``.
    """
    name = _name(source)
    if isinstance(source, Image.Image):
        return _decode(source, name)
    with _open_file(source, name) as file:
        return _decode(_identify(file, name), name)


def check_image(source: str | Path) -> None:
    """Whether there is an image, by the beginning of its file alone: quick, so that a wrong name is told at once.

    Raises:
        UserError: no such file, or no image.
    """
    name = _name(source)
    with _open_file(source, name) as file:
        _identify(file, name)


def check_vision(vision: VisionConfig) -> None:
    """Check that ``cut_into_tiles`` can serve the configuration.

    Raises:
        UserError: ``vision`` takes another number of channels than 3, or other canvases than all
            those of at most ``max_num_tiles`` tiles.
    """
    if vision.num_channels != 3:
        raise UserError(f"vision num_channels is {vision.num_channels}, but images are RGB: 3 is needed")
    canvases = _canvases(vision.max_num_tiles)
    if list(vision.supported_aspect_ratios) != canvases:
        raise UserError(f"vision supported_aspect_ratios must be {canvases} for {vision.max_num_tiles} tiles")


def cut_into_tiles(image: Image.Image, vision: VisionConfig, out: np.ndarray) -> tuple[int, int]:
    """Resize an RGB image to the canvas that fits it best, and cut_into_tiles that into tiles, row by row.

    Args:
        image: what ``open_image`` returned.
        vision: a configuration that passes ``check_vision``.
        out: zeros, uint8 [max_num_tiles, 3, size, size]; the tiles are written here, without a copy
            in between, and what the image does not cover stays 0.

    Returns:
        The canvas: tiles high, tiles wide.
    """
    size = vision.image_size
    canvas, (height, width) = fit_canvas(image.height, image.width, vision.max_num_tiles, size)
    fitted = image.size == (width, height)  # Pillow would make a copy
    resized = image if fitted else image.resize((width, height), Image.Resampling.BILINEAR)
    for channel, name in enumerate("RGB"):
        # One band at a time: Pillow picks it out faster than NumPy would transpose interleaved pixels.
        band = np.frombuffer(resized.tobytes("raw", name), np.uint8).reshape(height, width)
        for tile, (y, x) in enumerate(product(*map(range, canvas))):
            part = band[y * size : (y + 1) * size, x * size : (x + 1) * size]
            out[tile, channel, : part.shape[0], : part.shape[1]] = part
    return canvas


def batch_images(rows: Sequence[Sequence[ImageSource]], vision: VisionConfig) -> dict[str, np.ndarray]:
    """The images of a batch's rows as one array of each kind; rows with fewer images are filled up.

    Returns:
        ``pixel_values`` uint8 [batch, images, tiles, channels, size, size], 0 in tiles that are not
        used; ``aspect_ratio_ids`` int32 [batch, images], the canvas's index in
        ``supported_aspect_ratios`` + 1, or 0 where a row has fewer images; ``aspect_ratio_mask`` int32
        [batch, images, tiles], 1 for used tiles, which come first, and always for the first. Nothing
        if no row has an image.

    Raises:
        UserError: an image that ``open_image`` refuses.
    """
    images = max((len(row) for row in rows), default=0)
    if not images:
        return {}
    shape = (len(rows), images, vision.max_num_tiles)
    pixels = np.zeros((*shape, 3, vision.image_size, vision.image_size), np.uint8)
    ids = np.zeros(shape[:2], np.int32)
    mask = np.zeros(shape, np.int32)
    mask[:, :, 0] = 1
    for i, row in enumerate(rows):
        for j, source in enumerate(row):
            canvas = cut_into_tiles(open_image(source), vision, pixels[i, j])
            ids[i, j] = vision.supported_aspect_ratios.index(canvas) + 1
            mask[i, j, : math.prod(canvas)] = 1
    return {"pixel_values": pixels, "aspect_ratio_ids": ids, "aspect_ratio_mask": mask}


def _canvases(tiles: int) -> list[tuple[int, int]]:
    """All rectangles of at most so many tiles, as (tiles high, tiles wide), in the order of ``aspect_ratio_ids``."""
    return [(high, wide) for high in range(1, tiles + 1) for wide in range(1, tiles // high + 1)]


@lru_cache(maxsize=10_000)
def fit_canvas(height: int, width: int, max_num_tiles: int, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The canvas (tiles high, tiles wide) of an image, and the (height, width) that it is resized to.

    The canvas is the one that enlarges the image least, or where none is large enough the one that shrinks it least;
    of several alike the smallest. On it the image keeps its proportions, and is not enlarged beyond one tile's side.
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
        return as_path(source).open("rb")
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
        image.load()
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        # Pillow copies whatever it need not turn or convert: do not ask it to.
        upright = ImageOps.exif_transpose(image) if turned else image
        return _on_white(_eight_bits(upright))
    except Exception as fault:  # damaged data makes Pillow's decoders raise almost anything
        raise UserError(f"{name} cannot be decoded, it may be damaged or cut short: {_one_line(fault)}") from fault


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
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
