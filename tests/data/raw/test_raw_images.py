"""Tests that image files are found in a folder and in a zip, under any folder that the archive has in front."""

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from llava_cot_jax.data.raw.images import open_images
from llava_cot_jax.data.raw.names import PREFIXES, Match
from llava_cot_jax.errors import UserError

FILES = {"sqa/train/1/image.png": b"one", "geoqa+/images/2.png": b"two", "pisc/ü.jpg": b"three"}

Writer = Callable[[Path, str], Path]


def in_folder(root: Path, prefix: str) -> Path:
    for name, content in FILES.items():
        (root / prefix / name).parent.mkdir(parents=True, exist_ok=True)
        (root / prefix / name).write_bytes(content)
    return root


def in_zip(root: Path, prefix: str) -> Path:
    with zipfile.ZipFile(root / "image.zip", "w") as archive:
        archive.mkdir("sqa")
        for name, content in FILES.items():
            archive.writestr(prefix + name, content)
    return root / "image.zip"


def zip_files(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.fixture(params=[in_folder, in_zip])
def write(request: pytest.FixtureRequest) -> Writer:
    return request.param


@pytest.mark.parametrize("prefix", [*PREFIXES, "./", "./images/"])
def test_found_under_a_prefix(tmp_path: Path, write: Writer, prefix: str) -> None:
    images = open_images(write(tmp_path, prefix))
    for name, content in FILES.items():
        for path in (name, f"./{name}", name.replace("/", "//")):
            found = images.find(path)
            assert found is not None
            assert (found.path, found.match) == (name, Match.EXACT)
            member = images.member(found.name)
            assert member is not None
            assert member.size == len(content)
            assert images.read(found.name) == content
    assert {Path(name).name for name in images.names()} == {Path(name).name for name in FILES}


@pytest.mark.parametrize("path", ["absent.png", "sqa", "sqa/train", "", ".", "..", "a\0b", "x" * 5000, "\ud800.png"])
def test_not_found(tmp_path: Path, write: Writer, path: str) -> None:
    assert open_images(write(tmp_path, "")).find(path) is None


@pytest.mark.parametrize("path", ["../outside.png", "sqa/../../outside.png", "{root}/outside.png"])
def test_nothing_outside(tmp_path: Path, write: Writer, path: str) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "outside.png").write_bytes(b"secret")
    path = path.format(root=tmp_path)
    assert open_images(write(tmp_path / "root", "")).find(path) is None


def test_a_changed_file_has_another_version(tmp_path: Path) -> None:
    """The version changes although neither name nor size does."""
    folder, archive = open_images(in_folder(tmp_path / "folder", "")), open_images(in_zip(tmp_path, ""))
    before = [folder.member("pisc/ü.jpg"), archive.member("pisc/ü.jpg")]
    os.utime(tmp_path / "folder/pisc/ü.jpg", ns=(1, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FILES, "pisc/ü.jpg", b"3hree")
        changed = open_images(in_zip(tmp_path, ""))
    for old, new in zip(before, [folder.member("pisc/ü.jpg"), changed.member("pisc/ü.jpg")], strict=True):
        assert old is not None
        assert new is not None
        assert (new.name, new.size) == (old.name, old.size)
        assert new.version != old.version


def test_another_process_opens_it_anew(tmp_path: Path, write: Writer) -> None:
    images = open_images(write(tmp_path, "images/"))
    assert images.find("pisc/ü.jpg")
    again = pickle.loads(pickle.dumps(images))
    assert again.read("images/pisc/ü.jpg") == b"three"


def test_what_a_mac_adds_is_none(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "image.zip", "w") as archive:
        archive.writestr("__MACOSX/sqa/._1.png", b"")
        archive.writestr("sqa/1.png", b"")
    assert list(open_images(tmp_path / "image.zip").names()) == ["sqa/1.png"]


def test_damage_is_named(tmp_path: Path) -> None:
    path = in_zip(tmp_path, "")
    path.write_bytes(path.read_bytes().replace(b"two", b"tvo"))
    with pytest.raises(UserError, match=r"geoqa\+/images/2\.png cannot be read from .*image\.zip: Bad CRC-32"):
        open_images(path).read("geoqa+/images/2.png")
    with pytest.raises(UserError, match=r"gone\.png cannot be read: No such file"):
        open_images(tmp_path).read("gone.png")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "there is no .*nowhere, and no parts"),
        ("train.jsonl", "train.jsonl is a text file: name a folder of images, or a zip of them"),
    ],
)
def test_no_images(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(UserError, match=message):
        open_images(tmp_path / name)


def test_links_out_of_the_folder_are_the_users_own(tmp_path: Path) -> None:
    in_folder(tmp_path / "elsewhere", "")
    (tmp_path / "images").mkdir()
    (tmp_path / "images/sqa").symlink_to(tmp_path / "elsewhere/sqa")
    found = open_images(tmp_path / "images").find("sqa/train/1/image.png")
    assert found is not None


def test_a_zip_of_nothing(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "image.zip", "w"):
        pass
    images = open_images(tmp_path / "image.zip")
    assert images.find("a.png") is None
    assert images.explain("a.png") == "there is no a.png, and no other file"


@pytest.mark.parametrize("target", ["gone.png", "a.png"])
def test_a_link_to_nothing_is_said(tmp_path: Path, target: str) -> None:
    (tmp_path / "a.png").symlink_to(target)
    images = open_images(tmp_path)
    assert images.find("a.png") is None or images.member("a.png") is None
    assert (
        images.explain("a.png") == "a.png is there, but it is no file that can be read, perhaps a link to what is gone"
    )
