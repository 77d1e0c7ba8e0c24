"""Images of requests: files of all colour modes and rotations as ``data:`` URLs, and which other URLs are allowed."""

import io
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from llava_cot_jax.processing.images import open_image
from llava_cot_jax.serving import image_urls
from llava_cot_jax.serving.api_errors import ApiError
from llava_cot_jax.serving.image_urls import ImageLoader
from tests.serving.servers import data_url

CLOSED = ImageLoader(most=2, most_bytes=1 << 20, folder=None, fetches=False)

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8))

MODES = {
    "RGB": ("PNG", "RGB"),
    "grey": ("PNG", "L"),
    "black and white": ("PNG", "1"),
    "a palette": ("GIF", "P"),
    "transparent": ("PNG", "RGBA"),
    "grey and transparent": ("PNG", "LA"),
    "for print": ("JPEG", "CMYK"),
    "WebP": ("WEBP", "RGB"),
}


@pytest.mark.parametrize("name", MODES)
def test_every_colour_mode(name):
    format, mode = MODES[name]
    image = PICTURE.convert(mode)
    (loaded,) = CLOSED.load([data_url(image, format)])
    opened = open_image(loaded)
    assert opened.mode == "RGB" and opened.size == PICTURE.size
    if format == "PNG":
        assert np.array_equal(opened, image.convert("RGB"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_rotation(orientation):
    """The reference turns the pixels by what EXIF's table says of the numbers."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    (loaded,) = CLOSED.load([data_url(PICTURE, "PNG", exif=exif)])
    pixels = np.asarray(PICTURE)
    turned = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.swapaxes(0, 1),
        6: np.rot90(pixels, -1),
        7: pixels[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(pixels),
    }[orientation]
    assert np.array_equal(open_image(loaded), turned)


REFUSED = {
    "data:image/png;base64,aGVsbG8=": "invalid_image",
    "data:image/png;base64,***": "invalid_image",
    "http://127.0.0.1/x.png": "image_url_not_allowed",
    "https://example.com/x.png": "image_url_not_allowed",
    "file:///etc/passwd": "image_url_not_allowed",
    "data:image/png;base64,\ud800": "invalid_image",
    "gs://bucket/x.png": "image_url_not_allowed",
    "/etc/passwd": "image_url_not_allowed",
    "": "image_url_not_allowed",
}


@pytest.mark.parametrize("url", REFUSED)
def test_a_url_that_is_refused(url):
    with pytest.raises(ApiError) as caught:
        CLOSED.load([url])
    assert (caught.value.status, caught.value.code) == (400, REFUSED[url])


def test_more_images_than_are_taken():
    with pytest.raises(ApiError, match="there are 3 images; the server takes at most 2"):
        CLOSED.load([data_url(PICTURE)] * 3)


def test_files_of_the_folder_that_is_allowed(tmp_path: Path):
    folder = tmp_path / "images"
    folder.mkdir()
    PICTURE.save(folder / "a.png")
    PICTURE.save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    loader = ImageLoader(2, 1 << 20, folder, fetches=False)
    (loaded,) = loader.load([(folder / "a.png").as_uri()])
    assert loaded == (folder / "a.png").read_bytes()
    for name in ("../secret.png", "link.png", "missing.png", "null%00", "half\udc80"):
        with pytest.raises(ApiError, match=r"is not in the folder|cannot be read"):
            loader.load([f"{folder.as_uri()}/{name}"])
    with pytest.raises(ApiError, match="cannot be read"):
        loader.load(["file://[half-of-an-address"])
    small = ImageLoader(2, len(loaded) * 3 // 2, folder, fetches=False)
    assert small.load([(folder / "a.png").as_uri()]) == [loaded]
    with pytest.raises(ApiError, match=r"the images have more than \d+ bytes"):
        small.load([(folder / "a.png").as_uri()] * 2)


def test_a_program_is_no_image(monkeypatch):
    """Pillow would let Ghostscript run it."""
    monkeypatch.setattr(EpsImagePlugin.EpsImageFile, "load", lambda self, *_: pytest.fail("it ran"))
    with pytest.raises(ApiError, match="is a PostScript program"):
        CLOSED.load([data_url(PICTURE, "EPS")])


class _Pictures(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        file = io.BytesIO()
        PICTURE.save(file, "PNG")
        if self.path == "/slow.png":
            while True:
                self.wfile.write(b"H")
                time.sleep(0.02)
        self.send_response(200 if self.path == "/a.png" else 302)
        self.send_header("Location", self.path[1:])
        self.end_headers()
        self.wfile.write(file.getvalue())

    def log_message(self, *_: object) -> None:
        pass


def test_images_of_the_network_where_they_are_allowed(monkeypatch):
    """A redirection leads to no file, what is too large is not read to its end, and nothing is waited for for long."""
    monkeypatch.setattr(image_urls, "FETCH_SECONDS", 0.5)
    wrong = {
        "/file:///etc/passwd": "redirection|unknown url type|302",
        "/ftp://127.0.0.1:1/a.png": "unknown url type",
        "/slow.png": "cannot be fetched",
    }
    with ThreadingHTTPServer(("127.0.0.1", 0), _Pictures) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        (loaded,) = ImageLoader(2, 1 << 20, None, fetches=True).load([f"{url}/a.png"])
        assert np.array_equal(open_image(loaded), PICTURE)
        urls = {url + path: message for path, message in wrong.items()}
        urls |= {url.replace("http", "https"): "SSL", "http://[half": "Invalid IPv6 URL"}
        for each, message in urls.items():
            with pytest.raises(ApiError, match=message) as caught:
                ImageLoader(2, 1 << 20, None, fetches=True).load([each])
            assert caught.value.code == "invalid_image"
        with pytest.raises(ApiError, match="more than 10 bytes"):
            ImageLoader(2, 10, None, fetches=True).load([f"{url}/a.png"])
        server.shutdown()
