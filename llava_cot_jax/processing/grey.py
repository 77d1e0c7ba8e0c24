"""Grey images of more than 8 bits: their true depth, and their reduction to 8 bits.

Cameras, scanners and medical devices store 10, 12 or 14 bits in 16. A picture whose values are taken for 16 bits all
the same comes out nearly black.
"""

import struct
from typing import BinaryIO

import numpy as np
from PIL import Image

USUAL_SCALES = (255.0, 1023.0, 4095.0, 16383.0, 65535.0)
"""Largest values of greys of 8, 10, 12, 14 and 16 bits."""

_FLOAT_SCALES = (1.0, 255.0, 65535.0)
"""Usual largest values of greys stored as floats."""

_BITS_PER_SAMPLE, _MAX_SAMPLE_VALUE = 258, 281
"""Numbers of tags of TIFF 6.0, section 8."""

_FULL_SCALE_FORMATS = ("PPM", "JPEG2000")
"""Formats that state the depth, and whose values Pillow scales to 16 bits by it."""


def stated_depth(image: Image.Image) -> float | None:
    """Return the largest value that the file of a grey image states for its greys; None if it states none.

    The file of the image must still be open, as before ``Image.load``.
    """
    if image.format == "PNG" and image.mode.startswith("I") and getattr(image, "fp", None):
        bits = _significant_bits(image.fp)  # type: ignore[attr-defined]
        return None if bits is None else 2.0**bits - 1
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        bits = max(tags.get(_BITS_PER_SAMPLE, (16,)))
        largest = max(np.atleast_1d(tags.get(_MAX_SAMPLE_VALUE, 0)))
        if bits < 16:
            return float(2.0**bits - 1)
        return _smallest_scale(float(largest), USUAL_SCALES) if largest else None
    return USUAL_SCALES[-1] if image.format in _FULL_SCALE_FORMATS else None


def _significant_bits(file: BinaryIO) -> int | None:
    """Return the bits of a grey that a PNG file declares significant (its sBIT chunk), or None."""
    place = file.tell()
    file.seek(8)
    try:
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"sBIT":
                return file.read(1)[0]
            if kind == b"IDAT":
                return None
            file.seek(length + 4, 1)
        return None
    finally:
        file.seek(place)


def to_eight_bits(image: Image.Image, stated: float | None) -> Image.Image:
    """Scale grey of more than 8 bits (modes I;16, I and F) to mode L. Pillow would clip it at 255.

    The full scale is the one that the file states. Where it states none, it is the smallest usual one that holds the
    largest value: a picture that was really taken with 16 bits, and uses less than a quarter of them, is brightened.

    Args:
        image: Image of any mode; one of another mode is returned as it is.
        stated: Result of ``stated_depth``.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.nan_to_num(np.asarray(image, np.float32))
    highest = float(values.max())
    if image.mode == "F":
        full = _smallest_scale(highest, _FLOAT_SCALES)
    elif stated is not None:
        full = USUAL_SCALES[-1] if _is_scaled_up(values, stated) else max(stated, highest)
    else:
        full = _smallest_scale(highest, USUAL_SCALES)
    return Image.fromarray(np.rint(np.clip(values, 0.0, full) * np.float32(255.0 / full)).astype(np.uint8))


def _smallest_scale(highest: float, scales: tuple[float, ...]) -> float:
    """Return the smallest of the scales that holds a value, or the value itself if none does."""
    return next((scale for scale in scales if highest <= scale), highest)


def _is_scaled_up(values: np.ndarray, stated: float) -> bool:
    """Whether greys of a smaller depth fill 16 bits, as PNG asks for: shifted to the left, perhaps with copied bits."""
    if values.max() > stated:
        return values.max() <= USUAL_SCALES[-1]
    bits = round(np.log2(stated + 1))
    exact = np.clip(values, 0, None).astype(np.int64)
    shifted = exact >> (16 - bits) << (16 - bits)
    return bool((shifted == exact).all() or (shifted | shifted >> bits == exact).all())
