"""Paths of raw data as a user types them, which may be patterns of file names, or several paths."""

import glob
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

from llava_cot_jax.data.raw.split_zip import PART, VOLUME, find_parts
from llava_cot_jax.errors import UserError
from llava_cot_jax.paths import as_path

_URL = re.compile(r"([A-Za-z][\w+.-]*):/(/|(?<=gs:/))")

_COPY = {
    "gs": "gcloud storage cp -r {} .",
    "s3": "aws s3 cp --recursive {} .",
    "http": "curl -LO {}",
    "https": "curl -LO {}",
    "hf": "hf download",
}
"""Commands that copy files to this machine, by the scheme of their URL."""


def local_path(name: str) -> Path:
    """Return the absolute path of raw data, which are read from a disk.

    Raises:
        UserError: The name is a URL, or ``as_path`` refuses it.
    """
    if not (url := _URL.match(name)):
        return as_path(name)
    if url[1] == "file":
        return as_path(unquote(name.removeprefix("file://")))
    command = _COPY.get(url[1].lower(), "").format(shlex.quote(name))
    remedy = f" first, as by `{command}`" if command else " first"
    raise UserError(f"{name} is not on this machine, and raw data are read from a disk: copy it here{remedy}")


def annotations_path(given: str | Sequence[str]) -> Path:
    """Return the file of annotations that an option names, perhaps by a pattern.

    Raises:
        UserError: There are several files, or none for the pattern; or ``local_path`` refuses a name.
    """
    paths = _expand(given)
    if len(paths) > 1:
        names = shlex.join(map(str, paths[:3])) + (" ..." if len(paths) > 3 else "")
        raise UserError(
            f"--annotations names {len(paths)} files: join them, if they are JSON Lines, by `cat {names} > all.jsonl`, "
            "and name that"
        )
    return paths[0]


def images_path(given: str | Sequence[str]) -> Path:
    """Return the folder or archive of images that an option names, perhaps by a pattern or by all of its files.

    Several files or folders stand for the folder that they are in.

    Raises:
        UserError: There are several archives, or no file for a pattern; or ``local_path`` refuses a name.
    """
    paths = _expand(given)
    if len(paths) == 1:
        return paths[0]
    parts = [path for path in paths if PART.fullmatch(path.name)]
    if parts and set(paths) <= {*find_parts(parts[0])}:
        return parts[0]
    if volumes := [path for path in paths if VOLUME.fullmatch(path.name)]:
        return volumes[0]
    if archives := [path for path in paths if path.suffix.lower() == ".zip" or path in parts]:
        names = ", ".join(path.name for path in archives[:3]) + (", ..." if len(archives) > 3 else "")
        raise UserError(
            f"--images names {len(paths)} files, and {names} among them: unpack archives into one folder, and name that"
        )
    return Path(os.path.commonpath(paths))


def _expand(given: str | Sequence[str]) -> list[Path]:
    """Return the paths that names stand for, each of which may be a pattern."""
    paths: list[Path] = []
    for name in [given] if isinstance(given, str) else given:
        path = local_path(name)
        if os.path.lexists(path) or glob.escape(name) == name:
            paths.append(path)
        elif found := sorted(glob.glob(str(path), recursive=True)):  # noqa: PTH207, a pattern may be absolute
            paths += map(Path, found)
        else:
            raise UserError(f"there is no {path}, and no file that it is a pattern of")
    return paths
