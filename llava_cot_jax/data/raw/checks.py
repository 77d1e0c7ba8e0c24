"""Checks that images can be decoded. Each finding is kept by what was checked, and a later run checks only the rest."""

import json
import logging
import warnings
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import PIL

from llava_cot_jax.data.raw.forms import BINARY, HEAD_BYTES, IMAGE, recognise
from llava_cot_jax.data.raw.images import Member, RawImages
from llava_cot_jax.data.workers import parallel
from llava_cot_jax.errors import UserError
from llava_cot_jax.files import atomic_file, read_json
from llava_cot_jax.processing.images import TooManyPixels, open_image
from llava_cot_jax.progress import OnProgress

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checks:
    """Findings about all images of a data set.

    Attributes:
        faults: Reason for which an image cannot be used, by its name, of those that cannot.
        reused: Number of images that an earlier run checked.
        total: Number of images.
    """

    faults: dict[str, str]
    reused: int
    total: int

    def __str__(self) -> str:
        """Return on one line how many images were checked now and before."""
        return f"{self.total - self.reused:,} images were checked now, and {self.reused:,} in an earlier run"


def check_images(
    images: RawImages,
    members: Sequence[Member],
    folder: Path,
    *,
    max_side: int | None,
    task_size: int,
    workers: int,
    on_progress: OnProgress,
) -> Checks:
    """Decode each image once, but for those about which an earlier run left a finding that still holds.

    Args:
        images: Images of the data set.
        members: Images to check, each once.
        folder: Folder of the findings.
        max_side: Longest side in pixels of a written image; larger images are shrunk. None keeps every size.
        task_size: Number of images whose findings are saved together.
        workers: Number of worker processes; with 0, this process does the work.
        on_progress: Function that is called with the number of images done and of all.
    """
    kept = _read_findings(folder)
    # A finding holds for any longest side, or for this one.
    keys = {member: next((key for key in _keys(member, max_side) if key in kept), None) for member in members}
    faults = {member.name: kept[key] for member, key in keys.items() if key}
    pending = [member for member, key in keys.items() if not key]
    tasks = [tuple(pending[start : start + task_size]) for start in range(0, len(pending), task_size)]
    done = reused = len(members) - len(pending)
    on_progress(done, len(members))
    with closing(parallel(ImageChecker(images, folder, max_side), tasks, workers)) as results:
        for i, found in results:
            faults |= found
            done += len(tasks[i])
            on_progress(done, len(members))
    return Checks({name: fault for name, fault in faults.items() if fault}, reused, len(members))


@dataclass(frozen=True)
class ImageChecker:
    """Check of some images. It can be pickled.

    Attributes:
        images: Images of the data set.
        folder: Folder for a file of the findings.
        max_side: Longest side in pixels of a written image; larger images are shrunk. None keeps every size.
    """

    images: RawImages
    folder: Path
    max_side: int | None

    def __call__(self, members: Sequence[Member]) -> dict[str, str]:
        """Return the fault of each image, or nothing, by its name, and save what will still hold later."""
        faults: dict[str, str] = {}
        findings: dict[str, str] = {}
        for member in members:
            key, faults[member.name] = self._check(member)
            if key:
                findings[key] = faults[member.name]
        # In ASCII, because the name of a file need not be valid Unicode.
        content = json.dumps({"decoder": _decoder(), "findings": findings}).encode()
        with atomic_file(self.folder / f"{sha256(content).hexdigest()[:16]}.json") as file:
            file.write(content)
        return faults

    def _check(self, member: Member) -> tuple[str | None, str]:
        """Return the key under which the finding is kept, or None if it may not hold later, and the fault."""
        for_any, for_this = _keys(member, self.max_side)
        try:
            content = self.images.read(member.name)
        except UserError as fault:  # of the disk or the archive, which may be mended without a trace in the member
            return None, str(fault)
        try:
            with warnings.catch_warnings(action="ignore"):
                try:
                    open_image(content)
                except TooManyPixels as fault:
                    if self.max_side is None:
                        return for_this, f"{fault}, or give --max_side to shrink such images"
                    open_image(content, self.max_side)
                    return for_this, ""
        except UserError as fault:
            if isinstance(fault.__cause__, MemoryError):
                return None, str(fault)
            form = recognise(content[:HEAD_BYTES])
            if form and form != IMAGE and form != BINARY:
                remedy = form.remedy_for_images(Path(member.name)) if form.stands_in else "put the image in its place"
                return for_any, f"it is {form.what}: {remedy}"
            return for_this if isinstance(fault, TooManyPixels) else for_any, str(fault)
        return for_any, ""


def _keys(member: Member, max_side: int | None) -> tuple[str, str]:
    """Return the keys of a finding that holds for any longest side, and of one that holds for this one."""
    key = f"{member.name}|{member.size}|{member.version}|{member.changed}"
    return key, f"{key}|{max_side}"


def _decoder() -> str:
    """Return the version of the library on which the findings depend."""
    return f"pillow {PIL.__version__}"


def _read_findings(folder: Path) -> dict[str, str]:
    """Read what earlier runs found with the same decoder. Damaged files are left out, with a warning."""
    findings: dict[str, str] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            content = read_json(path)
            if content["decoder"] == _decoder():
                findings |= {str(key): str(fault) for key, fault in content["findings"].items()}
        except (ValueError, KeyError, AttributeError):
            _LOG.warning("%s is damaged: the images that it is about are checked again", path)
    return findings
