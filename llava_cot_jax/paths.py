"""Paths on a disk (of ``pathlib``) and in a bucket (of ``epath``, with the same calls), and what goes wrong there."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from etils import epath

from llava_cot_jax.errors import UserError

EMBEDDED = "shapes"
"""Names the small trained model of the shapes world, which comes with the package."""

EMBEDDED_FOLDER = Path(__file__).with_name("shapes_model")

_SCHEME = re.compile(r"([a-zA-Z][\w+.-]*):(?://|(?<=gs:)/)")  # pathlib makes one slash of two


def as_path(text: str | os.PathLike[str]) -> Path:
    """The absolute path that a user named, on a disk or in a bucket (``gs://bucket/folder``).

    A relative path is taken from the working directory, and ``~`` is the home folder. The result means the same
    after a change of the working directory, and Orbax, which refuses relative paths, takes it.

    Raises:
        UserError: an empty path, an unknown user after ``~``, no working directory, another scheme than ``gs://``,
            no bucket, or gcsfs is not installed.
    """
    name = os.fspath(text)
    if not (scheme := _SCHEME.match(name)):
        return _absolute(name)
    if scheme[1] != "gs":
        raise UserError(f"{name}: {scheme[1]}:// is not supported; give a local path or gs://bucket/folder")
    place = name[scheme.end() :].strip("/")
    if not place:
        raise UserError(f"{name} names no bucket; give gs://bucket/folder")
    # Else gcsfs asks for each bucket's layout, which it can do without, and waits a minute where it gets no answer.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # Else a listing is remembered for ever, though other machines write to the bucket too.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    try:
        import gcsfs  # noqa: F401
    except ImportError:
        raise UserError(f"gs://{place} needs gcsfs: pip install 'llava-cot-jax[gcs]'") from None
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints the traceback of all that it raises
    found: Path = epath.Path(f"gs://{place}")
    return found


def _absolute(name: str) -> Path:
    if not name.strip():
        raise UserError("a path is empty: name a file or a folder")
    try:
        path = Path(name).expanduser()
    except RuntimeError:
        raise UserError(f"{name}: there is no such user's home folder") from None
    try:
        # What lies above a symbolic link is not what its name says: only the disk can tell where ``..`` leads.
        return Path(os.path.realpath(path)) if ".." in path.parts else path.absolute()
    except FileNotFoundError:
        raise UserError(f"{name} is relative, but the working directory no longer exists: change to another") from None


def checkpoint_path(name: str | Path) -> Path:
    """The absolute path of a checkpoint's folder: of the package's own model, or what ``as_path`` makes of ``name``.

    Raises:
        UserError: as for ``as_path``.
    """
    return EMBEDDED_FOLDER if name == EMBEDDED else as_path(name)


def cache_folder() -> Path:
    """The folder of the user's cache that is this package's: below ``XDG_CACHE_HOME``, or below ``~/.cache``."""
    return as_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "llava_cot_jax"


def check_folder_can_be_made(folder: Path) -> None:
    """Whether ``folder`` is one that can be written to, or can be made. In a bucket, only the attempt tells.

    Raises:
        UserError: it is a file, lies below one, or may not be written to.
    """
    if is_remote(folder):
        return
    above = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not above.is_dir():
        raise UserError(f"{folder} cannot be written: {above} is not a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{folder} cannot be written: {above} is closed to you")


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is in a bucket."""
    scheme = _SCHEME.match(os.fspath(path))
    return scheme is not None and scheme[1] == "gs"


def bucket_files() -> Any:
    """The fsspec file system of buckets, for what ``epath`` lacks."""
    return fsspec.filesystem("gcs")


def files_in(folder: Path) -> set[str]:
    """The names of the files in ``folder``, not of its folders.

    Raises:
        UserError: no such folder (a bucket has those only that hold something), or no access to it.
    """
    with access(folder):
        if not is_remote(folder):
            return {path.name for path in folder.iterdir() if path.is_file()}
        entries = bucket_files().ls(str(folder), detail=True)
        return {entry["name"].rpartition("/")[2] for entry in entries if entry["type"] == "file"}


def move(folder: Path, destination: Path) -> None:
    """Give ``folder`` another name, on the same disk, or in the same bucket, which has names of files alone."""
    if is_remote(folder):
        files, place = bucket_files(), str(folder).removeprefix("gs://")
        for name in files.find(place):
            files.cp_file(name, f"{destination}{name.removeprefix(place)}")
            files.rm_file(name)
    else:
        destination.parent.mkdir(exist_ok=True)
        folder.rename(destination)


@contextmanager
def access(path: Path) -> Iterator[None]:
    """Turns what a disk or a bucket refuses in the block into a ``UserError`` that names ``path``."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} does not exist{' (or its bucket does not)' if is_remote(path) else ''}") from None
    except Exception as fault:
        if is_remote(path) and (reason := _refusal(fault)):
            raise UserError(f"{path} {reason}") from fault
        if isinstance(fault, OSError):
            raise UserError(f"{path} cannot be read: {fault.strerror or fault}") from None
        raise


def _refusal(fault: Exception) -> str:
    """Why a bucket cannot be used; nothing if ``fault`` is not of its making."""
    import aiohttp
    import requests
    from gcsfs.retry import HttpError, NonRetryableError
    from google.auth.exceptions import GoogleAuthError, TransportError

    first_line = (str(fault).splitlines() or [type(fault).__name__])[0]
    match fault:
        case TransportError() | aiohttp.ClientError() | requests.RequestException():
            return f"cannot be reached, is there a network? ({first_line})"
        case HttpError(code=401) | GoogleAuthError() | NonRetryableError():
            return "needs credentials: run `gcloud auth application-default login`"
        case OSError() if first_line.startswith("Forbidden"):
            return "is closed to your credentials: ask for the role Storage Object User on the bucket"
        case OSError() | HttpError():
            return f"cannot be used: {first_line}"
    return ""
