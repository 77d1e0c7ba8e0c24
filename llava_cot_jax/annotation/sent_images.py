"""Images as they are sent to an endpoint: upright, of bounded size, in a format that endpoints read, as data URLs."""

import base64
import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from PIL import ExifTags, Image

from llava_cot_jax.errors import UserError
from llava_cot_jax.processing.images import MAX_PIXELS_TO_SHRINK, open_image, pillow_limit

_SENT_AS_THEY_ARE = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}
"""Media types of the formats that endpoints read."""

_PLAIN_MODES = ("L", "P", "RGB")
"""Modes of Pillow whose images look the same to whoever decodes them, if they have no transparency."""

_JPEG_QUALITY = 95

_LARGE = 25_000_000
"""Number of pixels from which images are decoded one at a time, as each takes hundreds of megabytes."""

_one_large = threading.Lock()


@contextmanager
def reading_images() -> Iterator[None]:
    """Let threads call ``image_url`` in the block: Pillow's limit and Python's filter of warnings hold for them all."""
    Image.init()  # formats that are registered while another thread reads would be unknown to it
    with warnings.catch_warnings(action="ignore"), pillow_limit(MAX_PIXELS_TO_SHRINK):
        yield


def image_url(content: bytes, max_side: int) -> str:
    """Return the data URL of an image file, which shows what the model is trained on: the result of ``open_image``.

    The file is written anew only where it has to be turned, shrunk or converted, or would be shown differently. It is
    called within ``reading_images``.

    Args:
        content: Content of the file.
        max_side: Longest side in pixels. A larger image is shrunk.

    Raises:
        UserError: It is no image, is too large, or is damaged.
    """
    try:
        return _image_url(content, max_side)
    except UserError:
        raise
    except Exception as fault:  # damaged data makes Pillow's readers raise almost anything
        raise UserError(f"the image of {len(content)} bytes cannot be sent: {' '.join(str(fault).split())}") from fault


def _image_url(content: bytes, max_side: int) -> str:
    try:
        with Image.open(io.BytesIO(content)) as file:
            pixels = file.width * file.height
    except Exception:  # which open_image tells better
        pixels = 0
    with _one_large if pixels > _LARGE else nullcontext():
        return _url_of_decoded(content, max_side)


def _url_of_decoded(content: bytes, max_side: int) -> str:
    whole = open_image(content, max_side)
    with Image.open(io.BytesIO(content)) as file:
        kind, is_upright = file.format or "", file.getexif().get(ExifTags.Base.Orientation, 1) == 1
        fits = max(file.size) <= max_side
        is_plain = file.mode in _PLAIN_MODES and not file.has_transparency_data
        is_still = not getattr(file, "is_animated", False)
    if kind in _SENT_AS_THEY_ARE and is_upright and fits and is_plain and is_still:
        return _data_url(content, _SENT_AS_THEY_ARE[kind])
    if not fits:
        width, height = (max(1, round(side * max_side / max(whole.size))) for side in whole.size)
        whole = whole.resize((width, height), Image.Resampling.LANCZOS)
    written, is_photo = io.BytesIO(), kind in ("JPEG", "MPO")
    whole.save(written, "JPEG" if is_photo else "PNG", **({"quality": _JPEG_QUALITY} if is_photo else {}))
    return _data_url(written.getvalue(), _SENT_AS_THEY_ARE["JPEG" if is_photo else "PNG"])


def _data_url(content: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
