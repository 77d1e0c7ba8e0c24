"""Images of a raw data set, read in place from a folder, a zip archive or the parts of a split archive."""

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
"""Folders that an archive may have in front of the paths in the annotations."""


@dataclass(frozen=True, slots=True)
class Member:
    """An image file that is not decoded.

    Attributes:
        name: Name of the file, for ``RawImages.read``.
        size: Size in bytes.
        version: Number that changes with the content: its CRC-32 in a zip, its modification time in a folder.
        changed: Time in nanoseconds of the last change of the file's entry in a folder, 0 in a zip. A copy that keeps
            the modification time of another file has a time of its own here.
    """

    name: str
    size: int
    version: int
    changed: int = 0


class RawImages(Protocol):
    """Image files by name. The object can be pickled; another process opens the files anew."""

    def find(self, path: str) -> Member | None:
        """Find the file at a row's path. Return None if it does not exist or the path leads out of the folder."""

    def read(self, name: str) -> bytes:
        """Read the content of a file.

        Raises:
            UserError: The file cannot be read.
        """

    def names(self) -> Iterator[str]:
        """Return the names of all files."""


def open_images(path: Path) -> RawImages:
    """Open the images of a folder, a zip, or a split zip by a path that ``find_parts`` accepts.

    Raises:
        UserError: The path does not exist, or is neither a folder nor a zip nor a part of one; or parts are missing.
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


def normalise_path(path: str) -> str | None:
    """Normalise a path, as ``./a//b.png`` to ``a/b.png``. Return None if it leads out of its folder."""
    short = posixpath.normpath(path)
    outside = short.startswith(("/", "../")) or short in (".", "..") or "\0" in short
    return None if outside else short


class ZippedImages:
    """``RawImages`` in a zip archive, or in the parts of one.

    Args:
        parts: Files of the archive, in order.

    Raises:
        UserError: The archive cannot be opened. This is raised on first use.
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
        if (short := normalise_path(path)) is None:
            return None
        name = next((prefix + short for prefix in PREFIXES if prefix + short in self._infos), None)
        return Member(name, self._infos[name].file_size, self._infos[name].CRC) if name else None

    def read(self, name: str) -> bytes:
        try:
            return self._zip.read(self._infos[name])
        except Exception as fault:  # zipfile raises various exceptions for damaged data
            raise UserError(f"{name} cannot be read from {self._parts[0]}: {fault}") from fault

    def names(self) -> Iterator[str]:
        return iter(self._infos)


class ImageFolder:
    """``RawImages`` in a folder."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def find(self, path: str) -> Member | None:
        short = normalise_path(path)
        for prefix in PREFIXES if short else ():
            name = f"{prefix}{short}"
            try:
                found = (self._root / name).stat()
            except (OSError, ValueError):  # ValueError: a name that no file can have
                continue
            if stat.S_ISREG(found.st_mode):
                return Member(name, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
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
