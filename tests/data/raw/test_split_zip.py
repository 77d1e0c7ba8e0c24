"""Tests that a zip in parts is read like the whole zip, and that faults of the parts are named."""

import io
import os
import subprocess
import tempfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_cot_jax.data.raw.split_zip import PartsFile, find_parts, open_zip
from llava_cot_jax.errors import UserError
from tests.data.raw.raw_set import RawSet, make_raw_set, split


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> RawSet:
    return make_raw_set(tmp_path_factory.mktemp("raw"), faults=False)


@pytest.fixture
def parts(raw: RawSet, tmp_path: Path) -> list[Path]:
    parts = raw.write_parts(tmp_path / "hub")
    assert len(parts) > 3
    return parts


class TestPartsFile:
    @settings(deadline=None)
    @given(
        contents=st.lists(st.binary(max_size=40), min_size=1, max_size=6),
        steps=st.lists(
            st.tuples(
                st.integers(-120, 240), st.sampled_from([os.SEEK_SET, os.SEEK_CUR, os.SEEK_END]), st.integers(-1, 90)
            )
        ),
        buffer_size=st.integers(1, 32),
    )
    def test_is_the_parts_joined(
        self, contents: list[bytes], steps: list[tuple[int, int, int]], buffer_size: int
    ) -> None:
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / str(i) for i in range(len(contents))]
            for path, content in zip(paths, contents, strict=True):
                path.write_bytes(content)
            joined = io.BytesIO(b"".join(contents))
            size = len(joined.getvalue())
            with io.BufferedReader(PartsFile(paths), buffer_size) as file:
                for offset, whence, count in steps:
                    start = {os.SEEK_SET: 0, os.SEEK_CUR: joined.tell(), os.SEEK_END: size}[whence]
                    if start + offset < 0:
                        with pytest.raises(OSError, match="negative"):
                            file.seek(offset, whence)
                        file.seek(joined.tell())
                        continue
                    assert file.seek(offset, whence) == joined.seek(start + offset)
                    assert file.read(count) == joined.read(count)
                    assert file.tell() == joined.tell()

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            PartsFile([tmp_path / "a"])


class TestFinding:
    @pytest.mark.parametrize("name", ["image.zip", "image.zip.part-aa", "image.zip.part-ac", "."])
    def test_what_stands_for_the_parts(self, parts: list[Path], name: str) -> None:
        assert find_parts(parts[0].parent / name) == parts

    def test_links_as_in_a_snapshot_of_the_hub(self, parts: list[Path], tmp_path: Path) -> None:
        snapshot = tmp_path / "snapshot"
        snapshot.mkdir()
        (snapshot / "train.jsonl").touch()
        for i, part in enumerate(parts):
            (snapshot / part.name).symlink_to(part.rename(tmp_path / f"blob{i}"))
        assert find_parts(snapshot) == [snapshot / part.name for part in parts]
        assert open_zip(find_parts(snapshot)).testzip() is None

    @pytest.mark.parametrize(
        "options",
        [
            "image.zip.part-",
            "image.zip.",
            "-d image.zip.part",
            "-a 3 -d image.zip.",
            "--numeric-suffixes=1 -a 3 image.zip.",
        ],
    )
    def test_other_names_of_parts(self, raw: RawSet, tmp_path: Path, options: str) -> None:
        """As split and 7-Zip give them."""
        whole = raw.write_zip(tmp_path / "whole.zip")
        *flags, stem = options.split()
        subprocess.run(["split", "-b", "30000", *flags, "whole.zip", stem], cwd=tmp_path, check=True)
        whole.unlink()
        (tmp_path / "image.zip.bak").touch()
        parts = find_parts(tmp_path)
        assert len(parts) > 3
        assert parts == find_parts(tmp_path / "image.zip") == find_parts(parts[1])
        assert open_zip(parts).testzip() is None
        parts[1].unlink()
        with pytest.raises(UserError, match=rf"lacks {parts[1].name}, though"):
            find_parts(parts[0])

    def test_none(self, tmp_path: Path) -> None:
        assert find_parts(tmp_path) == find_parts(tmp_path / "image.zip") == find_parts(tmp_path / "no/where.zip") == []

    def test_of_two_zips_one_must_be_named(self, parts: list[Path]) -> None:
        (other := parts[0].with_name("more.zip.part-aa")).write_bytes(b"PK")
        with pytest.raises(UserError, match=r"holds the parts of image\.zip and of more\.zip: name one part"):
            find_parts(parts[0].parent)
        assert find_parts(other) == [other]

    def test_first_and_middle_missing(self, parts: list[Path]) -> None:
        parts[0].unlink()
        parts[2].unlink()
        with pytest.raises(
            UserError, match=rf"lacks image\.zip\.part-aa, image\.zip\.part-ac, though .* {parts[-1].name}"
        ):
            find_parts(parts[1])

    def test_middle_cut_short(self, parts: list[Path]) -> None:
        os.truncate(parts[1], 29_999)
        with pytest.raises(UserError, match=rf"{parts[1]} has 29999 bytes, but other parts 30000: fetch it again"):
            find_parts(parts[0])

    def test_last_too_long(self, parts: list[Path]) -> None:
        os.truncate(parts[-1], 30_001)
        with pytest.raises(UserError, match=rf"{parts[-1]} has 30001 bytes"):
            find_parts(parts[0])


class TestOpening:
    def test_gives_what_the_whole_zip_holds(self, raw: RawSet, parts: list[Path], tmp_path: Path) -> None:
        archive = open_zip(parts)
        whole = zipfile.ZipFile(raw.write_zip(tmp_path / "whole.zip"))
        assert archive.namelist() == whole.namelist()
        assert all(archive.read(name) == whole.read(name) for name in whole.namelist())

    def test_last_cut_short(self, parts: list[Path]) -> None:
        os.truncate(parts[-1], parts[-1].stat().st_size - 5)
        with pytest.raises(
            UserError, match=rf"^{parts[-1]} is cut short, or parts after it are missing: fetch it again"
        ):
            open_zip(find_parts(parts[0]))

    def test_last_missing(self, parts: list[Path]) -> None:
        parts[-1].unlink()
        with pytest.raises(UserError, match=rf"^{parts[-2]} is cut short, or parts after it are missing"):
            open_zip(find_parts(parts[0]))

    def test_no_zip(self, tmp_path: Path) -> None:
        (tmp_path / "a.zip").write_bytes(b"no zip")
        with pytest.raises(UserError, match=r"a\.zip is cut short, or it is no zip archive"):
            open_zip([tmp_path / "a.zip"])

    @pytest.mark.slow
    def test_beyond_4_gb(self, tmp_path: Path) -> None:
        """Where a zip's own offsets need 64 bits; the file is a hole but for its end."""
        size, hole = 1 << 30, (4 << 30) + 12345
        with (tmp_path / "end").open("w+b") as file:
            file.truncate(hole)
            with zipfile.ZipFile(file, "a") as archive:
                archive.writestr("images/far.png", b"far away" * 1000)
            file.seek(hole)
            end = file.read()
        (tmp_path / "end").unlink()
        parts = [tmp_path / f"image.zip.part-a{letter}" for letter in "abcde"]
        for part in parts[:-1]:
            part.touch()
            os.truncate(part, size)
        parts[-1].write_bytes(bytes(12345) + end)
        assert open_zip(find_parts(tmp_path)).read("images/far.png") == b"far away" * 1000


def test_split_is_what_the_command_makes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10
    (tmp_path / "image.zip").write_bytes(content)
    os.system(f"cd {tmp_path} && split -b 1000 image.zip theirs.zip.part-")
    ours = split(tmp_path / "image.zip", 1000)
    theirs = find_parts(tmp_path / "theirs.zip")
    assert [part.name[-7:] for part in ours] == [part.name[-7:] for part in theirs]
    assert [part.read_bytes() for part in ours] == [part.read_bytes() for part in theirs]
