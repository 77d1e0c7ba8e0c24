"""Image files become uint8 tiles for the vision encoder.

The tiles equal, byte for byte, those of transformers' ``MllamaImageProcessorPil`` before it normalises them. Pixels
stay uint8, a quarter of the bytes to move, and the model normalises them on the device. For the common case, an upright
RGB file, little is done beyond Pillow's decoding and resizing.
"""

import base64
import binascii
import io
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from llava_cot_jax.checks import shown
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.config import VisionConfig
from llava_cot_jax.paths import as_path
from llava_cot_jax.processing.grey import stated_depth, to_eight_bits

ImageSource = str | Path | bytes | Image.Image | np.ndarray
"""Path or ``data:`` URL of an image file, the bytes of one, an image that Pillow has opened, or its pixels as uint8:
grey [height, width], RGB [height, width, 3] or RGBA [height, width, 4]."""

DATA_URL = "data:"
"""Beginning of a URL that holds an image file itself, as web pages and messages of chat APIs have it."""

MAX_PIXELS = 89_478_485
"""Largest number of pixels of an image that is decoded (256 MiB as RGB). Pillow warns of larger images."""

MAX_PIXELS_TO_SHRINK = 1 << 29
"""Largest number of pixels of an image that is shrunk while it is decoded. Up to 2 GiB of memory hold one."""

REDUCING_GAP = 3
"""Number of times that an image shrunk while it is decoded is at least as long and wide as it will be in the end."""


class TooManyPixels(UserError):
    """Error for an image that has too many pixels to be decoded."""


def open_image(source: ImageSource, max_side: int | None = None) -> Image.Image:
    """Open an image as RGB, turned upright as its EXIF data say.

    Transparent parts are laid on white, as the processor of transformers does (Meta's own pipeline shows the colours
    stored beneath). Grey of more than 8 bits is scaled to 8 bits by its true depth (``grey.to_eight_bits``), not
    clipped. An animation gives its first frame. An opened image that needs no change is returned itself.

    Args:
        source: Image.
        max_side: Longest side in pixels to which the caller will shrink the image. One of more than ``MAX_PIXELS``
            pixels, up to ``MAX_PIXELS_TO_SHRINK``, is reduced while it is decoded, to at least ``REDUCING_GAP`` times
            that side. None refuses such an image.

    Raises:
        TooManyPixels: The image has more than ``MAX_PIXELS`` pixels, and is not to be shrunk to fewer; or it has more
            than ``MAX_PIXELS_TO_SHRINK``.
        UserError: ``source`` is nothing of ``ImageSource``. Or there is no such file, or it is no image, is damaged, or
            has no pixels.
    """
    name = _name(source)
    with pillow_limit(MAX_PIXELS_TO_SHRINK) if max_side else nullcontext():
        if isinstance(source, Image.Image):
            return _decode(source, name, max_side)
        if not isinstance(source, str | os.PathLike | bytes):
            return _decode(_from_pixels(source), name, max_side)
        with _open_file(source, name) as file:
            return _decode(_identify(file, name, _allowed_pixels(max_side)), name, max_side)


def identify_image(image: bytes) -> tuple[str, tuple[int, int]]:
    """Return the format, as Pillow names it, and the width and height in pixels, from the beginning of an image file.

    Raises:
        TooManyPixels: The image has more than twice ``MAX_PIXELS_TO_SHRINK`` pixels.
        UserError: It is no image.
    """
    with pillow_limit(MAX_PIXELS_TO_SHRINK), _identify(io.BytesIO(image), _name(image), MAX_PIXELS_TO_SHRINK) as file:
        return file.format or "", file.size


def read_image_file(source: str | Path) -> bytes:
    """Return the bytes of an image's file, or of its ``data:`` URL.

    Raises:
        UserError: There is no such file, or it cannot be read.
    """
    name = _name(source)
    with _open_file(source, name) as file:
        return file.read()


def check_image(source: str | Path | bytes) -> None:
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


def batch_images(
    images: Sequence[Sequence[ImageSource]], vision: VisionConfig, num_images: int | None = None
) -> dict[str, np.ndarray]:
    """Return the model's image inputs for a batch, given the images of each of its sequences.

    Sequences with fewer images than others are padded with images without pixels.

    Args:
        images: Images of each sequence.
        vision: Configuration that passes ``check_vision``.
        num_images: Number of images to pad every sequence to. None takes that of the sequence with the most.

    Returns:
        ``pixel_values`` uint8 [batch, images, tiles, channels, size, size], 0 in unused tiles; ``aspect_ratio_ids``
        int32 [batch, images], the canvas's index in ``supported_aspect_ratios`` + 1, or 0 for padding;
        ``aspect_ratio_mask`` int32 [batch, images, tiles], 1 for used tiles, which come first, and for the first tile
        of padding. Empty if the number of images is 0.

    Raises:
        UserError: ``open_image`` refuses an image.
    """
    num_images = max(map(len, images), default=0) if num_images is None else num_images
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
    if is_data_url(source):
        return f"the image of a data: URL of {len(str(source))} characters"
    if not isinstance(source, str | os.PathLike | Image.Image):
        return "the image"
    path = getattr(source, "filename", "") if isinstance(source, Image.Image) else source
    return f"image {_one_line(path)}" if path else "the image"


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def is_data_url(source: Any) -> bool:
    """Whether an image is given as a ``data:`` URL."""
    return isinstance(source, str) and source[: len(DATA_URL)].lower() == DATA_URL


def _from_pixels(source: Any) -> Image.Image:
    """Return the image whose pixels an array has: NumPy's, or of a library whose arrays become NumPy's."""
    wanted = "give a path, the bytes of a file, a Pillow image, or uint8 pixels [height, width, 3]"
    if not hasattr(source, "__array__"):
        raise UserError(f"an image is {shown(source)}; {wanted}")
    try:
        pixels = np.asarray(source)
    except (TypeError, ValueError, RuntimeError):  # inside jax.jit, say, or of a tensor on a device
        raise UserError(f"an image is {shown(source)} that cannot be made an array of NumPy; {wanted}") from None
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))):
        raise UserError(f"an image is an array of {pixels.dtype} {list(pixels.shape)}; {wanted}")
    if not pixels.size:
        raise UserError(f"an image has no pixels: its array is {list(pixels.shape)}")
    return Image.fromarray(np.ascontiguousarray(pixels))


def _data_of(url: str, name: str) -> bytes:
    """Return the bytes in a ``data:`` URL (RFC 2397)."""
    header, comma, data = url.partition(",")
    if not comma:
        raise UserError(f"{name} has no data: they come after a comma, as in data:image/png;base64,iVBORw0...")
    content = unquote_to_bytes(data)
    if not header.lower().endswith(";base64"):
        return content
    try:
        return base64.b64decode(b"".join(content.split()), validate=True)
    except (binascii.Error, ValueError) as fault:
        raise UserError(f"{name} is not base64: {_one_line(fault)}") from None


def _open_file(source: str | Path | bytes, name: str) -> BinaryIO:
    if isinstance(source, str) and is_data_url(source):
        return io.BytesIO(_data_of(source, name))
    if isinstance(source, bytes):
        return io.BytesIO(source)
    try:
        return as_path(source).open("rb")
    except FileNotFoundError:
        raise UserError(f"{name} does not exist") from None
    except (OSError, ValueError) as fault:  # ValueError: a path with a null character
        raise UserError(f"{name} cannot be read: {_one_line(getattr(fault, 'strerror', None) or fault)}") from None


def _allowed_pixels(max_side: int | None) -> int:
    return MAX_PIXELS_TO_SHRINK if max_side else MAX_PIXELS


def _identify(file: BinaryIO, name: str, allowed: int = MAX_PIXELS) -> Image.Image:
    """Read the header of an image file. An error for too many pixels names the number ``allowed``."""
    try:
        found = Image.open(file)
    except UnidentifiedImageError:
        raise UserError(f"{name} is not an image that can be read; PNG, JPEG and WebP can") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise TooManyPixels(f"{name} has more than the {allowed} pixels allowed; scale it down") from None
    except Exception as fault:  # damaged data makes Pillow's readers raise almost anything
        raise UserError(f"{name} is damaged: {_one_line(fault)}") from fault
    if found.format == "EPS":  # which Pillow lets Ghostscript run, a program in a file that anyone may have sent
        raise UserError(f"{name} is a PostScript program, not an image that can be read; PNG, JPEG and WebP can")
    return found


@contextmanager
def pillow_limit(pixels: int) -> Iterator[None]:
    """Let Pillow open images of up to this number of pixels in the block. It holds for all threads."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, pixels
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _decode(image: Image.Image, name: str, max_side: int | None) -> Image.Image:
    """Decode an image whose header was read, and return it as upright RGB."""
    pixels = image.width * image.height
    if not pixels:
        raise UserError(f"{name} has no pixels ({image.width} x {image.height})")
    if pixels > MAX_PIXELS:
        _check_shrinks(image, name, max_side)
    try:
        depth = stated_depth(image)
        if max_side and pixels > MAX_PIXELS:
            image = _reduce(image, REDUCING_GAP * max_side)
        image.load()
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        # Pillow would copy an image that needs no turning.
        upright = ImageOps.exif_transpose(image) if turned else image
        return _on_white(to_eight_bits(upright, depth))
    except Exception as fault:  # damaged data makes Pillow's decoders raise almost anything
        raise UserError(f"{name} cannot be decoded, it may be damaged or cut short: {_one_line(fault)}") from fault


def _check_shrinks(image: Image.Image, name: str, max_side: int | None) -> None:
    """Check that an image of more than ``MAX_PIXELS`` pixels can be shrunk to fewer.

    Raises:
        TooManyPixels: It cannot.
    """
    pixels, longest = image.width * image.height, max(image.size)
    if pixels > (allowed := _allowed_pixels(max_side)):
        raise TooManyPixels(f"{name} has {pixels} pixels, more than the {allowed} allowed; scale it down")
    if max_side and pixels * min(1, max_side / longest) ** 2 > MAX_PIXELS:
        raise TooManyPixels(
            f"{name} has {pixels} pixels, and with a longest side of {max_side} it still has more than the "
            f"{MAX_PIXELS} allowed; shrink it more"
        )


def _reduce(image: Image.Image, least: int) -> Image.Image:
    """Decode an image and shrink it by an integer, to a longest side of at least ``least`` pixels.

    A JPEG is shrunk by its decoder. All else is shrunk in strips, so that only one strip at a time is converted to a
    mode that can be shrunk, which may take four times the memory.
    """
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = image.getexif().get(ExifTags.Base.Orientation, 1)
    scale = least / max(image.size)
    image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
    image.load()
    factor = max(1, max(image.size) // least)
    mode = "RGBA" if image.has_transparency_data else _REDUCIBLE.get(image.mode.partition(";")[0], image.mode)
    reduced = Image.new(mode, (math.ceil(image.width / factor), math.ceil(image.height / factor)))
    height = factor * max(1, _STRIP_PIXELS // (image.width * factor))
    for top in range(0, image.height, height):
        strip = image.crop((0, top, image.width, min(top + height, image.height)))
        reduced.paste(strip.convert(mode).reduce(factor), (0, top // factor))
    reduced.info["exif"] = exif.tobytes()  # where ``getexif`` finds it again
    return reduced


_REDUCIBLE = {"1": "L", "P": "RGB", "PA": "RGBA", "I": "I"}
"""Modes by the modes, without their byte order, that Pillow cannot reduce."""

_STRIP_PIXELS = 1 << 24


def _on_white(image: Image.Image) -> Image.Image:
    """Return the image as RGB, with transparent parts laid on white."""
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
