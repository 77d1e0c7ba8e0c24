"""A checksum for each file of a checkpoint, so that what a disk or a bucket spoils is noticed.

Each process sums up the files that it wrote, the first one then all the others.
"""

import json
import zlib
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FILE = "checksums.json"
"""In the folder of a checkpoint: the bytes and the CRC-32 of its files, by name."""

LEFT_OUT = "_CHECKPOINT_METADATA"
"""Orbax writes its times into this file once more as it makes a checkpoint visible; no array depends on it."""

READ_BYTES = 1 << 24
THREADS = 8


def write_checksums(folder: Path, process: int | None = None) -> None:
    """Read files below ``folder`` once more and write down what they are.

    Args:
        folder: of the checkpoint.
        process: whose files; None is all that no process has summed up, which must be over.
    """
    if process is None:
        target = folder / FILE
        summed = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("checksums.*.json")]
        done = {name for found in summed for name in found}
        names = [name for name in _files(folder) if name not in {*done, LEFT_OUT, FILE}]
    else:
        target = folder / f"checksums.{process}.json"
        names = [name for name in _files(folder) if f"/ocdbt.process_{process}/" in name]
    with ThreadPoolExecutor(THREADS) as pool:
        found = dict(zip(names, pool.map(lambda name: _checksum(folder / name), names), strict=True))
    target.write_text(json.dumps(found), encoding="utf-8")


def find_damage(folder: Path, parts: Collection[str] | None = None, share: tuple[int, int] = (0, 1)) -> str:
    """What is wrong with the files of a checkpoint: the first fault, in words; nothing where there is none.

    Args:
        folder: of the checkpoint.
        parts: the folders in it to look at; None is all there is.
        share: of the files, every so many-th from the first number on: processes divide the work.
    """
    file, expected = FILE, dict[str, tuple[int, int]]()
    try:
        expected |= json.loads((folder / FILE).read_text(encoding="utf-8"))
        for file in [name for name in expected if name.startswith("checksums.")]:
            expected |= json.loads((folder / file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{file} is missing"
    except (OSError, ValueError):
        return f"{file} is damaged"
    first, every = share
    names = [name for name in expected if parts is None or "/" not in name or name.split("/")[0] in parts][first::every]
    with ThreadPoolExecutor(THREADS) as pool:
        faults = pool.map(lambda name: _fault(folder / name, name, *expected[name]), names)
        return next(filter(None, faults), "")


def _fault(path: Path, name: str, size: int, checksum: int) -> str:
    try:
        found_size, found = _checksum(path)
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as fault:
        return f"{name} cannot be read: {fault.strerror or fault}"
    if found_size != size:
        return f"{name} has {found_size:,} bytes instead of {size:,}"
    return "" if found == checksum else f"{name} is not what was written: its checksum differs"


def _checksum(path: Path) -> tuple[int, int]:
    """Bytes of a file, and their CRC-32."""
    size = checksum = 0
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return size, checksum


def _files(folder: Path, prefix: str = "") -> Iterator[str]:
    """The names of all files below a folder, from there."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _files(path, f"{prefix}{path.name}/")
        else:
            yield prefix + path.name
