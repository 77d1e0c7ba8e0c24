"""The images of a raw data set where they lie: in a folder, in a zip archive, in the parts of one."""

import os
import posixpath
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol
from zipfile import ZipFile, ZipInfo

from llava_cot_jax.data.raw.split_zip import find_parts, open_zip
from llava_cot_jax.errors import UserError

PREFIXES = ("", "image_files/", "images/", "image/")
"""Folders that an archive may put around the paths that rows give."""


@dataclass(frozen=True, slots=True)
class Member:
    """An image file, undecoded.

    Attributes:
        name: what ``read`` knows it by.
        size: in bytes.
        version: changes when the file does: its CRC-32 in a zip, its time of change in a folder.
    """

    name: str
    size: int
    version: int


class RawImages(Protocol):
    """Image files by name. Can be pickled: another process opens them anew."""

    def find(self, path: str) -> Member | None:
        """The file that a row calls ``path``; None if there is none, or if the path leads out."""

    def read(self, name: str) -> bytes:
        """The content of the file.

        Raises:
            UserError: it cannot be read.
        """

    def names(self) -> Iterator[str]:
        """All files that are there."""


def open_images(path: Path) -> RawImages:
    """The images at ``path``: a folder, a zip, or what ``find_parts`` takes.

    Raises:
        UserError: nothing is there, or it is no whole zip archive.
    """
    if path.is_file() and path.suffix.lower() == ".zip":
        return ZippedImages((path,))
    if parts := find_parts(path):
        return ZippedImages(tuple(parts))
    if path.is_dir():
        return ImageFolder(path)
    if path.exists():
        raise UserError(f"{path} is neither a folder, nor a .zip, nor a part of one such as image.zip.part-aa")
    raise UserError(f"there is no {path}, and no parts such as {path.name}.part-aa beside it")


def shortest(path: str) -> str | None:
    """``path`` without detours, as in ``a/b.png`` for ``./a//b.png``; None if it leads out of its folder."""
    short = posixpath.normpath(path)
    outside = short.startswith(("/", "../")) or short in (".", "..") or "\0" in short
    return None if outside else short


class ZippedImages:
    """``RawImages`` in a zip archive, or in the parts of one.

    Args:
        parts: the files that make the archive when they are read one after the other.

    Raises:
        UserError: on first use, what ``open_zip`` refuses.
    """

    def __init__(self, parts: tuple[Path, ...]) -> None:
        self._parts = parts

    def __reduce__(self) -> tuple[type, tuple[tuple[Path, ...]]]:
        return ZippedImages, (self._parts,)

    @cached_property
    def _zip(self) -> ZipFile:
        return open_zip(self._parts)

    @cached_property
    def _infos(self) -> dict[str, ZipInfo]:
        names = {posixpath.normpath(info.filename): info for info in self._zip.infolist() if not info.is_dir()}
        return {name: info for name, info in names.items() if not name.startswith("__MACOSX/")}

    def find(self, path: str) -> Member | None:
        if (short := shortest(path)) is None:
            return None
        name = next((prefix + short for prefix in PREFIXES if prefix + short in self._infos), None)
        return Member(name, self._infos[name].file_size, self._infos[name].CRC) if name else None

    def read(self, name: str) -> bytes:
        try:
            return self._zip.read(self._infos[name])
        except Exception as fault:  # damaged data makes zipfile raise almost anything
            raise UserError(f"{name} cannot be read from {self._parts[0]}: {fault}") from fault

    def names(self) -> Iterator[str]:
        return iter(self._infos)


class ImageFolder:
    """``RawImages`` in a folder."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def find(self, path: str) -> Member | None:
        short = shortest(path)
        for prefix in PREFIXES if short else ():
            name = f"{prefix}{short}"
            try:
                found = (self._root / name).stat()
            except (OSError, ValueError):  # ValueError: a name that no file can have
                continue
            if stat.S_ISREG(found.st_mode):
                return Member(name, found.st_size, found.st_mtime_ns)
        return None

    def read(self, name: str) -> bytes:
        try:
            return (self._root / name).read_bytes()
        except OSError as fault:
            raise UserError(f"{self._root / name} cannot be read: {fault.strerror}") from None

    def names(self) -> Iterator[str]:
        for folder, _, files in os.walk(self._root):
            inside = Path(folder).relative_to(self._root)
            yield from ((inside / file).as_posix() for file in files)
