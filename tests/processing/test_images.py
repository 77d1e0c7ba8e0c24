"""Images: every kind becomes the right RGB, and tiles are those of transformers, bit for bit."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.mllama.image_processing_pil_mllama import (
    MllamaImageProcessorPil,
    get_all_supported_aspect_ratios,
    get_image_size_fit_to_canvas,
    get_optimal_tiled_canvas,
)

from llava_cot_jax.errors import UserError
from llava_cot_jax.model.config import VisionConfig
from llava_cot_jax.model.vision_tower import normalize
from llava_cot_jax.processing import images
from llava_cot_jax.processing.images import batch_images, check_image, check_vision, fit_canvas, open_image

RNG = np.random.default_rng(0)


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rgb(*pixels: tuple[int, int, int]) -> np.ndarray:
    """The array of an image one pixel high."""
    return np.array([pixels], np.uint8)


def row(mode: str, *pixels: object) -> Image.Image:
    """An image one pixel high."""
    image = Image.new(mode, (len(pixels), 1))
    for x, pixel in enumerate(pixels):
        image.putpixel((x, 0), pixel)
    return image


def palette(*, mode: str = "P") -> Image.Image:
    """Two palette pixels, red and green."""
    image = Image.new(mode, (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1 if mode == "P" else (1, 255))
    return image


RED_GREEN = rgb((255, 0, 0), (0, 255, 0))
GREY16 = np.array([[0, 257, 32768, 65535]], np.uint16)
SCALED = rgb((0, 0, 0), (1, 1, 1), (128, 128, 128), (255, 255, 255))

COLOURS = {
    "rgb": (encode(row("RGB", (1, 2, 3), (200, 100, 0))), rgb((1, 2, 3), (200, 100, 0))),
    "rgb with a transparent colour": (encode(row("RGB", (1, 2, 3)), transparency=(1, 2, 3)), rgb((255, 255, 255))),
    "alpha": (
        encode(row("RGBA", (9, 8, 7, 0), (1, 2, 3, 128), (5, 6, 7, 255))),
        rgb((255, 255, 255), (128, 128, 129), (5, 6, 7)),
    ),
    "grey with alpha": (encode(row("LA", (40, 0), (50, 255))), rgb((255, 255, 255), (50, 50, 50))),
    "palette": (encode(palette()), RED_GREEN),
    "palette with a transparent colour": (encode(palette(), transparency=0), rgb((255, 255, 255), (0, 255, 0))),
    "palette with alpha values": (encode(palette(), transparency=b"\x00\x80"), rgb((255, 255, 255), (127, 255, 127))),
    "palette and alpha bands": (palette(mode="PA"), rgb((255, 255, 255), (0, 255, 0))),
    "one bit": (encode(row("1", 0, 1)), rgb((0, 0, 0), (255, 255, 255))),
    "grey": (encode(row("L", 0, 77)), rgb((0, 0, 0), (77, 77, 77))),
    "16-bit png": (encode(Image.fromarray(GREY16)), SCALED),
    "16-bit tiff": (encode(Image.fromarray(GREY16), "TIFF"), SCALED),
    "16-bit big-endian": (Image.frombytes("I;16B", (4, 1), GREY16.astype(">u2").tobytes()), SCALED),
    "32-bit integers": (Image.fromarray(GREY16.astype(np.int32)), SCALED),
    "negative integers": (Image.fromarray(np.array([[-70000, 65535]], np.int32)), rgb((0,) * 3, (255,) * 3)),
    "beyond 16 bits": (Image.fromarray(np.array([[0, 100_000]], np.int32)), rgb((0,) * 3, (255,) * 3)),
    "floats to 1": (encode(Image.fromarray(GREY16.astype(np.float32) / 65535), "TIFF"), SCALED),
    "floats to 255": (
        Image.fromarray(np.array([[2.0, np.nan, 254.0]], np.float32)),
        rgb((2,) * 3, (0,) * 3, (254,) * 3),
    ),
    "floats to 65535": (Image.fromarray(GREY16.astype(np.float32)), SCALED),
    "cmyk": (encode(row("CMYK", (0, 255, 255, 0), (0, 0, 0, 128)), "TIFF"), rgb((255, 0, 0), (127, 127, 127))),
    "ycbcr": (row("YCbCr", (255, 128, 128), (0, 128, 128)), rgb((255, 255, 255), (0, 0, 0))),
    "hsv": (row("HSV", (0, 255, 255), (0, 0, 9)), rgb((255, 0, 0), (9, 9, 9))),
    "gif": (encode(palette(), "GIF"), RED_GREEN),
    "webp": (
        encode(row("RGBA", (9, 8, 7, 255), (1, 2, 3, 128)), "WEBP", lossless=True),
        rgb((9, 8, 7), (128, 128, 129)),
    ),
}


def png16(values: list[int], *chunks: bytes) -> bytes:
    """A PNG of one row of 16-bit greys, with more chunks before the pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", len(values), 1, 16, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + np.array(values, ">u2").tobytes()))
    more = b"".join(chunk(c[:4], c[4:]) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + head + more + pixels + chunk(b"IEND", b"")


def tiff12(values: list[int]) -> bytes:
    """A TIFF of one row of an even number of greys that are packed in 12 bits each."""
    bits = "".join(f"{value:012b}" for value in values)
    packed = int(bits, 2).to_bytes(len(bits) // 8, "big")
    tags = [(256, 3, len(values)), (257, 3, 1), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1)]
    tags += [(278, 3, 1), (279, 4, len(packed))]
    start = 8 + len(packed) + len(packed) % 2
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    body = packed + b"\0" * (len(packed) % 2)
    return b"II*\0" + struct.pack("<I", start) + body + struct.pack("<H", len(tags)) + entries + b"\0\0\0\0"


def tiff16(values: list[int], largest: int) -> bytes:
    """A TIFF of 16-bit greys that states a largest value."""
    return encode(Image.fromarray(np.array([values], np.uint16)), "TIFF", tiffinfo={281: largest})


def full(*values: float) -> list[int]:
    return [round(255 * value) for value in values]


DEPTHS = {
    # Greys as shares of the full scale: what the file states, or else the smallest usual depth that holds them.
    "8 bits in 16": (png16([0, 100, 255]), full(0, 100 / 255, 1)),
    "10 bits in 16": (png16([0, 512, 1000]), full(0, 512 / 1023, 1000 / 1023)),
    "12 bits in 16": (png16([0, 2048, 4095]), full(0, 2048 / 4095, 1)),
    "14 bits in 16": (png16([0, 8000, 16000]), full(0, 8000 / 16383, 16000 / 16383)),
    "16 bits": (png16([0, 16384, 40000]), full(0, 16384 / 65535, 40000 / 65535)),
    "10 bits in 16, a TIFF": (
        encode(Image.fromarray(np.array([[0, 512, 1000]], np.uint16)), "TIFF"),
        full(0, 0.5, 0.98),
    ),
    "12 bits stated, dark": (png16([0, 100, 200], b"sBIT\x0c"), full(0, 100 / 4095, 200 / 4095)),
    "16 bits stated, dark": (png16([0, 4000, 9000], b"sBIT\x10"), full(0, 4000 / 65535, 9000 / 65535)),
    "12 bits stated, scaled up": (png16([0, 2048 << 4, 4095 << 4], b"sBIT\x0c"), full(0, 0.5, 1)),
    "12 bits stated, scaled up, dark": (png16([0, 100 << 4, 200 << 4], b"sBIT\x0c"), full(0, 100 / 4096, 200 / 4096)),
    "12 bits stated, copied bits, dark": (
        png16([0, 200 << 4 | 200 >> 8, 255 << 4 | 255 >> 8], b"sBIT\x0c"),
        full(0, 200 / 4095, 255 / 4095),
    ),
    "12 bits packed, dark": (tiff12([0, 300, 600, 60]), full(0, 300 / 4095, 600 / 4095, 60 / 4095)),
    "a largest value of 12 bits, dark": (tiff16([0, 300, 600], 4000), full(0, 300 / 4095, 600 / 4095)),
    "a largest value of 16 bits, dark": (tiff16([0, 300, 600], 65535), full(0, 300 / 65535, 600 / 65535)),
    "a portable grey map states its depth": (
        b"P5 3 1 65535\n" + np.array([0, 300, 600], ">u2").tobytes(),
        full(0, 0.0046, 0.0092),
    ),
    "a portable grey map of 12 bits": (
        b"P5 3 1 4095\n" + np.array([0, 300, 600], ">u2").tobytes(),
        full(0, 0.0733, 0.1465),
    ),
    "black": (png16([0, 0, 0]), [0, 0, 0]),
}


@pytest.mark.parametrize("name", DEPTHS)
def test_the_true_depth_of_greys(name: str) -> None:
    source, expected = DEPTHS[name]
    found = np.asarray(open_image(source)).astype(int)
    np.testing.assert_allclose(found, np.repeat(np.array(expected)[None, :, None], 3, 2), atol=1)


DEEP = ("I;16", "I;16B", "I", "F")
"""Modes of more than 8 bits, which transformers clips at 255."""


def decoded(source: bytes | Image.Image) -> Image.Image:
    return source if isinstance(source, Image.Image) else Image.open(io.BytesIO(source))


@pytest.mark.parametrize("name", COLOURS)
def test_colours(name: str) -> None:
    source, expected = COLOURS[name]
    image = open_image(source)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), expected)
    if decoded(source).mode not in DEEP:
        there = MllamaImageProcessorPil().convert_to_rgb(decoded(source))
        np.testing.assert_array_equal(there, expected)


def test_jpeg_modes(tmp_path: Path) -> None:
    """Lossy files of grey, CMYK and YCbCr, read by path, as text and as a Path."""
    path = tmp_path / "grey.jpg"
    path.write_bytes(encode(Image.new("L", (16, 16), 90), "JPEG"))
    for source in (path, str(path)):
        assert open_image(source).getpixel((8, 8)) == (90, 90, 90)
    cyan = open_image(encode(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=100))
    np.testing.assert_allclose(cyan.getpixel((8, 8)), (0, 255, 255), atol=3)
    blue = open_image(encode(Image.new("RGB", (16, 16), (0, 0, 255)), "JPEG", quality=100))
    np.testing.assert_allclose(blue.getpixel((8, 8)), (0, 0, 255), atol=3)


STORED = {
    # How a file of each EXIF orientation stores the upright picture.
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(orientation: int) -> None:
    upright = np.asarray(noise(2, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    np.testing.assert_array_equal(np.asarray(open_image(encode(stored, exif=exif))), upright)


def test_bad_exif_is_no_obstacle() -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xffgarbage"
    with pytest.warns(UserWarning, match="EXIF"):
        assert open_image(encode(Image.new("L", (8, 8), 90), "JPEG", exif=exif)).getpixel((4, 4)) == (90, 90, 90)


def test_the_callers_image_is_left_alone() -> None:
    image = palette()
    image.info["transparency"] = 0
    open_image(image)
    assert image.mode == "P" and image.info == {"transparency": 0}


def test_nothing_is_copied_in_vain(tmp_path: Path) -> None:
    image = noise(3, 4)
    assert open_image(image) is image
    path = tmp_path / "image.jpg"
    path.write_bytes(encode(image, "JPEG"))
    assert open_image(path).format == "JPEG"  # a copy would not know


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size, with next to no data."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b"")]
    parts = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


WHOLE = {kind: encode(noise(50, 70), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")}

MISTAKES = {
    "missing": ("/no/such/picture.png", "image /no/such/picture.png does not exist"),
    "missing, two lines": ("/no/such\npicture.png", "image /no/such picture.png does not exist"),
    "folder": (Path(__file__).parent, "cannot be read: Is a directory"),
    "null character": ("a\0b.png", "cannot be read"),
    "empty": (b"", "the image of 0 bytes is not an image"),
    "text": (b"<html>404 Not Found</html>", "is not an image"),
    "no pixels": (Image.new("RGB", (0, 4)), r"has no pixels \(0 x 4\)"),
    "unknown mode": (Image.new("La", (2, 2)), "conversion from La"),
    "a URL without data": ("data:image/png", "the image of a data: URL of 14 characters has no data"),
    "a URL of other text": ("data:image/png;base64,%%%%", "is not base64"),
    "a URL of no image": ("data:,hello", "the image of a data: URL of 11 characters is not an image"),
    "bomb": (png_header(30_000, 30_000), "more than the 89478485 pixels"),
    **{f"half a {kind}": (data[: len(data) // 2], "damaged") for kind, data in WHOLE.items()},
    "flipped bytes": (WHOLE["PNG"][:100] + bytes(200) + WHOLE["PNG"][300:], "damaged"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    source, message = MISTAKES[name]
    with pytest.raises(UserError, match=message) as mistake:
        open_image(source)
    assert "\n" not in str(mistake.value)


def test_a_bomb_below_pillows_error() -> None:
    """Between once and twice the limit Pillow only warns, or, where warnings are errors, raises its own."""
    bomb = png_header(10_000, 10_000)
    before = list(warnings.filters)
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(UserError, match="100000000 pixels"):
        open_image(bomb)
    assert warnings.filters == before
    with warnings.catch_warnings(action="error"), pytest.raises(UserError, match="89478485 pixels allowed"):
        open_image(bomb)


def test_the_limit_is_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(UserError, match="more than the 89478485 allowed"):
        open_image(png_header(10_000, 10_000))
    monkeypatch.setattr(images, "MAX_PIXELS", 12)
    assert open_image(noise(3, 4)).size == (4, 3)
    with pytest.raises(UserError, match="13 pixels"):
        open_image(noise(1, 13))


# Tiles.

SMALL = VisionConfig(image_size=56)
FULL = VisionConfig()


def sizes(side: int) -> list[tuple[int, int]]:
    """(height, width) of every canvas, a pixel more and less, and the extremes."""
    canvases = [
        (h * side + d, w * side + e) for h, w in FULL.supported_aspect_ratios for d in (-1, 0, 1) for e in (0, 1)
    ]
    return [*canvases, (1, 1), (1, 2), (3, 1), (2, 3), (1, 4000), (4000, 1), (2, 3000), (999, 7)]


EVERY_SIZE = [*sizes(56), *map(tuple, RNG.integers(1, 400, (160, 2)).tolist())]
LARGE_SIZES = [(1, 4000), (560, 1120), (561, 560), (1120, 1121), (700, 333), (90, 2500)]


def reference(vision: VisionConfig, image: Image.Image, *, arithmetic: bool) -> dict[str, np.ndarray]:
    """What transformers makes of an image; without ``arithmetic``, its float32 tiles hold plain bytes."""
    return MllamaImageProcessorPil(
        size={"height": vision.image_size, "width": vision.image_size},
        max_image_tiles=vision.max_num_tiles,
        do_rescale=arithmetic,
        do_normalize=arithmetic,
        image_mean=list(vision.image_mean),
        image_std=list(vision.image_std),
    )([image])


def check_bytes(vision: VisionConfig, image: Image.Image, original: Image.Image | None = None) -> None:
    """The tiles of ``image`` are those that transformers makes of ``original``, byte for byte."""
    there = reference(vision, original or image, arithmetic=False)
    batch = batch_images([[image]], vision)
    assert set(batch) == set(there) - {"num_tiles"}
    for name, values in batch.items():
        assert values.dtype == (np.uint8 if name == "pixel_values" else np.int32)
        assert values.shape == there[name].shape
        np.testing.assert_array_equal(values, there[name])
    used = there["num_tiles"][0][0]
    assert batch["aspect_ratio_mask"].sum() == used
    assert not batch["pixel_values"][:, :, used:].any()


def check_normalized(vision: VisionConfig, image: Image.Image, original: Image.Image | None = None) -> None:
    """The tiles of ``image``, normalised on the device, and what transformers makes of ``original``."""
    there = reference(vision, original or image, arithmetic=True)
    batch = batch_images([[image]], vision)
    normalized = np.asarray(NORMALIZE(vision, batch["pixel_values"], batch["aspect_ratio_ids"]))
    assert normalized.dtype == np.float32
    np.testing.assert_allclose(normalized, there["pixel_values"], rtol=0, atol=1e-6)
    assert not normalized[:, :, there["num_tiles"][0][0] :].any()


def check_against_transformers(vision: VisionConfig, image: Image.Image, original: Image.Image | None = None) -> None:
    check_bytes(vision, image, original)
    check_normalized(vision, image, original)


NORMALIZE = jax.jit(normalize, static_argnums=0)


@pytest.mark.slow
def test_tiles_of_every_size() -> None:
    assert len(EVERY_SIZE) >= 200
    for height, width in EVERY_SIZE:
        check_against_transformers(SMALL, noise(height, width))


@pytest.mark.parametrize("size", LARGE_SIZES, ids=str)
def test_tiles_of_published_size(size: tuple[int, int]) -> None:
    check_against_transformers(FULL, noise(*size))


@pytest.mark.parametrize("name", COLOURS)
def test_tiles_of_every_colour_mode(name: str) -> None:
    source = COLOURS[name][0]
    original = None if decoded(source).mode in DEEP else decoded(source)
    check_against_transformers(SMALL, open_image(source), original)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from((14, 28, 56, 70)), st.integers(1, 6))
def test_tiles_of_other_configurations(height: int, width: int, side: int, tiles: int) -> None:
    canvases = tuple(get_all_supported_aspect_ratios(tiles))
    vision = VisionConfig(image_size=side, max_num_tiles=tiles, supported_aspect_ratios=canvases)
    check_vision(vision)
    check_bytes(vision, noise(height, width))


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, derandomize=True)
@given(st.integers(1, 20_000), st.integers(1, 20_000), st.sampled_from((56, 448, 560)), st.sampled_from((1, 4, 6, 12)))
def test_canvases_of_all_sizes(height: int, width: int, side: int, tiles: int) -> None:
    canvas = get_optimal_tiled_canvas(height, width, tiles, side)
    fitted = get_image_size_fit_to_canvas(height, width, *canvas, side)
    assert fit_canvas(height, width, tiles, side) == ((canvas[0] // side, canvas[1] // side), fitted)


def test_an_image_is_checked_by_its_beginning(tmp_path: Path) -> None:
    content = encode(noise(200, 200))
    (tmp_path / "cut.png").write_bytes(content[:100])
    check_image(tmp_path / "cut.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match="is not an image that can be read"):
        check_image(tmp_path / "text.png")
    with pytest.raises(UserError, match="nowhere does not exist"):
        check_image(str(tmp_path / "nowhere"))


def test_rows_of_unlike_length() -> None:
    wide, square, tall = (noise(*size) for size in ((20, 100), (30, 30), (200, 60)))
    batch = batch_images([[wide], [], [square, tall]], SMALL)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        "pixel_values": ((3, 2, 4, 3, 56, 56), np.uint8),
        "aspect_ratio_ids": ((3, 2), np.int32),
        "aspect_ratio_mask": ((3, 2, 4), np.int32),
    }
    assert batch["aspect_ratio_ids"].tolist() == [[2, 0], [0, 0], [1, 8]]  # 1 x 2, 1 x 1 and 4 x 1 tiles
    assert batch["aspect_ratio_mask"].sum(-1).tolist() == [[2, 1], [1, 1], [1, 4]]
    alone = batch_images([[tall]], SMALL)
    np.testing.assert_array_equal(batch["pixel_values"][2, 1], alone["pixel_values"][0, 0])
    assert not batch["pixel_values"][1].any() and not batch["pixel_values"][0, 1].any()
    assert batch_images([[], []], SMALL) == {} == batch_images([], SMALL)


def test_vision_that_cannot_be_served() -> None:
    with pytest.raises(UserError, match="num_channels is 1"):
        check_vision(VisionConfig(num_channels=1, image_mean=(0.5,), image_std=(0.5,)))
    with pytest.raises(UserError, match="supported_aspect_ratios must be"):
        check_vision(VisionConfig(supported_aspect_ratios=((1, 1), (2, 2))))
