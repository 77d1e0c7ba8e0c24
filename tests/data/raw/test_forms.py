"""Tests that files in another form than the one that is needed are recognised, made by the programs that make them."""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import sqlite3
import subprocess
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llava_cot_jax.data.raw.annotations import open_annotations, read_annotations
from llava_cot_jax.data.raw.forms import recognise
from llava_cot_jax.data.raw.images import ImageFolder, open_images
from llava_cot_jax.errors import UserError
from tests.data.raw.raw_set import encode, noise, unusual_images
from tests.data.raw.test_raw_images import zip_files

ROW = json.dumps({"id": "ü", "image": "a.png", "conversations": []}, ensure_ascii=False)

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"

PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Log in</title>"


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    return file.getvalue()


def saved(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(ROW.encode(), mtime=0), "a file compressed by gzip: decompress it by `gunzip -k {path}`"),
        (bz2.compress(ROW.encode()), "a file compressed by bzip2: decompress it by `bunzip2 -k {path}`"),
        (lzma.compress(ROW.encode()), "a file compressed by xz: decompress it by `xz -dk {path}`"),
        (b"\x28\xb5\x2f\xfd\x04", "a file compressed by zstd: decompress it by `zstd -d {path}`"),
        (b"\x50\x2a\x4d\x18\x04\0\0\0abcd\x28\xb5\x2f\xfd\x04", "a file compressed by zstd: decompress it by"),
        (lzma.compress(ROW.encode(), format=lzma.FORMAT_ALONE), "a file compressed by lzma: decompress it by `xz"),
        (b"LZIP\x01\x0c", "a file compressed by lzip: decompress it by `lzip -dk {path}`"),
        (zlib.compress(ROW.encode()), "binary data of an unknown form: name a file of JSON Lines"),
        (b"\x91\x83\xa2id\xa1x\xa5image\xa5a.png", "binary data of an unknown form"),  # MessagePack
        (b"<\0\0\0\0\0\0\0" + b'{"a": {}}', "binary data of an unknown form"),  # safetensors
        (b"FEA1\0\0", "an Arrow (Feather) file: convert it by"),
        (tar(), "a tar archive: unpack it by `tar -xf {path}`, and name the file of the rows"),
        (b"PAR1\x15\x04", "a Parquet file: convert it by `python -c "),
        (b"ARROW1\0\0", "an Arrow (Feather) file: convert it by"),
        (b"\xff\xff\xff\xff\x10\x01\0\0", "a stream of Arrow data: convert it by"),
        (pickle.dumps([ROW]), "a pickle of Python objects: if you trust it"),
        (saved(np.zeros(3)), "a NumPy array: "),
        (POINTER, "a pointer of Git LFS, not the file itself: fetch the file itself by `git lfs pull`"),
        (b"../../.git/annex/objects/x/y", "a pointer of git-annex, not the file itself: fetch"),
        (PAGE, "a web page, perhaps for logging in: download the file itself"),
        (b"<?xml version='1.0'?>\n<Error><Code>AccessDenied</Code></Error>", "a server's answer that it has no such"),
        (ROW.encode() + b"\n" + bytes(300), "text that ends in zero bytes, whose download was not finished: fetch it"),
        (("\n " + ROW).encode("utf-16-le"), "text in UTF-16 or UTF-32"),
        (b"version https://hawser.github.com/spec/v1\noid sha256:4d7a\n", "a pointer of Git LFS"),
        (b"<?xml version='1.0'?><rows/>", "an XML file: "),
        (ROW.encode("utf-16"), "text in UTF-16 or UTF-32: convert it by `iconv -f UTF-16 -t UTF-8 {path}"),
        (ROW.encode("utf-16-le"), "text in UTF-16 or UTF-32"),
        (ROW.encode("utf-16-be"), "text in UTF-16 or UTF-32"),
        (ROW.encode("utf-32"), "text in UTF-16 or UTF-32"),
        (b"\xef\xbb\xbfid,image,conversations\r\n1,a.png,[]\r\n", "a table (CSV), not JSON Lines: convert"),
        (b'"id"\t"image"\n1\ta.png\n', "a table (TSV), not JSON Lines"),
        (b"- id: 1\n", "a YAML file: "),
        (encode(noise(np.random.default_rng(0))), "an image: name it by --images, and the file of the rows by"),
        (bytes(5000), "a file of zero bytes, whose download was not finished: fetch it again"),
        (b"\x01\x02\0\x03", "binary data of an unknown form"),
        (b"", "empty: fetch it again"),
    ],
)
def test_annotations_in_another_form(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as fault:
        open_annotations(path)
    assert str(fault.value).startswith(f"annotations {path} is {message.format(path=path)}")
    assert "\n" not in str(fault.value)


def test_a_database(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "a.db") as database:
        database.execute("create table rows (id)")
    with pytest.raises(UserError, match=r"is an SQLite database: write its table by `sqlite3 -json"):
        open_annotations(tmp_path / "a.db")


def test_no_file_of_annotations(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("blob")
    os.mkfifo(tmp_path / "pipe")
    for name, message in {
        ".": "is a folder: name a file in it, such as train.jsonl",
        "link": "is a link to blob, which is not there: fetch that",
        "pipe": "is no file on a disk: write the rows to one",
    }.items():
        with pytest.raises(UserError, match=message):
            open_annotations(tmp_path / name)


@pytest.mark.parametrize(
    "text", [ROW, "\ufeff" + ROW, f"[{ROW}]", "nonsense", '"a", "b"', "{}", "{'id': 1}", "id: 1, b"]
)
def test_text_is_read(text: str) -> None:
    assert recognise(text.encode()) is None


def test_images_are_recognised() -> None:
    for _, content in unusual_images(np.random.default_rng(0)):
        assert (form := recognise(content))
        assert form.what == "an image"


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize(
    "write", [json.dumps, lambda rows: json.dumps(rows, indent=1), lambda rows: "\r\n".join(map(json.dumps, rows))]
)
def test_rows_in_an_array(tmp_path: Path, write: Callable[[list], str], start: str) -> None:
    (tmp_path / "a.png").touch()
    talk = [{"from": "human", "value": "a\n{?"}, {"from": "gpt", "value": "b]"}]
    rows = [{"id": i, "image": f"{'ab'[i % 2]}.png", "conversations": talk} for i in range(5)]
    (tmp_path / "rows.json").write_text(start + write(rows))
    read = read_annotations(tmp_path / "rows.json", ImageFolder(tmp_path), limit=4)
    assert [(entry.line, entry.id) for entry in read.entries] == [(1, "0"), (3, "2")]
    assert [(row.line, row.id) for row in read.skipped] == [(2, "1"), (4, "3")]


class TestImages:
    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.tar", tar(), "a tar archive: unpack it by `tar -xf {path}`, and name the folder of the images"),
            (
                "a.tar.gz",
                gzip.compress(tar(), mtime=0),
                "a file compressed by gzip: if it is an archive, unpack it by `mkdir images; tar",
            ),
            ("a.zip", gzip.compress(b"", mtime=0), "a file compressed by gzip"),
            ("a.7z", b"7z\xbc\xaf\x27\x1c\0", "a 7z archive: unpack it by `7z x {path}`"),
            ("a.rar", b"Rar!\x1a\x07\x01", "a RAR archive: unpack it by `unrar x {path}`"),
            ("a.png", encode(noise(np.random.default_rng(0))), "an image: name the folder it is in"),
            ("a.zip", POINTER, "a pointer of Git LFS, not the file itself: fetch the file itself by `git lfs pull`"),
            ("a.zip", PAGE, "a web page, perhaps for logging in: download the file itself"),
            ("a.jsonl", ROW.encode(), "a text file: name a folder of images, or a zip of them; rows are named by"),
            ("a.zip.part-aa", POINTER, "a pointer of Git LFS"),
            ("a.zip.part-ab", PAGE, "a web page"),
        ],
    )
    def test_another_form(self, tmp_path: Path, name: str, content: bytes, message: str) -> None:
        path = tmp_path / name
        path.write_bytes(content)
        if name.endswith("ab"):
            path.with_name("a.zip.part-aa").write_bytes(b"PK\x03\x04")
        with pytest.raises(UserError) as fault:
            open_images(path)
        assert message.format(path=path) in str(fault.value)

    def test_a_zip_by_another_name(self, tmp_path: Path) -> None:
        zip_files(tmp_path / "blob", {"a.png": b"a"})
        assert open_images(tmp_path / "blob").find("a.png")

    @pytest.mark.parametrize("named", ["image.zip", "image.z01", "."])
    def test_volumes(self, tmp_path: Path, named: str) -> None:
        rng = np.random.default_rng(0)
        for i in range(3):
            (tmp_path / f"{i}.png").write_bytes(rng.bytes(60_000))
        subprocess.run(["zip", "-q", "-s", "64k", "image.zip", "0.png", "1.png", "2.png"], cwd=tmp_path, check=True)
        assert (tmp_path / "image.z02").exists()
        joining = rf"is one of several volumes of a zip: join them by `zip -s 0 {tmp_path}/image\.zip --out whole\.zip`"
        with pytest.raises(UserError, match=joining):
            open_images(tmp_path / named)
        if named == "image.zip":  # the others were not fetched
            for path in tmp_path.glob("image.z0*"):
                path.unlink()
            with pytest.raises(UserError, match=joining):
                open_images(tmp_path / named).find("0.png")

    def test_an_encrypted_zip(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(b"a")
        subprocess.run(["zip", "-q", "-P", "secret", "image.zip", "a.png"], cwd=tmp_path, check=True)
        with pytest.raises(UserError, match=r"image\.zip is encrypted, which cannot be read in place: unpack it"):
            open_images(tmp_path / "image.zip").find("a.png")

    def test_a_link_to_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "image.zip").symlink_to("blob")
        with pytest.raises(UserError, match=r"image\.zip is a link to blob, which is not there: fetch that"):
            open_images(tmp_path / "image.zip")
