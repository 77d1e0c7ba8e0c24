"""Images of a page, each embedded once, and smaller where there are many."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llava_cot_jax.errors import UserError
from llava_cot_jax.processing.images import ImageSource, open_image

SMALL_IMAGE_SIDE = 200
"""Longer side, in pixels, below which an image is shown enlarged, each pixel as a square."""

ENLARGED_IMAGE_SIDE = 240
"""Longer side, in pixels, of an enlarged image."""

SMALLEST_BOUND, LARGEST_BOUND = 480, 1024
"""Least and greatest bound, in pixels, of the longer side of images that are not small."""

LARGEST_TOTAL = 128_000_000
"""Number of pixels of all images of a page together, if each were a square as long as the bound. A browser reads some
60 MB of a page in a second."""


@dataclass(frozen=True)
class EmbeddedImage:
    """Image of a page.

    Attributes:
        number: Number of the image, from 1.
        uri: The image itself, as a ``data:`` URL; empty where it cannot be read.
        width: Width, in pixels, at which it is shown.
        height: Height, in pixels, at which it is shown.
        small: Whether it is enlarged, each pixel as a square.
        fault: Reason why it cannot be shown; empty for an image that can.
    """

    number: int
    uri: str = ""
    width: int = 0
    height: int = 0
    small: bool = False
    fault: str = ""


@dataclass
class PageImages:
    """Images of a page. One that several questions are about is embedded once.

    Attributes:
        bound: Bound, in pixels, of the longer side of the images that are not small.
        shared: Images that were asked for more than once, in order.
    """

    bound: int
    shared: dict[int, EmbeddedImage] = field(default_factory=dict)
    _known: dict[object, EmbeddedImage] = field(default_factory=dict)

    @classmethod
    def for_number(cls, number: int) -> "PageImages":
        """Return no images yet, with the bound for a number of them."""
        bound = math.isqrt(LARGEST_TOTAL // max(number, 1))
        return cls(min(max(bound, SMALLEST_BOUND), LARGEST_BOUND))

    def embed(self, sources: Sequence[ImageSource]) -> list[EmbeddedImage]:
        """Return the images of a question."""
        return [self._embed(source) for source in sources]

    def _embed(self, source: ImageSource) -> EmbeddedImage:
        key = source if isinstance(source, str | Path | bytes) else id(source)
        if (image := self._known.get(key)) is not None:
            if image.uri:
                self.shared[image.number] = image
            return image
        image = _embedded(source, len(self._known) + 1, self.bound)
        self._known[key] = image
        return image


def _embedded(source: ImageSource, number: int, bound: int) -> EmbeddedImage:
    """Return an image, its longer side at most ``bound`` pixels long, or the reason why it cannot be read."""
    try:
        image = open_image(source, bound)
    except UserError as fault:
        return EmbeddedImage(number, fault=str(fault))
    longer = max(image.size)
    small = longer < SMALL_IMAGE_SIDE
    scale = max(ENLARGED_IMAGE_SIDE // longer, 1) if small else 1
    file = io.BytesIO()
    if small:
        image.save(file, "PNG")
    else:
        image = image.copy()
        image.thumbnail((bound, bound))
        image.save(file, "JPEG", quality=85)
    uri = f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"
    return EmbeddedImage(number, uri, image.width * scale, image.height * scale, small)
