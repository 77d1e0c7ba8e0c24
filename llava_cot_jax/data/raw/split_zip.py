"""Reading of a zip archive in place, whole or in the parts that ``split -b`` made of it."""

import errno
import io
import os
import re
import shlex
import zipfile
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate, product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from llava_cot_jax.data.raw.forms import HEAD_BYTES, POINTER, WEB_PAGE, recognise
from llava_cot_jax.errors import UserError

PART = re.compile(r"(?P<stem>.+\.zip[._-]?(?:part)?[._-]?)(?P<suffix>[a-z]{2,3}|\d{2,3})")
"""Pattern of the names of parts: ``image.zip.part-aa``, and what else ``split`` and 7-Zip call them."""

VOLUME = re.compile(r".+\.z\d\d+", re.IGNORECASE)
"""Pattern of the names of the volumes that ``zip -s`` makes, but for the last one."""

READABLE_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA}

ENCRYPTED = 1
"""Flag of a zip's member that is encrypted."""

BUFFER_BYTES = 1 << 16


class PartsFile(io.RawIOBase):
    """Several files that are read as one, in the order given.

    Raises:
        OSError: A file cannot be opened.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        super().__init__()
        self._files: list[io.FileIO] = []
        for path in paths:
            self._files.append(path.open("rb", buffering=0))
        self._ends = list(accumulate(os.fstat(file.fileno()).st_size for file in self._files))
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._ends[-1]}[whence]
        if start + offset < 0:
            raise OSError(errno.EINVAL, "negative position")  # as files do, and zipfile expects it
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        i = bisect_right(self._ends, self._position)
        if i == len(self._ends):
            return 0
        part, begin = self._files[i], self._ends[i - 1] if i else 0
        # The read ends with this part, since a raw file may return less than it is asked for.
        within = memoryview(buffer).cast("B")[: self._ends[i] - self._position]
        part.seek(self._position - begin)
        count = part.readinto(within)
        self._position += count
        return count

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()


def find_parts(path: Path) -> list[Path]:
    """Find the parts of a split zip, in order. Return an empty list if ``path`` names none.

    Args:
        path: One of the parts, the path of the whole zip if it stood beside its parts, or the folder of the parts.

    Raises:
        UserError: A part before the last one is missing, is a pointer to the file, or has another size than the
            others; or the folder has the parts of more than one zip.
    """
    named = PART.fullmatch(path.name)
    folder = path if path.is_dir() else path.parent
    found: defaultdict[tuple[str, int, bool], dict[str, Path]] = defaultdict(dict)
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        if part := PART.fullmatch(entry.name):
            found[_kind(part)][part["suffix"]] = entry
    # Without the word, as in ``image.zip.bak``, the first part has to be there.
    chosen = {kind: parts for kind, parts in found.items() if "part" in kind[0] or _suffixes(parts)[0] in parts}
    if named:
        chosen = {kind: parts for kind, parts in chosen.items() if kind == _kind(named)}
    elif folder != path:
        chosen = {kind: parts for kind, parts in chosen.items() if kind[0].startswith(path.name)}
    if len(chosen) > 1:
        names = " and of ".join(f"{stem.partition('.zip')[0]}.zip" for stem, *_ in chosen)
        raise UserError(f"{path} holds the parts of {names}: name one part of the zip that is meant")
    for (stem, *_), parts in chosen.items():
        _check_parts(folder, stem, parts)
        return list(parts.values())
    return []


def _kind(part: re.Match[str]) -> tuple[str, int, bool]:
    """Return what the parts of one zip have in common: the beginning of their names, and the form of its end."""
    return part["stem"], len(part["suffix"]), part["suffix"].isdigit()


def _suffixes(parts: Mapping[str, Path]) -> list[str]:
    """Return all suffixes that parts may have, in order, given those of one form."""
    one = next(iter(parts))
    if one.isdigit():
        first = min(map(int, parts))
        return [f"{number:0{len(one)}}" for number in range(min(first, 1), 10 ** len(one))]
    return list(map("".join, product(ascii_lowercase, repeat=len(one))))


def _check_parts(folder: Path, stem: str, parts: Mapping[str, Path]) -> None:
    for part in parts.values():
        with part.open("rb") as file:
            form = recognise(file.read(HEAD_BYTES))
        if form in (POINTER, WEB_PAGE):
            raise UserError(f"{part} is {form.what}: {form.remedy_for_images(part)}")
    wanted = _suffixes(parts)
    missing = [f"{stem}{suffix}" for suffix in wanted[: wanted.index(max(parts))] if suffix not in parts]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}, though it has {stem}{max(parts)}: fetch what is missing")
    sizes = [part.stat().st_size for part in parts.values()]
    usual, _ = Counter(sizes[:-1] or sizes).most_common(1)[0]
    for i, (part, size) in enumerate(zip(parts.values(), sizes, strict=True)):
        last = i == len(parts) - 1
        if size > usual or (size < usual and not last):
            raise UserError(f"{part} has {size} bytes, but other parts {usual}: fetch it again")


def check_volumes(path: Path) -> None:
    """Check that a path is no volume of a zip that ``zip -s`` made, and no folder of such volumes.

    Raises:
        UserError: It is.
    """
    folder = path if path.is_dir() else path.parent
    volumes = sorted(entry.name for entry in folder.iterdir() if VOLUME.fullmatch(entry.name))
    stem = path.stem.lower()
    for name in volumes:
        if path == folder or (Path(name).stem.lower() == stem and path.name.lower() in (name.lower(), f"{stem}.zip")):
            raise _spanned(folder / name)


def _spanned(volume: Path) -> UserError:
    last = shlex.quote(str(volume.with_suffix(".zip")))
    return UserError(
        f"{volume} is one of several volumes of a zip: join them by `zip -s 0 {last} --out whole.zip`, and name "
        "whole.zip"
    )


def open_zip(parts: Sequence[Path]) -> zipfile.ZipFile:
    """Open the zip archive that is in one file, or in several files that follow each other.

    Raises:
        UserError: A file cannot be read, or together they are no complete zip archive, or one whose members cannot be
            read: encrypted, compressed by another method, or in several volumes.
    """
    try:
        file = io.BufferedReader(PartsFile(parts), BUFFER_BYTES)
    except OSError as fault:
        raise UserError(f"{fault.filename} cannot be read: {fault.strerror}") from None
    try:
        archive = zipfile.ZipFile(file)
    except Exception as fault:  # zipfile raises various exceptions for a damaged directory
        file.close()
        if "multiple disks" in str(fault):
            raise _spanned(parts[-1]) from fault
        otherwise = "parts after it are missing" if len(parts) > 1 else "it is no zip archive"
        raise UserError(f"{parts[-1]} is cut short, or {otherwise}: fetch it again ({fault})") from fault
    for info in archive.infolist():
        if info.volume:
            raise _spanned(parts[-1])
        how = "encrypted" if info.flag_bits & ENCRYPTED else f"compressed by method {info.compress_type}"
        if info.flag_bits & ENCRYPTED or info.compress_type not in READABLE_METHODS:
            raise UserError(f"{parts[0]} is {how}, which cannot be read in place: unpack it, and name the folder")
    return archive
