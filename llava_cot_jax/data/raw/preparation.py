"""From a raw data set in LLaVA-CoT-100k's layout to one that is read at random: checked, split, in shards.

Checking decodes every image that a row names; writing makes the shards. Both go on where an earlier
run ended, and what comes out does not depend on how often that happened, nor on the workers.
"""

import contextlib
import hashlib
import io
import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from llava_cot_jax.data.description import DESCRIPTION, read_description, turns_name
from llava_cot_jax.data.raw.annotations import Annotations, Entry, LeftOut, Reason, in_validation, read_annotations
from llava_cot_jax.data.raw.images import RawImages, open_images
from llava_cot_jax.data.raw.shards import (
    LlavaCot100k,
    Shard,
    WriteShard,
    count_records,
    cut_into_shards,
    shard_name,
)
from llava_cot_jax.data.raw.summary import SPLITS, Summary, summarise
from llava_cot_jax.data.raw.work_folder import WorkFolder, disk_faults, whole_file, write_json
from llava_cot_jax.data.settings import Request
from llava_cot_jax.data.workers import parallel
from llava_cot_jax.errors import UserError
from llava_cot_jax.processing.images import open_image

SHARD_BYTES = 256 << 20
SHARD_ROWS = 8192
CHECK_IMAGES = 256
"""Images that are checked at a time; what was found in them is kept."""

LIBRARIES = ("tensorflow-datasets", "array_record", "pillow")

LEFT_OUT = "left_out.jsonl"
"""The file that names the rows that are left out."""

OnProgress = Callable[[int, int], None]
Progress = Callable[[str, str], AbstractContextManager[OnProgress]]
"""Called with what is being done and what is counted; gives a function for how many of how many are done."""


class TooManyLeftOut(UserError):
    """More rows cannot be used than may be left out.

    Attributes:
        summary: what is wrong with them.
    """

    def __init__(self, message: str, summary: Summary) -> None:
        super().__init__(message)
        self.summary = summary


def _silent(label: str, unit: str) -> AbstractContextManager[OnProgress]:
    return contextlib.nullcontext(lambda done, total: None)


def find_prepared(request: Request) -> Summary | None:
    """What was prepared of the same request before; None if nothing is at the output yet.

    Raises:
        UserError: something else is there, or the raw set cannot be read.
    """
    output = request.output
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    if not (output / DESCRIPTION).exists():
        raise UserError(f"{output} is there, and nothing that was prepared: name another output")
    description = read_description(output)
    settings = _settings(request, read_annotations(request.annotations, open_images(request.images), request.limit))
    if other := sorted(key for key in settings if settings[key] != description["settings"].get(key)):
        raise UserError(f"{output} was prepared with other {' and '.join(other)}: name another output, or remove it")
    WorkFolder(output).remove()
    return Summary(description["sources"], description["unnamed_images"])


def prepare(request: Request, *, workers: int = 0, allow_missing: int = 0, progress: Progress = _silent) -> Summary:
    """Check the raw set and write it to ``request.output``, or go on doing so.

    Args:
        workers: processes; with 0, this one does everything.
        allow_missing: how many rows may be left out.
        progress: shows how far things are.

    Raises:
        TooManyLeftOut: more rows than that cannot be used; nothing is at the output.
        UserError: the raw set cannot be read, the output cannot be written, another process is
            preparing it, or an earlier run left a work folder of another request.
    """
    images = open_images(request.images)
    with disk_faults(request.output), WorkFolder(request.output) as work:
        annotations = read_annotations(request.annotations, images, request.limit)
        settings = _settings(request, annotations)
        work.begin(settings)
        with progress("checking", "images") as on_progress:
            broken = _check_images(annotations, images, work.path / "checks", workers, on_progress)
        splits, left_out = _sort_out(annotations, broken, request.validation_share)
        summary = summarise(splits, left_out, _unnamed(images, annotations))
        _write_lines(work.result / LEFT_OUT, [asdict(row) for row in left_out])
        _refuse_beyond(allow_missing, summary, work.result / LEFT_OUT)
        shards = _plan(splits, work)
        with progress("writing", "rows") as on_progress:
            write = WriteShard(request.annotations, images, request.max_side)
            _work_off(write, [shard for some in shards.values() for shard in some], workers, on_progress)
        for split, some in shards.items():
            _join_turns(work.result / turns_name(split), some)
        _write_tfds_description(shards, work)
        description = _describe(settings, splits, summary)
        write_json(work.result / DESCRIPTION, description)
        work.finish()
    return summary


def _refuse_beyond(allow_missing: int, summary: Summary, names: Path) -> None:
    if summary.left_out == summary.rows:
        raise TooManyLeftOut(f"none of the {summary.rows} rows can be used; {names} says why", summary)
    if summary.left_out > allow_missing:
        raise TooManyLeftOut(
            f"{summary.left_out} of {summary.rows} rows cannot be used, {names} says why: mend them, or go on without "
            f"them by --allow-missing {summary.left_out}",
            summary,
        )


def _settings(request: Request, annotations: Annotations) -> dict[str, Any]:
    """Everything that the result depends on."""
    files = sorted({(entry.image.name, entry.image.size, entry.image.version) for entry in annotations.entries})
    return {
        "annotations": annotations.sha256,
        "images": hashlib.sha256(json.dumps(files).encode()).hexdigest(),
        "limit": request.limit,
        "max_side": request.max_side,
        "validation_share": request.validation_share,
        "shard_bytes": SHARD_BYTES,
        "shard_rows": SHARD_ROWS,
        "version": str(LlavaCot100k.VERSION),
    }


@dataclass(frozen=True)
class SomeImages:
    """Images to check, and the file that is to say what was found."""

    path: Path
    names: list[str]

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class CheckImages:
    """Decodes images and keeps the faults of those that do not decode. Can be pickled."""

    images: RawImages

    def __call__(self, some: SomeImages) -> None:
        write_json(some.path, {name: fault for name in some.names if (fault := self._fault(name))})

    def _fault(self, name: str) -> str:
        try:
            with warnings.catch_warnings(action="ignore"):
                open_image(self.images.read(name))
        except UserError as fault:
            return str(fault)
        return ""


def _check_images(
    annotations: Annotations, images: RawImages, folder: Path, workers: int, on_progress: OnProgress
) -> dict[str, str]:
    """The fault of each image that does not decode, by name. Each image is decoded once, however many rows it has."""
    folder.mkdir(exist_ok=True)
    names = list(dict.fromkeys(entry.image.name for entry in annotations.entries))
    tasks = [
        SomeImages(folder / f"{start}+{CHECK_IMAGES}.json", names[start : start + CHECK_IMAGES])
        for start in range(0, len(names), CHECK_IMAGES)
    ]
    _work_off(CheckImages(images), tasks, workers, on_progress)
    faults: dict[str, str] = {}
    for task in tasks:
        faults |= json.loads(task.path.read_text(encoding="utf-8"))
    return faults


Task = TypeVar("Task", SomeImages, Shard)


def _work_off(function: Callable[[Task], None], tasks: Sequence[Task], workers: int, on_progress: OnProgress) -> None:
    """Do those tasks whose file is not there yet."""
    pending = [task for task in tasks if not task.path.exists()]
    total = sum(map(len, tasks))
    done = total - sum(map(len, pending))
    on_progress(done, total)
    with closing(parallel(function, pending, workers)) as results:
        for i, _ in results:
            done += len(pending[i])
            on_progress(done, total)


def _sort_out(
    annotations: Annotations, broken: dict[str, str], validation_share: float
) -> tuple[dict[str, list[Entry]], list[LeftOut]]:
    """The rows of each split, and those left out, in the order of their lines."""
    splits: dict[str, list[Entry]] = {split: [] for split in SPLITS}
    left_out = list(annotations.left_out)
    for entry in annotations.entries:
        if fault := broken.get(entry.image.name):
            row = LeftOut(entry.line, entry.id, entry.source, entry.image_path, Reason.BROKEN_IMAGE, fault)
            left_out.append(row)
        else:
            splits[SPLITS[in_validation(entry.image_path, validation_share)]].append(entry)
    return splits, sorted(left_out, key=lambda row: row.line)


def _unnamed(images: RawImages, annotations: Annotations) -> int:
    """How many images no row names, not even one that is left out."""
    named = {entry.image.name for entry in annotations.entries}
    named |= {image.name for row in annotations.left_out if row.image and (image := images.find(row.image))}
    return len(set(images.names()) - named)


def _plan(splits: dict[str, list[Entry]], work: WorkFolder) -> dict[str, list[Shard]]:
    """The shards of each split that has rows."""
    plan = {}
    for split, entries in splits.items():
        cuts = cut_into_shards(entries, SHARD_BYTES, SHARD_ROWS)
        names = [shard_name(split, i, len(cuts)) for i in range(len(cuts))]
        plan[split] = [
            Shard(work.result / name, work.path / f"{name}.turns", cut) for name, cut in zip(names, cuts, strict=True)
        ]
    return {split: shards for split, shards in plan.items() if shards}


def _join_turns(path: Path, shards: Sequence[Shard]) -> None:
    """Write a split's conversations in one file, and hold shards and file against the plan once more."""
    with whole_file(path) as file:
        for shard in shards:
            lines = shard.turns.read_bytes()
            if not len(shard) == count_records(shard.path) == lines.count(b"\n"):
                raise UserError(f"{shard.path} is damaged: remove it and run the same command again")
            file.write(lines)


def _write_tfds_description(shards: dict[str, list[Shard]], work: WorkFolder) -> None:
    scratch = work.path / "tfds"
    shutil.rmtree(scratch, ignore_errors=True)
    builder = LlavaCot100k(shards, data_dir=scratch)
    with contextlib.redirect_stdout(io.StringIO()):  # where tfds says that it downloads
        builder.download_and_prepare()
    for name in ("dataset_info.json", "features.json"):
        with whole_file(work.result / name) as file:
            file.write((Path(builder.data_dir) / name).read_bytes())


def _describe(settings: dict[str, Any], splits: dict[str, list[Entry]], summary: Summary) -> dict[str, Any]:
    """What DESCRIPTION says."""
    return {
        "fingerprint": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        "settings": settings,
        "splits": {split: len(entries) for split, entries in splits.items() if entries},
        **asdict(summary),
        "libraries": {name: version(name) for name in LIBRARIES},
    }


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with whole_file(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
