"""Images of a raw data set, read in place from a folder, a zip archive or the parts of a split archive."""

import os
import posixpath
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from zipfile import ZipFile, ZipInfo

from llava_cot_jax.data.raw.forms import BINARY, HEAD_BYTES, TEXT, ZIP, recognise, recognise_file
from llava_cot_jax.data.raw.names import PREFIXES, Found, Match, NameIndex, clean_path, normalise_path, without_prefix
from llava_cot_jax.data.raw.split_zip import PART, check_volumes, find_parts, open_zip
from llava_cot_jax.errors import UserError

MAX_PATHS_TRIED = 50
"""Number of missing images for which other folders are tried."""

MAX_FOLDERS_TRIED = MAX_FILES_TRIED = 200

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif"}

UTF8_NAME = 0x800
"""Flag of a zip's member whose name is in UTF-8. Without it, the name is in code page 437, or so it should be."""


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


class RawImages(ABC):
    """Image files by name. The object can be pickled; another process opens the files anew.

    Args:
        root: Folder or archive of the files, as the user named it.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def find(self, path: str) -> Found | None:
        """Find the file that a row's path means. Return None if none does, or if it is not certain which."""
        return self._find_as_named(path) or self._index.find(path)

    def _find_as_named(self, path: str) -> Found | None:
        short = normalise_path(path)
        name = next((name for prefix in PREFIXES if short and self.member(name := f"{prefix}{short}")), None)
        return Found(name, without_prefix(name), Match.EXACT) if name else None

    def explain(self, path: str) -> str:
        """Return why no file is found at a row's path."""
        return self._index.explain(path)

    def suggest(self, paths: Sequence[str]) -> str:
        """Return, as the end of a sentence, the folder in which most of some missing files are, or nothing."""
        tried = [clean_path(path) for path in paths[:: -(-len(paths) // MAX_PATHS_TRIED) or 1]]
        root = self._root if self._root.is_dir() else self._root.parent
        beside = [*_folders_in(root), *_folders_in(root.parent), root.parent, root.parent.parent]
        counts = {
            folder: sum(ImageFolder(folder)._find_as_named(path) is not None for path in tried) for folder in beside
        }
        best = max(beside, key=lambda folder: counts[folder])
        if 2 * counts[best] <= len(tried):
            return self._describe_containers()
        return f", but {best} has {counts[best]} of {len(tried)} images that are missing: name it by --images"

    def _describe_containers(self) -> str:
        """Return, as the end of a sentence, a file among the images that has other files in it, or nothing."""
        others = (name for name in self.names() if Path(name).suffix.lower() not in IMAGE_SUFFIXES)
        for name in islice(others, MAX_FILES_TRIED):
            form = recognise(self.head(name))
            if form == ZIP and self._root.is_dir():
                return f", but {name} is {form.what}: name it by --images, or unpack it"
            if form and form.has_files:
                return f", but {name} is {form.what}: {form.remedy_for_images(Path(name))}"
        return ""

    @abstractmethod
    def head(self, name: str) -> bytes:
        """Read the first ``HEAD_BYTES`` of a file. Return nothing if it cannot be read."""

    @abstractmethod
    def member(self, name: str) -> Member | None:
        """Return the file of this name. Return None if there is none."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Read the content of a file.

        Raises:
            UserError: The file cannot be read.
        """

    @abstractmethod
    def names(self) -> Iterator[str]:
        """Return the names of all files."""

    @cached_property
    def _index(self) -> NameIndex:
        return NameIndex(self.names(), self._root)


def _folders_in(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if entry.is_dir())[:MAX_FOLDERS_TRIED]
    except OSError:
        return []


def open_images(path: Path) -> RawImages:
    """Open the images of a folder, a zip, or a split zip by a path that ``find_parts`` accepts.

    Raises:
        UserError: The path does not exist, or is neither a folder nor a zip nor a part of one; or parts are missing.
    """
    try:
        return _open_images(path)
    except OSError as fault:
        raise UserError(f"images {path} cannot be read: {fault.strerror}") from None


def _open_images(path: Path) -> RawImages:
    if path.exists():
        check_volumes(path)
    is_part = path.is_dir() or PART.fullmatch(path.name) or not path.exists()
    if is_part and (parts := find_parts(path)):
        return ZippedImages(path, tuple(parts))
    if path.is_dir():
        return ImageFolder(path)
    if path.is_file():
        form = recognise_file(path) or TEXT
        if form == ZIP or (path.suffix.lower() == ".zip" and form in (BINARY, TEXT)):
            return ZippedImages(path, (path,))
        raise UserError(f"images {path} is {form.what}: {form.remedy_for_images(path)}")
    if path.is_symlink():
        raise UserError(f"images {path} is a link to {path.readlink()}, which is not there: fetch that")
    if path.exists():
        raise UserError(f"images {path} is neither a folder, nor a zip, nor a part of one such as image.zip.part-aa")
    raise UserError(f"there is no {path}, and no parts such as {path.name}.part-aa beside it")


class ZippedImages(RawImages):
    """``RawImages`` in a zip archive, or in the parts of one.

    Args:
        root: Path by which the user named the archive.
        parts: Files of the archive, in order.

    Raises:
        UserError: The archive cannot be opened. This is raised on first use.
    """

    def __init__(self, root: Path, parts: tuple[Path, ...]) -> None:
        super().__init__(root)
        self._parts = parts

    def __reduce__(self) -> tuple[type, tuple[Path, tuple[Path, ...]]]:
        return ZippedImages, (self._root, self._parts)

    @cached_property
    def _zip(self) -> ZipFile:
        return open_zip(self._parts)

    @cached_property
    def _infos(self) -> dict[str, ZipInfo]:
        names = {posixpath.normpath(_name_of(info)): info for info in self._zip.infolist() if not info.is_dir()}
        return {name: info for name, info in names.items() if not name.startswith("__MACOSX/")}

    def member(self, name: str) -> Member | None:
        """Return the file of this name. Return None if there is none."""
        info = self._infos.get(name)
        return Member(name, info.file_size, info.CRC) if info else None

    def read(self, name: str) -> bytes:
        """Read the content of a file.

        Raises:
            UserError: The file cannot be read.
        """
        try:
            return self._zip.read(self._infos[name])
        except Exception as fault:  # zipfile raises various exceptions for damaged data
            raise UserError(f"{name} cannot be read from {self._parts[0]}: {fault}") from fault

    def head(self, name: str) -> bytes:
        """Read the first ``HEAD_BYTES`` of a file. Return nothing if it cannot be read."""
        try:
            with self._zip.open(self._infos[name]) as file:
                return file.read(HEAD_BYTES)
        except Exception:  # zipfile raises various exceptions for damaged data
            return b""

    def names(self) -> Iterator[str]:
        """Return the names of all files."""
        return iter(self._infos)


def _name_of(info: ZipInfo) -> str:
    """Return the name of a zip's member. Some programs write it in UTF-8 and do not say so."""
    try:
        return info.filename if info.flag_bits & UTF8_NAME else info.filename.encode("cp437").decode()
    except UnicodeError:
        return info.filename


class ImageFolder(RawImages):
    """``RawImages`` in a folder."""

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return ImageFolder, (self._root,)

    def member(self, name: str) -> Member | None:
        """Return the file of this name. Return None if there is none."""
        try:
            found = (self._root / name).stat()
        except (OSError, ValueError):  # ValueError: a name that no file can have
            return None
        regular = stat.S_ISREG(found.st_mode)
        return Member(name, found.st_size, found.st_mtime_ns, found.st_ctime_ns) if regular else None

    def read(self, name: str) -> bytes:
        """Read the content of a file.

        Raises:
            UserError: The file cannot be read.
        """
        try:
            return (self._root / name).read_bytes()
        except OSError as fault:
            raise UserError(f"{self._root / name} cannot be read: {fault.strerror}") from None

    def head(self, name: str) -> bytes:
        """Read the first ``HEAD_BYTES`` of a file. Return nothing if it cannot be read."""
        if not self.member(name):  # such as a pipe, on which reading would wait
            return b""
        try:
            with (self._root / name).open("rb") as file:
                return file.read(HEAD_BYTES)
        except OSError:
            return b""

    def names(self) -> Iterator[str]:
        """Return the names of all files, also of those in folders that are symbolic links."""
        walked: set[tuple[int, int]] = set()
        for folder, folders, files in os.walk(self._root, followlinks=True):
            place = Path(folder).stat()
            if (place.st_dev, place.st_ino) in walked:  # a link that leads back
                folders.clear()
                continue
            walked.add((place.st_dev, place.st_ino))
            inside = os.path.relpath(folder, self._root)
            yield from (posixpath.normpath(f"{inside}/{file}") for file in files)
