"""Tests that findings about images are used again exactly where they still hold."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_cot_jax.data.raw import checks
from llava_cot_jax.data.raw.checks import Checks, check_images
from llava_cot_jax.data.raw.images import RawImages, open_images
from llava_cot_jax.errors import UserError
from tests.data.raw.raw_set import encode, noise
from tests.data.raw.test_raw_images import zip_files

GOOD = encode(noise(np.random.default_rng(0)))
CUT = GOOD[:-100] + bytes(100)  # of the same size
HUGE = io.BytesIO()
Image.new("1", (9_500, 9_500)).save(HUGE, "PNG")


def check(images: RawImages, folder: Path, *names: str, max_side: int | None = None) -> Checks:
    members = [images.member(name) for name in names]
    assert None not in members
    (folder / "checks").mkdir(exist_ok=True)
    return check_images(
        images,
        members,
        folder / "checks",
        max_side=max_side,
        task_size=2,
        workers=0,
        on_progress=lambda done, total: None,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name, content in {"a.png": GOOD, "b.png": CUT, "c.png": GOOD}.items():
        (tmp_path / "images" / name).write_bytes(content)
    return tmp_path


def test_findings_are_used_again(folder: Path) -> None:
    images = open_images(folder / "images")
    first = check(images, folder, "a.png", "b.png", "c.png")
    assert (first.faults.keys(), first.reused) == ({"b.png"}, 0)
    again = check(images, folder, "c.png", "b.png")
    assert (again.faults, again.reused, again.total) == (first.faults, 2, 2)


def test_a_replaced_file_is_checked(folder: Path) -> None:
    """Also if its size and its modification time are those of the old file, as when an archive is unpacked again."""
    images = open_images(folder / "images")
    check(images, folder, "a.png", "b.png", "c.png")
    for name, content in {"a.png": CUT, "b.png": GOOD}.items():
        path = folder / "images" / name
        times = path.stat()
        path.unlink()
        path.write_bytes(content)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    found = check(open_images(folder / "images"), folder, "a.png", "b.png", "c.png")
    assert (found.faults.keys(), found.reused) == ({"a.png"}, 1)


def test_a_changed_member_of_an_archive_is_checked(folder: Path) -> None:
    check(open_images(zip_files(folder / "a.zip", {"a.png": CUT, "c.png": GOOD})), folder, "a.png", "c.png")
    found = check(open_images(zip_files(folder / "b.zip", {"a.png": GOOD, "c.png": GOOD})), folder, "a.png", "c.png")
    assert (found.faults, found.reused) == ({}, 1)


def test_what_could_not_be_read_is_checked_again(folder: Path) -> None:
    """An archive that is fetched again has the same members, with the same checksums in its directory."""
    path = zip_files(folder / "a.zip", {"a.png": GOOD, "c.png": GOOD})
    whole = path.read_bytes()
    path.write_bytes(whole.replace(GOOD[-40:], bytes(40), 1))
    assert "Bad CRC-32" in check(open_images(path), folder, "a.png", "c.png").faults["a.png"]
    path.write_bytes(whole)
    found = check(open_images(path), folder, "a.png", "c.png")
    assert (found.faults, found.reused) == ({}, 1)


def test_memory_that_ran_out_is_no_finding(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> None:
        raise UserError("the image cannot be decoded") from MemoryError()

    images = open_images(folder / "images")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "open_image", no_memory)
        assert check(images, folder, "a.png").faults
    assert check(images, folder, "a.png") == Checks({}, reused=0, total=1)


@pytest.mark.parametrize("content", ["{cut", "[]", "{}", '{"decoder": DECODER, "findings": []}'])
def test_damaged_findings_are_not_used(folder: Path, content: str, warnings_of: pytest.LogCaptureFixture) -> None:
    images = open_images(folder / "images")
    check(images, folder, "a.png")
    (kept,) = (folder / "checks").glob("*.json")
    decoder = json.loads(kept.read_text())["decoder"]
    kept.write_text(content.replace("DECODER", json.dumps(decoder)))
    assert check(images, folder, "a.png").reused == 0
    assert warnings_of.messages == [f"{kept} is damaged: the images that it is about are checked again"]


def test_another_decoder_checks_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = open_images(folder / "images")
    check(images, folder, "a.png")
    monkeypatch.setattr(checks.PIL, "__version__", "0.1")
    assert check(images, folder, "a.png").reused == 0


def test_a_longest_side_decides_about_large_images_alone(folder: Path) -> None:
    (folder / "images/huge.png").write_bytes(HUGE.getvalue())
    images, names = open_images(folder / "images"), ["a.png", "b.png", "huge.png"]
    whole = check(images, folder, *names)
    assert whole.faults["huge.png"].endswith(
        "90250000 pixels, more than the 89478485 allowed; scale it down, or give --max_side to shrink such images"
    )
    smaller = check(images, folder, *names, max_side=100)
    assert (smaller.faults.keys(), smaller.reused) == ({"b.png"}, 2)
    assert check(images, folder, *names, max_side=100).reused == 3
    assert check(images, folder, *names) == Checks(whole.faults, reused=3, total=3)
    still = check(images, folder, *names, max_side=9_499)
    assert still.reused == 2
    assert "still has more than the 89478485 allowed" in still.faults["huge.png"]
