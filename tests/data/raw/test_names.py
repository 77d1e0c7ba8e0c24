"""Tests that a path finds the one file that it can mean, whatever its spelling, and no other."""

import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from llava_cot_jax.data.raw.images import RawImages, open_images
from llava_cot_jax.data.raw.names import Found, Match, NameIndex, clean_path, contradictory_folders
from tests.data.raw.test_raw_images import zip_files

FILES = ["sqa/train/1/image.png", "sqa/train/2/image.png", "geoqa+/a b.png", "pisc/über.JPG", "vg/1.png", "vg/I.png"]

ROOT = Path("/data/my images")


def index(*names: str, root: Path = ROOT) -> NameIndex:
    return NameIndex(names or FILES, root)


class TestFind:
    @pytest.mark.parametrize(
        ("path", "name"),
        [
            ("sqa\\train\\1\\image.png", "sqa/train/1/image.png"),
            (".\\sqa\\train\\1\\image.png", "sqa/train/1/image.png"),
            ("/sqa/train/1/image.png", "sqa/train/1/image.png"),
            ("SQA/Train/1/IMAGE.PNG", "sqa/train/1/image.png"),
            ("geoqa+/a%20b.png", "geoqa+/a b.png"),
            ("geoqa%2B%2Fa%20b.png", "geoqa+/a b.png"),
            (" geoqa+ / a b.png \n", "geoqa+/a b.png"),
            (unicodedata.normalize("NFD", "pisc/über.jpg"), "pisc/über.JPG"),
            (unicodedata.normalize("NFC", "PISC/ÜBER.jpg"), "pisc/über.JPG"),
            ("vg/x/../1.PNG", "vg/1.png"),
        ],
    )
    def test_other_spellings(self, path: str, name: str) -> None:
        assert index().find(path) == Found(name, name, Match.SPELLING)
        inside = index(*(f"image_files/{name}" for name in FILES))
        assert inside.find(path) == Found(f"image_files/{name}", name, Match.SPELLING)

    @pytest.mark.parametrize(
        "name", ["a%20b.png", "x\\y.png", unicodedata.normalize("NFD", "ü.png"), " c.png", "d//e.png"]
    )
    def test_names_that_are_spelled_oddly_themselves(self, name: str) -> None:
        assert (found := index("other.png", name).find(clean_path(name)))
        assert found.name == name

    @pytest.mark.parametrize(
        "front",
        [
            "/data/my images/",
            "/data/my%20images/",
            "file:///data/my images/",
            "my images/",
            "data/my images/",
            "images/",
        ],
    )
    def test_the_folder_itself_in_front(self, front: str) -> None:
        found = index().find(f"{front}sqa/train/1/image.png")
        assert found
        assert (found.path, found.match) == ("sqa/train/1/image.png", Match.OWN_FOLDER)

    @pytest.mark.parametrize("front", ["/home/me/", "C:\\Users\\me\\", "../", "https://host/", "llava/", "a/b/c/"])
    def test_folders_too_many(self, front: str) -> None:
        found = index().find(f"{front}sqa/train/1/image.png")
        assert found
        assert found.name == found.path == "sqa/train/1/image.png"
        assert found.match == (Match.SPELLING if front == "../" else Match.OTHER_FOLDER)

    @pytest.mark.parametrize("path", ["train/1/image.png", "1/image.png", "Train\\1\\image.png", "a b.png", "über.jpg"])
    def test_folders_too_few(self, path: str) -> None:
        found = index().find(path)
        assert found
        assert found.match == Match.OTHER_FOLDER
        assert found.path.casefold() == path.replace("\\", "/").casefold()
        assert found.name.endswith(found.path)

    def test_another_folder_on_top(self) -> None:
        names = [f"LLaVA-CoT images/{name}" for name in FILES]
        for path in ("sqa/train/1/image.png", "image_files/sqa/train/1/image.png"):
            found = index(*names).find(path)
            assert found == Found(names[0], "sqa/train/1/image.png", Match.OTHER_FOLDER)

    @pytest.mark.parametrize(
        "path",
        [
            "image.png",  # of two
            "sqa/train/3/image.png",
            "vg/train/1/image.png",  # of another set, though that file does not exist
            "sqa/2/image.png",
            "vg/a b.png",  # there is a folder vg
            "a b.jpg",
            "",
            "/",
            "..",
            "a\0b",
            "\ud800",
            "../" * 2000,
        ],
    )
    def test_nothing_is_guessed(self, path: str) -> None:
        assert index().find(path) is None

    def test_letter_case_decides_between_two(self) -> None:
        names = index("a/x.png", "a/X.png")
        assert (found := names.find("b\\a\\X.png"))
        assert found.name == "a/X.png"
        assert names.find("A/x.PNG") is None
        assert names.explain("A/x.PNG") == "A/x.PNG may be any of 2 files, such as a/X.png and a/x.png"


class TestContradiction:
    """A folder of one set alone, named as the images of several sets."""

    def found(self, root: str, *paths: str) -> list[Found]:
        names = NameIndex(["train/1.png", "train/2.png"], Path(root))
        return [found for path in paths if (found := names.find(path))]

    def test_two_sets_are_not_one(self) -> None:
        found = self.found("/data/pictures", "sqa/train/1.png", "vg/train/1.png", "vg/train/2.png", "train/2.png")
        assert contradictory_folders(found) == {"sqa", "vg"}

    def test_the_folders_own_name_is_certain(self) -> None:
        found = self.found("/data/sqa", "sqa/train/1.png", "vg/train/1.png", "vg/train/2.png")
        assert contradictory_folders(found) == {"vg"}

    def test_one_set_with_more_and_fewer_folders(self) -> None:
        found = self.found("/data/x", "coco/train/1.png", "/old/coco/train/1.png", "train/1.png", "coco/train/2.png")
        assert len(found) == 4
        assert contradictory_folders(found) == set()


class TestExplanation:
    @pytest.mark.parametrize(
        ("path", "near"),
        [
            ("sqa/train/1/imag.png", "sqa/train/1/image.png"),
            ("sqa/train/1/image.jpeg", "sqa/train/1/image.png"),
            ("sqb/train/2/image.png", "sqa/train/2/image.png"),
            ("vg\\1.jpg", "vg/1.png"),
            ("pisc/uber.jpg", "pisc/über.JPG"),
        ],
    )
    def test_the_nearest_name(self, path: str, near: str) -> None:
        assert index().explain(path) == f"there is no {clean_path(path)}; the nearest name is {near}"

    def test_no_file_at_all(self, tmp_path: Path) -> None:
        assert open_images(tmp_path).explain("a.png") == "there is no a.png, and no other file"

    def test_names_that_are_no_text(self) -> None:
        assert index("a\udcff.png").explain("b.png").encode() == b"there is no b.png; the nearest name is a?.png"


@pytest.mark.slow
def test_one_hundred_thousand() -> None:
    """All files have the same last name. A search among all of them for each path would take many minutes."""
    names = NameIndex([f"set{i % 10}/train/{i}/image.png" for i in range(100_000)], ROOT)
    for i in range(0, 100_000, 20):
        assert names.find(f"SET{i % 10}\\train\\{i}\\image.png")
        assert names.find(f"train/{i}/image.png")
        assert "nearest name is set" in names.explain(f"set{i % 10}/test/{i}/image.png")


def write_folder(root: Path, names: list[str]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def write_archive(root: Path, names: list[str]) -> Path:
    root.mkdir(exist_ok=True)
    return zip_files(root / "image.zip", {name: name.encode() for name in names})


@pytest.mark.parametrize("write", [write_folder, write_archive])
def test_in_folders_and_archives(tmp_path: Path, write: Callable[[Path, list[str]], Path]) -> None:
    images = open_images(write(tmp_path / "x", FILES))
    for path in ("VG\\1.PNG", f"{tmp_path}/x/vg/1.png", "elsewhere/vg/1.png"):
        found = images.find(path)
        assert found
        assert images.read(found.name) == b"vg/1.png"
        assert images.member(found.name)


def test_linked_folders_are_searched(tmp_path: Path) -> None:
    write_folder(tmp_path / "disk", ["1.png"])
    write_folder(tmp_path / "images", ["sqa/2.png"])
    (tmp_path / "images/coco").symlink_to(tmp_path / "disk")
    (tmp_path / "images/coco/back").symlink_to(tmp_path / "images")
    images = open_images(tmp_path / "images")
    assert sorted(images.names()) == ["coco/1.png", "sqa/2.png"]
    assert (found := images.find("COCO/1.png"))
    assert found.name == "coco/1.png"


def test_names_in_utf8_that_the_archive_does_not_declare(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "image.zip", "w") as archive:
        archive.writestr("pisc/xxxx.png", b"four bytes")
    content = (tmp_path / "image.zip").read_bytes()
    (tmp_path / "image.zip").write_bytes(content.replace(b"xxxx", "üß".encode()))
    images = open_images(tmp_path / "image.zip")
    assert (found := images.find("pisc/üß.png"))
    assert images.read(found.name) == b"four bytes"


class TestSuggestion:
    def suggest(self, images: RawImages, *paths: str) -> str:
        assert not [path for path in paths if images.find(path)]
        return images.suggest(paths)

    def test_a_folder_beside_and_above(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "images", ["images/sqa/1.png", "images/vg/2.png"])
        write_folder(tmp_path / "labels", ["a/b.txt"])
        end = f", but {tmp_path}/images has 2 of 3 images that are missing: name it by --images"
        paths = ("sqa/1.png", "vg\\2.png", "gone/3.png")
        assert self.suggest(open_images(tmp_path / "labels"), *paths) == end
        assert self.suggest(open_images(tmp_path / "images/images/sqa"), "vg/2.png").startswith(
            f", but {tmp_path}/images/images has 1 of 1"
        )
        archive = zip_files(tmp_path / "labels.zip", {"a.txt": b""})
        assert self.suggest(open_images(archive), *paths) == end

    def test_one_of_two_copies(self, tmp_path: Path) -> None:
        write_folder(tmp_path, ["new/sqa/1.png", "old/sqa/1.png", "new/sqa/2.png"])
        assert self.suggest(open_images(tmp_path), "sqa/1.png").startswith(f", but {tmp_path}/new has 1 of 1")

    def test_none(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "images", ["sqa/1.png"])
        assert self.suggest(open_images(tmp_path / "images"), "vg/2.png", "x" * 5000) == ""

    @pytest.mark.parametrize(
        ("name", "content", "end"),
        [
            ("image.zip", b"PK\x03\x04", ", but image.zip is a zip archive: name it by --images, or unpack it"),
            (
                "a.tar",
                bytes(257) + b"ustar",
                ", but a.tar is a tar archive: unpack it by `tar -xf a.tar`, and name the",
            ),
            (
                "1.parquet",
                b"PAR1",
                ", but 1.parquet is a Parquet file: write its images to files, and name their folder",
            ),
            ("a.7z.001", b"7z\xbc\xaf\x27\x1c", ", but a.7z.001 is a 7z archive: unpack it by `7z x a.7z.001`"),
            ("notes.txt", b"Words.", ""),
            ("notes.jpg.md5", b"", ""),
        ],
    )
    def test_files_that_have_the_images_in_them(self, tmp_path: Path, name: str, content: bytes, end: str) -> None:
        folder = tmp_path / "data/images"
        folder.mkdir(parents=True)
        (folder / name).write_bytes(content)
        assert (self.suggest(open_images(folder), "a.png") or end).startswith(end)
        assert bool(self.suggest(open_images(folder), "a.png")) == bool(end)

    def test_an_archive_in_an_archive(self, tmp_path: Path) -> None:
        (tmp_path / "data/here").mkdir(parents=True)
        archive = zip_files(tmp_path / "data/here/image.zip", {"vg.zip": b"PK\x03\x04"})
        assert self.suggest(open_images(archive), "vg/1.png") == (
            ", but vg.zip is a zip archive: unpack it by `unzip vg.zip`, and name the folder of the images"
        )
