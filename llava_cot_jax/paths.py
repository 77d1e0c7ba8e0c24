"""Paths on a disk (``pathlib``) and in a bucket (``epath``, with the same methods), and the errors of their use."""

import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import fsspec
from etils import epath

from llava_cot_jax.checks import shown
from llava_cot_jax.errors import TransientError, UserError

BUNDLED_MODEL = "shapes"
"""Name of the small trained model of the shapes world, which comes with the package."""

BUNDLED_MODEL_FOLDER = Path(__file__).with_name("shapes_model")

NO_SPACE = (ENOSPC, EDQUOT)
"""Numbers of the errors by which a full disk, or a used-up quota, is reported."""

_SCHEME = re.compile(r"([a-zA-Z][\w+.-]*):(?://|(?<=gs:)/)")  # pathlib makes one slash of two


def as_path(text: str | os.PathLike[str]) -> Path:
    """Return the absolute path that a user named, on a disk or in a bucket (``gs://bucket/folder``).

    A relative path is taken from the working directory, ``~`` is the home folder, and ``file:///folder`` is a path on
    this machine. The result means the same after a change of the working directory, and Orbax, which refuses relative
    paths, takes it.

    Raises:
        UserError: The path is empty or no text, it names an unknown user after ``~``, it has a scheme other than
            ``gs://`` and ``file://``, or it names no bucket. Or there is no working directory, or gcsfs is not
            installed.
    """
    if not isinstance(text, str | os.PathLike):
        raise UserError(f"a path is {shown(text)}; name a file or a folder")
    name = os.fspath(text)
    try:
        if b"\0" in os.fsencode(name):
            raise UserError(f"a path is {shown(name)}; it has a null character, which no path can have")
    except UnicodeEncodeError as fault:
        character = f"{name[fault.start]!a} at position {fault.start}"
        raise UserError(f"a path has the character {character}, which no path can have here: rename it") from None
    if not (scheme := _SCHEME.match(name)):
        return _absolute(name)
    if scheme[1] == "file":
        return _local_path(name)
    if scheme[1] != "gs":
        raise UserError(f"{name}: {scheme[1]}:// is not supported; give a local path or gs://bucket/folder")
    place = name[scheme.end() :].strip("/")
    if not place:
        raise UserError(f"{name} names no bucket; give gs://bucket/folder")
    # By default gcsfs asks for the layout of each bucket, which it can do without, and waits a minute for the answer.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # By default a listing is remembered for ever, though other machines write to the bucket too.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    try:
        import gcsfs  # noqa: F401
    except ImportError:
        raise UserError(f"gs://{place} needs gcsfs: pip install 'llava-cot-jax[gcs]'") from None
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints the traceback of every error that it raises
    found: Path = epath.Path(f"gs://{place}")
    return found


def _local_path(url: str) -> Path:
    """Return the path that a ``file://`` URL names."""
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path:
        raise UserError(f"{url} names no file of this machine; give file:///folder/file, or the path alone")
    return _absolute(url2pathname(parts.path))


def _absolute(name: str) -> Path:
    if not name.strip():
        raise UserError("a path is empty: name a file or a folder")
    try:
        path = Path(name).expanduser()
    except RuntimeError:
        raise UserError(f"{name}: there is no such user's home folder") from None
    try:
        # After a symbolic link, only the disk can tell where ``..`` leads.
        return Path(os.path.realpath(path)) if ".." in path.parts else path.absolute()
    except FileNotFoundError:
        raise UserError(f"{name} is relative, but the working directory no longer exists: change to another") from None


def checkpoint_path(name: str | Path) -> Path:
    """Return the absolute path of a checkpoint's folder: the bundled model's, or what ``as_path`` makes of ``name``.

    Raises:
        UserError: ``as_path`` refuses ``name``.
    """
    return BUNDLED_MODEL_FOLDER if isinstance(name, str) and name == BUNDLED_MODEL else as_path(name)


def check_folder_writable(folder: Path) -> None:
    """Check that a folder can be written to, or can be made. In a bucket, only writing can tell.

    Raises:
        UserError: It is a file, lies below a file, or may not be written to.
    """
    if is_remote(folder):
        return
    above = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not above.is_dir():
        raise UserError(f"{folder} cannot be written: {above} is not a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{folder} cannot be written: you have no permission to write to {above}")


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is in a bucket."""
    scheme = _SCHEME.match(os.fspath(path))
    return scheme is not None and scheme[1] == "gs"


def bucket_filesystem() -> Any:
    """Return the fsspec file system of buckets, for what ``epath`` lacks."""
    return fsspec.filesystem("gcs")


def files_in(folder: Path) -> set[str]:
    """Return the names of the files in a folder, without those of its folders.

    Raises:
        UserError: There is no such folder (a bucket has no empty folders), or no access to it.
    """
    with reading_errors(folder):
        if not is_remote(folder):
            return {path.name for path in folder.iterdir() if path.is_file()}
        entries = bucket_filesystem().ls(str(folder), detail=True)
        return {entry["name"].rpartition("/")[2] for entry in entries if entry["type"] == "file"}


def move(folder: Path, destination: Path) -> None:
    """Rename a folder on its disk. In a bucket, which has no folders, rename each of its files."""
    if is_remote(folder):
        files, place = bucket_filesystem(), str(folder).removeprefix("gs://")
        for name in files.find(place):
            files.cp_file(name, f"{destination}{name.removeprefix(place)}")
            files.rm_file(name)
    else:
        destination.parent.mkdir(exist_ok=True)
        folder.rename(destination)


def remove_folder(folder: Path) -> None:
    """Remove a folder and all that is in it, if there is one."""
    if not is_remote(folder):
        if folder.exists():
            shutil.rmtree(folder)
    elif bucket_filesystem().exists(str(folder)):
        bucket_filesystem().rm(str(folder), recursive=True)


@contextmanager
def reading_errors(path: Path) -> Iterator[None]:
    """Turn the errors of a disk or a bucket from which the block reads into a ``UserError`` that names ``path``."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} does not exist{' (or its bucket does not)' if is_remote(path) else ''}") from None
    except Exception as fault:
        if is_remote(path) and (mistake := _bucket_error(path, fault)):
            raise mistake from fault
        if isinstance(fault, OSError):
            raise UserError(f"{path} cannot be read: {fault.strerror or fault}") from None
        raise


@contextmanager
def writing_errors(path: Path) -> Iterator[None]:
    """Turn the errors of a disk or a bucket to which the block writes into a ``UserError`` that names ``path``.

    Args:
        path: File or folder that the block writes. Another file at which the error happened is named too, unless it
            lies beside ``path``, as temporary files do.
    """
    try:
        yield
    except Exception as fault:
        if is_remote(path) and (mistake := _bucket_error(path, fault)):
            raise mistake from fault
        if not isinstance(fault, OSError):
            raise
        if fault.errno in NO_SPACE:
            raise UserError(
                f"no space left on the disk of {path}: free some, then run the same command again"
            ) from fault
        name = fault.filename
        other = f" ({name})" if isinstance(name, str | Path) and Path(name).parent != path.parent else ""
        raise UserError(f"{path} cannot be written: {fault.strerror or fault}{other}") from fault


def _bucket_error(path: Path, fault: Exception) -> UserError | None:
    """Return the error that says why ``path`` in a bucket cannot be used, or None if ``fault`` is not a bucket's."""
    import aiohttp
    import requests
    from gcsfs.retry import HttpError, NonRetryableError
    from google.auth.exceptions import GoogleAuthError, TransportError

    first_line = (str(fault).splitlines() or [type(fault).__name__])[0]
    match fault:
        case FileNotFoundError():
            return UserError(f"{path} does not exist (or its bucket does not)")
        case TransportError() | aiohttp.ClientError() | requests.RequestException():
            return TransientError(f"{path} cannot be reached, is there a network? ({first_line})")
        case HttpError(code=401) | GoogleAuthError() | NonRetryableError():
            return UserError(f"{path} needs credentials: run `gcloud auth application-default login`")
        case OSError() if first_line.startswith("Forbidden"):
            return UserError(
                f"{path} is closed to your credentials: ask for the role Storage Object User on the bucket"
            )
        case OSError() | HttpError():
            return UserError(f"{path} cannot be used: {first_line}")
    return None
