"""Images by their URLs: those that hold the image itself, and others only where the server's options allow them."""

import http.client
from dataclasses import dataclass
from pathlib import Path

from llava_cot_jax.checks import shown
from llava_cot_jax.errors import UserError
from llava_cot_jax.paths import as_path
from llava_cot_jax.processing.images import is_data_url, open_image
from llava_cot_jax.serving.api_errors import ApiError
from llava_cot_jax.serving.timed_fetch import fetch_in_time

FETCH_SECONDS = 20.0
"""Time in which an image must have come from the network."""


@dataclass(frozen=True)
class ImageLoader:
    """Reads the images of requests.

    Attributes:
        most: Largest number of images of a request.
        most_bytes: Largest number of bytes of the images of a request.
        folder: Folder whose files may be named by ``file://`` URLs; None allows no such URL.
        fetches: Whether ``http://`` and ``https://`` URLs are fetched.
    """

    most: int
    most_bytes: int
    folder: Path | None
    fetches: bool

    def load(self, urls: list[str]) -> list[bytes | str]:
        """Return the images, files or ``data:`` URLs, all of which can be decoded.

        Raises:
            ApiError: There are too many, or they are too large, or one cannot be read, or is not allowed.
        """
        if len(urls) > self.most:
            raise _refused(f"there are {len(urls)} images; the server takes at most {self.most} (--max_images)")
        images, left = [], self.most_bytes
        for url in urls:
            try:
                images.append(self._read(url, left + 1))
                left -= len(images[-1])
                if left < 0:
                    raise _refused(f"the images have more than {self.most_bytes} bytes (--max_body_mb)")
                open_image(images[-1])
            except UnicodeError:
                raise _refused("the URL of an image has a character that no URL can have") from None
            except UserError as fault:
                raise _refused(str(fault)) from None
        return images

    def _read(self, url: str, most_bytes: int) -> bytes | str:
        if is_data_url(url):
            return url
        scheme = url.partition(":")[0].lower()
        if scheme in ("http", "https") and self.fetches:
            return self._fetch(url, most_bytes)
        if scheme == "file" and self.folder is not None:
            return self._read_file(url, self.folder, most_bytes)
        remedy = {"http": "--fetch_images", "https": "--fetch_images", "file": "--local_images FOLDER"}.get(scheme)
        allowed = f", or start the server with {remedy}" if remedy else ""
        message = f"an image has a URL that is not allowed: give a data: URL{allowed}"
        raise ApiError(400, "image_url_not_allowed", message, param="messages")

    def _read_file(self, url: str, folder: Path, most_bytes: int) -> bytes:
        try:
            path = as_path(url).resolve()
            if not path.is_relative_to(folder.resolve()):
                raise _refused(f"{url} is not in the folder of --local_images")
            with path.open("rb") as file:
                return file.read(most_bytes)
        except (OSError, ValueError) as fault:  # ValueError: a null character, or half of an address
            raise _refused(f"{url} cannot be read: {getattr(fault, 'strerror', None) or fault}") from None

    def _fetch(self, url: str, most_bytes: int) -> bytes:
        try:
            return fetch_in_time(url, most_bytes, FETCH_SECONDS)
        except (OSError, ValueError, http.client.HTTPException) as fault:
            raise _refused(f"{shown(url)} cannot be fetched: {fault}") from None


def _refused(message: str) -> ApiError:
    return ApiError(400, "invalid_image", message, param="messages")
