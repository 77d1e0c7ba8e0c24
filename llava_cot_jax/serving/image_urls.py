"""Images by their URLs: those that hold the image itself, and others only where the server's options allow them."""

import http.client
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from llava_cot_jax.errors import UserError
from llava_cot_jax.paths import as_path
from llava_cot_jax.processing.images import is_data_url, open_image
from llava_cot_jax.serving.api_errors import ApiError

FETCH_SECONDS = 20.0
"""Time in which each read of an image from the network must bring something."""


@dataclass(frozen=True)
class ImageLoader:
    """Reads the images of requests.

    Attributes:
        most: Largest number of images of a request.
        most_bytes: Largest number of bytes of an image that is fetched.
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
            ApiError: There are too many, or one cannot be read, or is not allowed.
        """
        if len(urls) > self.most:
            raise _refused(f"there are {len(urls)} images; the server takes at most {self.most} (--max_images)")
        images = [self._read(url) for url in urls]
        for image in images:
            try:
                open_image(image)
            except UserError as fault:
                raise _refused(str(fault)) from None
        return images

    def _read(self, url: str) -> bytes | str:
        if is_data_url(url):
            return url
        scheme = url.partition(":")[0].lower()
        if scheme in ("http", "https") and self.fetches:
            return self._fetch(url)
        if scheme == "file" and self.folder is not None:
            return self._read_file(url, self.folder)
        remedy = {"http": "--fetch_images", "https": "--fetch_images", "file": "--local_images FOLDER"}.get(scheme)
        allowed = f", or start the server with {remedy}" if remedy else ""
        message = f"an image has a URL that is not allowed: give a data: URL{allowed}"
        raise ApiError(400, "image_url_not_allowed", message, param="messages")

    def _read_file(self, url: str, folder: Path) -> bytes:
        try:
            path = as_path(url).resolve()
            if not path.is_relative_to(folder.resolve()):
                raise _refused(f"{url} is not in the folder of --local_images")
            return path.read_bytes()
        except UserError as fault:
            raise _refused(str(fault)) from None
        except OSError as fault:
            raise _refused(f"{url} cannot be read: {fault.strerror}") from None

    def _fetch(self, url: str) -> bytes:
        host = urlsplit(url).hostname
        try:
            with urllib.request.urlopen(url, timeout=FETCH_SECONDS) as found:  # follows http and https alone, and ftp
                content: bytes = found.read(self.most_bytes + 1)
        except (OSError, ValueError, http.client.HTTPException) as fault:
            raise _refused(f"the image of {host} cannot be fetched: {fault}") from None
        if len(content) > self.most_bytes:
            raise _refused(f"the image of {host} has more than {self.most_bytes} bytes")
        return content


def _refused(message: str) -> ApiError:
    return ApiError(400, "invalid_image", message, param="messages")
