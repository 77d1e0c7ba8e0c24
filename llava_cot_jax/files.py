"""Writing of files that appear whole or not at all, reading of JSON, and the folders of the user's cache.

Paths may be in a bucket, which replaces a file as a whole by itself. The functions that write raise ``OSError``, as
those of ``pathlib`` do; ``paths.writing_errors`` turns it into a ``UserError``.
"""

import hashlib
import json
import logging
import os
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any, BinaryIO

from llava_cot_jax.errors import UserError
from llava_cot_jax.paths import as_path, is_remote, reading_errors, writing_errors

_LOG = logging.getLogger(__name__)

_DEVICES = Path("/dev")
"""Folder of devices and of links to them. ``/dev/stdout`` may lead to a file."""

_NAME_ANOTHER_CACHE = "the work goes on, and is done anew at each start; XDG_CACHE_HOME names another folder"

BUCKET_SECONDS = 10.0
"""Time in which a bucket must take the first file of a cache. Each access to one that is out of reach takes minutes."""


def cache_folder(name: str) -> Path | None:
    """Return the folder ``name`` of this package's cache, which is below ``XDG_CACHE_HOME`` or ``~/.cache``.

    None stands for no cache, where there is no home folder: a warning says so, and whoever asks works without one.
    """
    try:
        place = as_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    except UserError as fault:
        _warn_once(f"{fault}; {_NAME_ANOTHER_CACHE}")
        return None
    return place / "llava_cot_jax" / name


@cache
def _warn_once(text: str) -> None:
    _LOG.warning("%s", text)


@contextmanager
def keeping_in_cache(folder: Path, what: str) -> Iterator[None]:
    """Let the block make a folder of the cache and write to it. A warning says if that is not possible.

    Args:
        folder: Folder in the cache.
        what: What is not kept then, in the plural.
    """
    try:
        yield
    except OSError as fault:
        reason = fault.strerror or fault
        _LOG.warning("%s cannot be kept in %s: %s; %s", what, folder, reason, _NAME_ANOTHER_CACHE)


def usable_cache(folder: Path | None, what: str) -> Path | None:
    """Return a folder of the cache if it can be written. If not, a warning says so, and the result is None.

    Args:
        folder: Folder in the cache, or None for no cache.
        what: What is not kept then, in the plural.
    """
    usable = None
    if folder:
        with keeping_in_cache(folder, what):
            if is_remote(folder):
                _try_bucket(folder)
            else:
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
            usable = folder
    return usable


def _try_bucket(folder: Path) -> None:
    """Write a file to a folder in a bucket, and wait at most ``BUCKET_SECONDS`` for it.

    Raises:
        OSError: The bucket cannot be written, or does not answer.
    """
    outcome: Future[None] = Future()

    def write() -> None:
        try:
            with writing_errors(folder):
                (folder / ".trial").write_bytes(b"")
            outcome.set_result(None)
        except Exception as fault:
            outcome.set_exception(fault)

    Thread(target=write, daemon=True).start()
    try:
        outcome.result(BUCKET_SECONDS)
    except TimeoutError:
        raise OSError(f"the bucket did not answer within {BUCKET_SECONDS:g} s") from None
    except UserError as fault:
        raise OSError(str(fault).removeprefix(f"{folder} ")) from fault


@contextmanager
def atomic_path(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Give a path to write to, whose file appears at ``path`` once it is complete and synced, or not at all.

    The file is written beside its place, as ``NAME.partial``. A later run overwrites what a killed one left there.

    Args:
        path: Path of the file, in a folder that exists. In a bucket, it is given itself.
        shared: Whether several processes may write the file at the same time. Each then writes under a name of its own.
    """
    if is_remote(path):
        yield path
        return
    partial = path.with_name(f".{uuid.uuid4().hex}.partial" if shared else f"{path.name}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_file(path: Path, *, shared: bool = False) -> Iterator[BinaryIO]:
    """Open a file for writing that appears at ``path`` once it is complete and synced, or not at all.

    Args:
        path: Path of the file, in a folder that exists.
        shared: Whether several processes may write the file at the same time.
    """
    with atomic_path(path, shared=shared) as partial, partial.open("wb") as file:
        yield file


@contextmanager
def synced_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing whose bytes are on the disk when the block ends, also after a crash of the machine."""
    with path.open("wb") as file:
        yield file
        if not is_remote(path):  # a bucket has the bytes once the file is closed
            file.flush()
            os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file as ``write_bytes`` does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, which appears whole or not at all. Missing folders are made, and a link is kept.

    What is no file, such as a pipe or ``/dev/stdout``, takes the content itself.
    """
    write_lines(path, [content])


def write_lines(path: Path, lines: Iterable[bytes]) -> None:
    """Write a file as ``write_bytes`` does, out of pieces that need not be in memory together."""
    if _is_device(path):
        with path.open("wb") as device:
            device.writelines(lines)
        return
    path = path if is_remote(path) else path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, shared=True) as file:
        file.writelines(lines)


def _is_device(path: Path) -> bool:
    """Whether a path names a device or a pipe, in whose place no file may be put."""
    if is_remote(path) or not path.exists() or path.is_dir():
        return False
    return not path.is_file() or (_DEVICES in path.parents and path.is_symlink())


def write_json(path: Path, content: Any, *, indent: int | None = 2, shared: bool = False) -> None:
    """Write ``content`` as JSON, to a file that appears whole or not at all.

    Args:
        path: Path of the file, in a folder that exists.
        content: What ``json.dumps`` takes. A number that is not finite, which JSON does not have, is a ``ValueError``.
        indent: Number of spaces of indentation; None writes a single line.
        shared: Whether several processes may write the file at the same time.
    """
    encoded = json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False).encode()
    with atomic_file(path, shared=shared) as file:
        file.write(encoded + b"\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        UserError: There is no such file, or no access to it, or no JSON object in it.
    """
    with reading_errors(path):
        text = path.read_bytes()
    try:
        content = json.loads(text)
    except ValueError as fault:
        raise UserError(f"{path} is not JSON: {fault}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


def copy_file(source: Path, destination: Path) -> None:
    """Copy a file of moderate size. Either path may be in a bucket."""
    destination.write_bytes(source.read_bytes())


def check_file_writable(path: Path) -> None:
    """Check that a file can be written, before the work whose result it takes. Its folder is made.

    Raises:
        UserError: It cannot be written.
    """
    if _is_device(path):
        if not os.access(path, os.W_OK):
            raise UserError(f"{path} cannot be written: you have no permission")
        return
    with writing_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        is_folder = path.is_dir()
        if not is_remote(path):
            tempfile.TemporaryFile(dir=path.parent).close()
    if is_folder:
        raise UserError(f"{path} cannot be written: it is a folder; name a file")


def short_digest(content: bytes) -> str:
    """Return 16 hexadecimal digits of a SHA-256, by which contents are told apart."""
    return hashlib.sha256(content).hexdigest()[:16]
