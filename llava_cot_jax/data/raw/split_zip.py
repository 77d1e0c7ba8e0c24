"""Reading of a zip archive in place, whole or in the parts that ``split -b`` made of it."""

import io
import os
import re
import zipfile
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import accumulate, product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from llava_cot_jax.errors import UserError

PART = re.compile(r"(?P<whole>.+\.zip)\.part-(?P<suffix>[a-z]{2})")
SUFFIXES = ["".join(letters) for letters in product(ascii_lowercase, repeat=2)]

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
            raise ValueError(f"negative position {start + offset}")
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
        UserError: A part before the last one is missing, a part has another size than the others, or the folder has
            the parts of more than one zip.
    """
    named = PART.fullmatch(path.name)
    folder = path if path.is_dir() else path.parent
    found: defaultdict[str, list[Path]] = defaultdict(list)
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        if part := PART.fullmatch(entry.name):
            found[part["whole"]].append(entry)
    if folder != path:
        whole = named["whole"] if named else path.name
    elif len(found) > 1:
        raise UserError(f"{path} holds the parts of {' and of '.join(found)}: name one part of the zip that is meant")
    else:
        whole = next(iter(found), "")
    if parts := found[whole]:
        _check_parts(folder, whole, parts)
    return parts


def _check_parts(folder: Path, whole: str, parts: list[Path]) -> None:
    names = [part.name for part in parts]
    wanted = [f"{whole}.part-{suffix}" for suffix in SUFFIXES]
    missing = sorted(set(wanted[: wanted.index(names[-1])]) - set(names))
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}, though it has {names[-1]}: fetch what is missing")
    sizes = [part.stat().st_size for part in parts]
    usual, _ = Counter(sizes[:-1] or sizes).most_common(1)[0]
    for i, (part, size) in enumerate(zip(parts, sizes, strict=True)):
        last = i == len(parts) - 1
        if size > usual or (size < usual and not last):
            raise UserError(f"{part} has {size} bytes, but other parts {usual}: fetch it again")


def open_zip(parts: Sequence[Path]) -> zipfile.ZipFile:
    """Open the zip archive that is in one file, or in several files that follow each other.

    Raises:
        UserError: A file cannot be read, or together they are no complete zip archive.
    """
    try:
        file = io.BufferedReader(PartsFile(parts), BUFFER_BYTES)
    except OSError as fault:
        raise UserError(f"{fault.filename} cannot be read: {fault.strerror}") from None
    try:
        return zipfile.ZipFile(file)
    except Exception as fault:  # zipfile raises various exceptions for a damaged directory
        file.close()
        otherwise = "parts after it are missing" if len(parts) > 1 else "it is no zip archive"
        raise UserError(f"{parts[-1]} is cut short, or {otherwise}: fetch it again ({fault})") from fault
