"""A checksum of each file of a checkpoint, by which damage on a disk or in a bucket is noticed."""

import zlib
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llava_cot_jax.errors import UserError
from llava_cot_jax.files import read_json, write_json

CHECKSUMS_FILE = "checksums.json"
"""Name of the file in a checkpoint's folder with the size in bytes and the CRC-32 of each other file, by its name."""

_UNCHECKED = ("_CHECKPOINT_METADATA", CHECKSUMS_FILE)
"""Files without a checksum. Orbax writes its times into the first once more; no array depends on it."""

_BLOCK_BYTES = 1 << 24
_THREADS = 8


def write_checksums(folder: Path) -> None:
    """Read all files of a checkpoint once more, and write down their checksums.

    Args:
        folder: Folder of the checkpoint.
    """
    names = [name for name in _files(folder) if name not in _UNCHECKED]
    with ThreadPoolExecutor(_THREADS) as pool:
        checksums = dict(zip(names, pool.map(lambda name: _checksum(folder / name), names), strict=True))
    write_json(folder / CHECKSUMS_FILE, checksums, indent=None)


def find_damage(folder: Path, parts: Collection[str] | None = None, share: tuple[int, int] = (0, 1)) -> str:
    """Return a description of the first damaged file of a checkpoint, or an empty string if no file is damaged.

    Args:
        folder: Folder of the checkpoint.
        parts: Folders in it to check. By default, all are checked.
        share: Number of this process and number of processes that divide the files among them.
    """
    if not (folder / CHECKSUMS_FILE).exists():
        return f"{CHECKSUMS_FILE} is missing"
    try:
        expected = read_json(folder / CHECKSUMS_FILE)
    except UserError:
        return f"{CHECKSUMS_FILE} is damaged"
    index, count = share
    chosen = [name for name in expected if parts is None or "/" not in name or name.split("/")[0] in parts]
    with ThreadPoolExecutor(_THREADS) as pool:
        faults = pool.map(lambda name: _fault(folder / name, name, *expected[name]), chosen[index::count])
        return next(filter(None, faults), "")


def _fault(path: Path, name: str, expected_size: int, expected_checksum: int) -> str:
    """Return a description of a file's damage, or an empty string."""
    try:
        size, checksum = _checksum(path)
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as fault:
        return f"{name} cannot be read: {fault.strerror or fault}"
    if size != expected_size:
        return f"{name} has {size:,} bytes instead of {expected_size:,}"
    return "" if checksum == expected_checksum else f"{name} is not what was written: its checksum differs"


def _checksum(path: Path) -> tuple[int, int]:
    """Return a file's size in bytes and its CRC-32."""
    size = checksum = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return size, checksum


def _files(folder: Path, prefix: str = "") -> Iterator[str]:
    """Yield the names of all files below a folder, relative to it."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _files(path, f"{prefix}{path.name}/")
        else:
            yield prefix + path.name
