"""A checksum for each file of a checkpoint, so that what a disk or a bucket spoils is noticed."""

import json
import zlib
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FILE = "checksums.json"
"""In the folder of a checkpoint: the bytes and the CRC-32 of every other file there."""

LEFT_OUT = "_CHECKPOINT_METADATA"
"""Orbax writes its times into this file once more as it makes a checkpoint visible; no array depends on it."""

READ_BYTES = 1 << 24
THREADS = 8


def write_checksums(folder: Path) -> None:
    """Read all files below ``folder`` once more and write down what they are."""
    with ThreadPoolExecutor(THREADS) as pool:
        found = dict(pool.map(lambda path: (_name(path, folder), _checksum(path)), _files(folder)))
    (folder / FILE).write_text(json.dumps(dict(sorted(found.items()))), encoding="utf-8")


def find_damage(folder: Path, parts: Collection[str] | None = None, share: tuple[int, int] = (0, 1)) -> str:
    """What is wrong with the files of a checkpoint: the first fault, in words; nothing where there is none.

    Args:
        folder: of the checkpoint.
        parts: the folders in it to look at; None is all there is.
        share: of the files, every so many-th from the first number on: processes divide the work.
    """
    try:
        expected = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        return f"{FILE} is missing" if isinstance(fault, FileNotFoundError) else f"{FILE} is damaged"
    first, every = share
    names = [name for name in expected if parts is None or name.split("/")[0] in parts][first::every]
    with ThreadPoolExecutor(THREADS) as pool:
        faults = pool.map(lambda name: _fault(folder / name, name, tuple(expected[name])), names)
        return next(filter(None, faults), "")


def _fault(path: Path, name: str, expected: tuple[int, int]) -> str:
    try:
        size, checksum = _checksum(path)
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as fault:
        return f"{name} cannot be read: {fault.strerror or fault}"
    if size != expected[0]:
        return f"{name} has {size:,} bytes instead of {expected[0]:,}"
    return "" if checksum == expected[1] else f"{name} is not what was written: its checksum differs"


def _checksum(path: Path) -> tuple[int, int]:
    """Bytes of a file, and their CRC-32."""
    size = checksum = 0
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return size, checksum


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files(path)
        elif path.name != LEFT_OUT:
            yield path


def _name(path: Path, folder: Path) -> str:
    return str(path).removeprefix(f"{folder}/")
