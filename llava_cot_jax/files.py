"""Files that are written whole or not at all."""

import contextlib
import os
import tempfile
from pathlib import Path

from llava_cot_jax.errors import UserError
from llava_cot_jax.paths import access, is_remote


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file beside its place and rename it, so that a reader finds the old file or the new one.

    Folders that are missing are made. A bucket replaces a file as a whole by itself.

    Raises:
        UserError: the disk or the bucket refuses it.
    """
    if is_remote(path):
        with access(path):
            path.write_text(text, encoding="utf-8")
        return
    beside = path.with_name(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as fault:
        raise UserError(f"{path} cannot be written: {fault.strerror or fault}") from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def check_writable(path: Path) -> None:
    """Whether a file can be written, before the work whose result it takes. Its folder is made.

    Raises:
        UserError: it cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_folder = path.is_dir()
        if not is_remote(path):
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as fault:
        raise UserError(f"{path} cannot be written: {fault.strerror or fault}") from None
    if is_folder:
        raise UserError(f"{path} cannot be written: it is a folder; name a file")
