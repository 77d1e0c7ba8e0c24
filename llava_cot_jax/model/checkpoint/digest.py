"""Digest of the weights of a checkpoint: the same for the same files, wherever they lie, and another for any others.

It is made of the size and the CRC-32C of every file of weights, whatever its name. A bucket states the CRC-32C of each
of its files, so nothing is read there. On a disk every byte is read once, in threads beside whatever comes after, and
several processes divide the bytes among them.
"""

import base64
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Self

import google_crc32c
import numpy as np

from llava_cot_jax.errors import UserError
from llava_cot_jax.model.checkpoint.folder import weight_files
from llava_cot_jax.paths import bucket_filesystem, is_remote, reading_errors

Combine = Callable[[np.ndarray], np.ndarray]
"""Function that adds the arrays of all processes, uint32 [pieces]."""

_PIECE_BYTES = 1 << 26
"""Number of bytes of a file that one thread of one process reads at a time."""

_BLOCK_BYTES = 1 << 22
_MOST_THREADS = 8

_POLYNOMIAL = 0x82F63B78
"""Polynomial of CRC-32C (Castagnoli), with the lowest power in the highest bit."""


class WeightsDigest:
    """Digest of a checkpoint's weights that threads compute from now on: a context manager that ends them.

    Args:
        folder: Folder of the checkpoint.
        share: Number of this process and number of processes that divide the bytes among them.

    Raises:
        UserError: The folder has no files of weights, or they cannot be read.
    """

    def __init__(self, folder: Path, share: tuple[int, int] = (0, 1)) -> None:
        files = weight_files(folder)
        with reading_errors(folder):
            self._sizes = {file: int(_size(file)) for file in files}
        self._pieces = [
            (file, start) for file, size in self._sizes.items() if not is_remote(file) for start in _starts(size)
        ]
        threads = min(_MOST_THREADS, max(1, (os.cpu_count() or 1) // 2))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="digest")
        index, count = share
        self._found: dict[int, Future[int]] = {
            i: self._pool.submit(_piece_checksum, *self._pieces[i]) for i in range(index, len(self._pieces), count)
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave unread what no thread has begun, and end the threads."""
        self._pool.shutdown(cancel_futures=True)

    def result(self, combine: Combine = lambda parts: parts) -> str:
        """Wait for the digest, and return 16 hexadecimal digits.

        Args:
            combine: Function that adds the parts of all processes. All of them must call this method.

        Raises:
            UserError: A file cannot be read any more.
        """
        parts = np.zeros(len(self._pieces), np.uint32)
        for i, found in self._found.items():
            parts[i] = found.result()
        pieces = dict(zip(self._pieces, combine(parts).tolist(), strict=True))
        files = sorted((size, _file_checksum(file, size, pieces)) for file, size in self._sizes.items())
        return hashlib.sha256(repr(files).encode()).hexdigest()[:16]


def _size(file: Path) -> int:
    return int(bucket_filesystem().size(str(file))) if is_remote(file) else file.stat().st_size


def _starts(size: int) -> range:
    return range(0, size, _PIECE_BYTES)


def _piece_checksum(file: Path, start: int) -> int:
    """Return the CRC-32C of a file's bytes from ``start`` on, as many as a piece has."""
    checksum, left = 0, _PIECE_BYTES
    with reading_errors(file), file.open("rb", buffering=0) as opened:
        opened.seek(start)
        while left and (block := opened.read(min(left, _BLOCK_BYTES))):
            checksum = google_crc32c.extend(checksum, block)
            left -= len(block)
    return checksum


def _file_checksum(file: Path, size: int, pieces: dict[tuple[Path, int], int]) -> int:
    """Return the CRC-32C of a whole file: the one that its bucket states, or that of its pieces together."""
    if is_remote(file):
        with reading_errors(file):
            stated = bucket_filesystem().info(str(file)).get("crc32c")
        if not stated:
            raise UserError(f"{file}: its bucket states no CRC-32C, by which weights are known again")
        return int.from_bytes(base64.b64decode(stated), "big")
    checksum = 0
    for start in _starts(size):
        checksum = join_checksums(checksum, pieces[file, start], min(_PIECE_BYTES, size - start))
    return checksum


def join_checksums(first: int, second: int, length: int) -> int:
    """Return the CRC-32C of two runs of bytes together, from that of each and the length of the second.

    A checksum is linear over GF(2), and so is what a byte of zeros after it does to it. ``length`` of them are that
    operator to the power of ``length``.
    """
    return _apply(_zeros(length), first) ^ second


@cache
def _zeros(length: int) -> tuple[int, ...]:
    """Return the operator on a checksum, a column per bit, of ``length`` bytes of zeros after what it is of."""
    result = tuple(1 << bit for bit in range(32))
    power = (_POLYNOMIAL, *(1 << bit for bit in range(31)))  # one bit of zero
    bits = 8 * length
    while bits:
        if bits & 1:
            result = _times(power, result)
        power = _times(power, power)
        bits >>= 1
    return result


def _times(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...]:
    """Return the product of two operators."""
    return tuple(_apply(left, column) for column in right)


def _apply(operator: tuple[int, ...], vector: int) -> int:
    result = 0
    for column in operator:
        result ^= column if vector & 1 else 0
        vector >>= 1
    return result
