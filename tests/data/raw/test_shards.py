"""Tests of records and shards: tfds reads what was written, and the bytes are the same every time."""

import errno
import io
import struct
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_cot_jax.data.raw.annotations import AnnotationRow
from llava_cot_jax.data.raw.images import ImageFolder, Member
from llava_cot_jax.data.raw.names import Found, Match
from llava_cot_jax.data.raw.shards import LlavaCot100k, Shard, ShardWriter, count_records, cut_into_shards, shrink
from llava_cot_jax.errors import UserError
from llava_cot_jax.processing import images
from llava_cot_jax.processing.images import open_image
from tests.data.raw.raw_set import encode, make_raw_set, noise, unusual_images

FOUND = Found("sqa/1.png", "sqa/1.png", Match.EXACT)
ENTRY = AnnotationRow(1, 0, 1, "id", "sqa", (FOUND,), (Member("sqa/1.png", 10, 0),), 0)


@settings(deadline=None)
@given(st.lists(st.integers(1, 50)), st.integers(1, 100), st.integers(1, 6))
def test_shards_are_full_and_in_order(sizes: list[int], max_bytes: int, max_rows: int) -> None:
    entries = [replace(ENTRY, line=i, images=(Member("", size, 0),)) for i, size in enumerate(sizes)]
    shards = cut_into_shards(entries, max_bytes, max_rows)
    assert [entry for shard in shards for entry in shard] == entries
    totals = [sum(entry.images[0].size for entry in shard) for shard in shards]
    for i, (shard, total) in enumerate(zip(shards, totals, strict=True)):
        assert len(shard) <= max_rows
        assert total <= max_bytes or len(shard) == 1
        if i + 1 < len(shards):  # the next row did not fit
            assert len(shard) == max_rows or total + shards[i + 1][0].images[0].size > max_bytes


class TestShrink:
    @pytest.mark.parametrize(("name", "image"), unusual_images(np.random.default_rng(0)))
    def test_unusual_kinds(self, name: str, image: bytes) -> None:
        assert shrink(image, 40) == image
        smaller = Image.open(io.BytesIO(shrink(image, 20)))
        assert smaller.format == ("JPEG" if name.endswith("jpg") else "PNG")
        assert smaller.mode == "RGB"
        assert smaller.size == ((15, 20) if name == "turned.jpg" else (20, 15))
        assert not smaller.getexif()

    def test_shows_the_same(self) -> None:
        """A picture red on its left and blue on its right, stored lying on its side."""
        upright = Image.new("RGB", (80, 60), "red")
        upright.paste("blue", (40, 0, 80, 60))
        exif = Image.Exif()
        exif[0x0112] = 6
        lying = encode(upright.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=100, exif=exif)
        smaller = np.asarray(open_image(shrink(lying, 20)), int)
        assert smaller.shape == (15, 20, 3)
        assert abs(smaller[:, :8] - (254, 0, 0)).max() < 12
        assert abs(smaller[:, 12:] - (0, 0, 254)).max() < 12

    def test_png_is_exact(self) -> None:
        image = noise(np.random.default_rng(0), 100, 60)
        smaller = open_image(shrink(encode(image), 50))
        np.testing.assert_array_equal(smaller, image.resize((50, 30), Image.Resampling.LANCZOS))

    def test_above_the_limit_of_pillow(self) -> None:
        huge = Image.new("1", (9_500, 9_500))
        huge.paste(1, (0, 0, 4_750, 9_500))
        file = encode(huge, compress_level=1)
        with pytest.raises(UserError, match="90250000 pixels"), warnings.catch_warnings(action="ignore"):
            open_image(file)
        smaller = np.asarray(open_image(shrink(file, 40)))
        assert smaller.shape == (40, 40, 3)
        assert (smaller[:, :15] == 255).all()
        assert (smaller[:, 25:] == 0).all()

    @pytest.mark.parametrize(("strip", "width"), [(1, 200), (10_000, 399)])
    @pytest.mark.parametrize(("name", "image"), unusual_images(np.random.default_rng(0)))
    def test_above_the_limit_by_kind(
        self, name: str, image: bytes, strip: int, width: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The kinds are shrunk to what they are below the limit, to within the error of shrinking twice."""
        with Image.open(io.BytesIO(image)) as file:
            large = file.resize((width, 300), Image.Resampling.NEAREST)
            options = {"exif": file.getexif(), "quality": 100} if file.format == "JPEG" else {"exif": file.getexif()}
            content = encode(large, file.format or "", **options)
        expected = np.asarray(open_image(shrink(content, 20)), int)
        monkeypatch.setattr(images, "MAX_PIXELS", 1000)
        monkeypatch.setattr(images, "_STRIP_PIXELS", strip)
        with pytest.raises(UserError, match="more than the 1000 allowed"):
            open_image(content)
        reduced = open_image(content, 20)
        assert max(reduced.size) < max(large.size) // 2
        smaller = np.asarray(open_image(shrink(content, 20)), int)
        assert smaller.shape == expected.shape
        assert abs(smaller - expected).mean() < 8

    def test_a_jpeg_above_the_limit_lies_on_its_side(self) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        lying = Image.new("L", (10_000, 19_000), 40)  # 190 million pixels, which Pillow does not even open
        lying.paste(240, (0, 0, 5_000, 19_000))
        smaller = np.asarray(open_image(shrink(encode(lying, "JPEG", exif=exif), 190)), int)
        assert smaller.shape == (100, 190, 3)
        assert abs(smaller[:45] - 240).max() < 3
        assert abs(smaller[55:] - 40).max() < 3

    def test_a_damaged_image_above_the_limit(self) -> None:
        file = encode(Image.new("1", (9_500, 9_500)))
        with pytest.raises(UserError, match="cannot be decoded"):
            shrink(file[:-1000], 40)

    def test_a_limit_for_shrinking_too(self) -> None:
        file = encode(Image.new("L", (8, 8)), "BMP").replace(
            struct.pack("<2i", 8, 8), struct.pack("<2i", 30_000, 30_000)
        )
        assert (before := Image.MAX_IMAGE_PIXELS)
        with pytest.raises(UserError, match="900000000 pixels, more than the 536870912 allowed"):
            shrink(file, 40)
        assert before == Image.MAX_IMAGE_PIXELS

    def test_a_strip_keeps_a_pixel(self) -> None:
        assert open_image(shrink(encode(Image.new("RGB", (1000, 2))), 100)).size == (100, 1)


def test_tfds_reads_finished_shards(tmp_path: Path) -> None:
    raw = make_raw_set(tmp_path, faults=False)
    folder = ImageFolder(raw.write_folder(tmp_path / "images"))
    lines = raw.annotations.read_bytes().splitlines(keepends=True)
    entries = []
    for line, row in list(raw.rows.items())[:5]:
        found = folder.find(row["image"])
        assert found is not None
        image = folder.member(found.name)
        assert image is not None
        offset, length = sum(map(len, lines[: line - 1])), len(lines[line - 1])
        entries.append(AnnotationRow(line, offset, length, row["id"], "sqa", (found,), (image,), 0))
    names = [f"llava_cot_100k-train.array_record-0000{i}-of-00002" for i in range(2)]
    shards = [
        Shard(tmp_path / name, tmp_path / f"{i}.turns", tuple(entries[3 * i :][:3])) for i, name in enumerate(names)
    ]
    for shard in shards:
        ShardWriter(raw.annotations, folder, max_side=None)(shard)
        assert count_records(shard.path) == shard.turns.read_bytes().count(b"\n") == len(shard)
    builder = LlavaCot100k({"train": shards}, data_dir=tmp_path / "tfds")
    builder.download_and_prepare()
    assert Path(builder.data_dir) == tmp_path / "tfds/llava_cot_100k/2.0.0"
    read = tfds.builder_from_directory(builder.data_dir)
    assert read.info.splits["train"].shard_lengths == [3, 2]
    source = read.as_data_source("train")
    assert len(source) == 5
    for record, (line, row) in zip(source, raw.rows.items(), strict=False):
        assert record["id"].decode() == row["id"]
        assert record["line"] == line
        assert record["source"] == b"sqa"
        assert list(record["image_paths"]) == [row["image"].encode()]
        assert list(record["images"]) == [raw.files[row["image"]]]
        said = zip(record["conversations"]["from"], record["conversations"]["value"], strict=True)
        assert [{"from": s.decode(), "value": v.decode()} for s, v in said] == row["conversations"]


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    """Shard of one row, which the writer below can write."""
    raw = make_raw_set(tmp_path, faults=False)
    image = ImageFolder(raw.write_folder(tmp_path / "images")).member("sqa/train/0/image.png")
    assert image is not None
    length = len(raw.annotations.read_bytes().splitlines()[0])
    return Shard(tmp_path / "shard", tmp_path / "turns", (replace(ENTRY, length=length, images=(image,)),))


@pytest.fixture
def write(tmp_path: Path) -> ShardWriter:
    return ShardWriter(tmp_path / "train.jsonl", ImageFolder(tmp_path / "images"), max_side=None)


def test_a_shard_is_there_whole_or_not_at_all(shard: Shard, write: ShardWriter, tmp_path: Path) -> None:
    """A shard whose second row has no image."""
    (entry,) = shard.entries
    gone = replace(entry, images=(replace(entry.images[0], name="gone.png"),))
    before = set(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"gone\.png cannot be read"):
        write(replace(shard, entries=(entry, gone)))
    assert set(tmp_path.iterdir()) == before


def test_a_full_disk_under_the_records(shard: Shard, write: ShardWriter, tmp_path: Path) -> None:
    """array_record reports a full disk only when it closes the file, and not as an OSError."""
    before = set(tmp_path.iterdir())
    (tmp_path / "shard.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as fault:
        write(shard)
    assert fault.value.errno == errno.ENOSPC
    assert set(tmp_path.iterdir()) == before
