"""Preparation of a raw data set in LLaVA-CoT-100k's layout: checked, split and written in shards for random access.

Checking decodes every image that a row names; writing makes the shards. Both continue where an earlier run ended. The
result does not depend on interruptions or on the number of workers.
"""

import contextlib
import hashlib
import io
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llava_cot_jax.data.description import DESCRIPTION, read_description, turns_name
from llava_cot_jax.data.raw.annotations import (
    AnnotationRow,
    Annotations,
    Reason,
    SkippedRow,
    in_validation,
    link_images,
    read_annotations,
)
from llava_cot_jax.data.raw.checks import check_images
from llava_cot_jax.data.raw.images import RawImages, open_images
from llava_cot_jax.data.raw.shards import (
    LlavaCot100k,
    Shard,
    ShardWriter,
    count_records,
    cut_into_shards,
    shard_name,
)
from llava_cot_jax.data.raw.summary import REMARKS_FILE, SPLITS, Summary, summarise
from llava_cot_jax.data.raw.work_folder import WorkFolder
from llava_cot_jax.data.settings import PrepareSettings
from llava_cot_jax.data.workers import parallel
from llava_cot_jax.errors import UserError
from llava_cot_jax.files import atomic_file, write_json
from llava_cot_jax.paths import writing_errors
from llava_cot_jax.progress import OnProgress

SHARD_BYTES = 256 << 20
SHARD_ROWS = 8192
CHECK_IMAGES = 256
"""Number of images in one task of checking, whose findings are saved for later runs."""

LIBRARIES = ("tensorflow-datasets", "array_record", "pillow")

SKIPPED_FILE = "skipped.jsonl"
"""Name of the file that lists the rows that are skipped."""

OF_DATA = {"annotations", "images"}
"""Recorded settings that identify the raw data set. All others are the user's choice, or this package's."""

Progress = Callable[[str, str], AbstractContextManager[OnProgress]]
"""Progress display: called with a label and a unit, it gives a function of the number done and the total."""


class TooManySkipped(UserError):
    """Error for more unusable rows than may be skipped.

    Attributes:
        summary: Counts of the rows that are skipped, by reason.
    """

    def __init__(self, message: str, summary: Summary) -> None:
        super().__init__(message)
        self.summary = summary


def _silent(label: str, unit: str) -> AbstractContextManager[OnProgress]:
    return contextlib.nullcontext(lambda done, total: None)


def find_prepared(settings: PrepareSettings) -> Summary | None:
    """Return the summary of an output that was prepared with the same settings, or None if there is no output yet.

    Raises:
        UserError: The output is something else or has other settings, or the raw data set cannot be read.
    """
    output = settings.output
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    if not (output / DESCRIPTION).exists():
        raise UserError(f"{output} exists and is no prepared data set: name another output")
    description = read_description(output)
    annotations = read_annotations(settings.annotations, open_images(settings.images), settings.limit)
    recorded = _recorded_settings(settings, annotations)
    if other := sorted(key for key in recorded if recorded[key] != description["settings"].get(key)):
        raise UserError(f"{output} was prepared with other {' and '.join(other)}: name another output, or remove it")
    WorkFolder(output).remove()
    return Summary(description["sources"], description["unnamed_images"])


def prepare_dataset(
    settings: PrepareSettings,
    *,
    workers: int = 0,
    allow_missing: int = 0,
    progress: Progress = _silent,
    note: Callable[[str], object] = lambda line: None,
) -> Summary:
    """Check the raw data set and write it to the output, or continue an earlier run.

    Args:
        settings: Settings that decide the content of the output.
        workers: Number of worker processes; with 0, this process does the work.
        allow_missing: Maximum number of rows that may be skipped.
        progress: Progress display.
        note: Function that is called with a line about work of an earlier run that is used again.

    Raises:
        TooManySkipped: More than ``allow_missing`` rows cannot be used. No output is written.
        UserError: The raw data set cannot be read, the output cannot be written, another process is preparing it, or
            an earlier run left shards with other settings.
    """
    images = open_images(settings.images)
    with writing_errors(settings.output), WorkFolder(settings.output) as work:
        annotations = read_annotations(settings.annotations, images, settings.limit)
        recorded = _recorded_settings(settings, annotations)
        work.begin(recorded, of_data=OF_DATA)
        with progress("checking", "images") as on_progress:
            checks = check_images(
                images,
                annotations.members,
                work.checks,
                max_side=settings.max_side,
                task_size=CHECK_IMAGES,
                workers=workers,
                on_progress=on_progress,
            )
        if checks.reused:
            note(str(checks))
        splits, skipped = _divide_rows(annotations, checks.faults, settings.validation_share)
        summary = summarise(splits, skipped, _count_unnamed_images(images, annotations))
        _write_lines(work.result / SKIPPED_FILE, [asdict(row) for row in skipped])
        _write_lines(work.result / REMARKS_FILE, _list_remarks(splits))
        _check_skipped(allow_missing, summary, skipped, work.result / SKIPPED_FILE, images)
        shards = _plan_shards(splits, work)
        with progress("writing", "rows") as on_progress:
            write = ShardWriter(settings.annotations, images, settings.max_side)
            _write_shards(write, [shard for some in shards.values() for shard in some], workers, on_progress)
        for split, some in shards.items():
            _join_turns(work.result / turns_name(split), some)
        _write_tfds_description(shards, work)
        description = _describe_dataset(recorded, splits, summary)
        write_json(work.result / DESCRIPTION, description)
        work.finish()
    return summary


def _check_skipped(
    allow_missing: int, summary: Summary, skipped: Sequence[SkippedRow], names: Path, images: RawImages
) -> None:
    """Check that no more rows are skipped than allowed, and that not all are.

    Args:
        allow_missing: Maximum number of rows that may be skipped.
        summary: Counts of the rows.
        skipped: Rows that are skipped.
        names: File that lists the rows that are skipped.
        images: Images of the data set.

    Raises:
        TooManySkipped: Too many rows are skipped.
    """
    if summary.skipped < summary.rows and summary.skipped <= allow_missing:
        return
    why = f"{names} says why{_describe_first(skipped, images)}"
    if summary.skipped == summary.rows:
        raise TooManySkipped(f"none of the {summary.rows} rows can be used; {why}", summary)
    raise TooManySkipped(
        f"{summary.skipped} of {summary.rows} rows cannot be used, {why}: correct them, or leave them out by "
        f"--allow_missing {summary.skipped}",
        summary,
    )


def _describe_first(skipped: Sequence[SkippedRow], images: RawImages) -> str:
    """Return the first row that is skipped for the most frequent reason, and where missing images may be."""
    if not skipped:
        return ""
    (most, _), *_ = Counter(row.reason for row in skipped).most_common()
    first = next(row for row in skipped if row.reason == most)
    described = f" (line {first.line}, {most}{first.detail and f': {first.detail}'}"
    missing = [row.image for row in skipped if row.reason == Reason.MISSING_IMAGE]
    return f"{described}{images.suggest(missing) if missing else ''})"


def _recorded_settings(settings: PrepareSettings, annotations: Annotations) -> dict[str, Any]:
    """Return everything that the content of the output depends on, for its description."""
    files = sorted((image.name, image.size, image.version) for image in annotations.members)
    return {
        "annotations": annotations.sha256,
        "images": hashlib.sha256(json.dumps(files).encode()).hexdigest(),
        "limit": settings.limit,
        "max_side": settings.max_side,
        "validation_share": settings.validation_share,
        "shard_bytes": SHARD_BYTES,
        "shard_rows": SHARD_ROWS,
        "version": str(LlavaCot100k.VERSION),
    }


def _write_shards(write: ShardWriter, shards: Sequence[Shard], workers: int, on_progress: OnProgress) -> None:
    """Write the shards whose file does not exist yet."""
    pending = [shard for shard in shards if not shard.path.exists()]
    total = sum(map(len, shards))
    done = total - sum(map(len, pending))
    on_progress(done, total)
    with closing(parallel(write, pending, workers)) as results:
        for i, _ in results:
            done += len(pending[i])
            on_progress(done, total)


def _divide_rows(
    annotations: Annotations, broken: dict[str, str], validation_share: float
) -> tuple[dict[str, list[AnnotationRow]], list[SkippedRow]]:
    """Divide the rows into splits. Return the rows of each split and those skipped, in the order of their lines."""
    splits: dict[str, list[AnnotationRow]] = {split: [] for split in SPLITS}
    skipped = list(annotations.skipped)
    linked = link_images(annotations.entries)
    for entry in annotations.entries:
        images = zip(entry.image_paths, entry.images, strict=True)
        faults = [(path, broken[image.name]) for path, image in images if image.name in broken]
        if faults:
            path, fault = faults[0]
            skipped.append(SkippedRow(entry.line, entry.id, entry.source, path, Reason.BROKEN_IMAGE, fault))
        else:
            # A row without images has a draw of its own.
            key = linked[entry.image_paths[0]] if entry.image_paths else f"line {entry.line}"
            splits[SPLITS[in_validation(key, validation_share)]].append(entry)
    return splits, sorted(skipped, key=lambda row: row.line)


def _list_remarks(splits: Mapping[str, Sequence[AnnotationRow]]) -> list[dict[str, Any]]:
    """Return the rows that have remarks, in the order of their lines."""
    entries = (entry for entries in splits.values() for entry in entries if entry.remarks)
    return [
        {"line": entry.line, "id": entry.id, "source": entry.source, "remarks": entry.remarks}
        for entry in sorted(entries, key=lambda entry: entry.line)
    ]


def _count_unnamed_images(images: RawImages, annotations: Annotations) -> int:
    """Count the images that no row names, not even a row that is skipped."""
    named = {image.name for image in annotations.members}
    named |= {image.name for row in annotations.skipped if row.image and (image := images.find(row.image))}
    return len(set(images.names()) - named)


def _plan_shards(splits: dict[str, list[AnnotationRow]], work: WorkFolder) -> dict[str, list[Shard]]:
    """Return the shards of each split that has rows."""
    plan = {}
    for split, entries in splits.items():
        cuts = cut_into_shards(entries, SHARD_BYTES, SHARD_ROWS)
        names = [shard_name(split, i, len(cuts)) for i in range(len(cuts))]
        plan[split] = [
            Shard(work.result / name, work.scratch / f"{name}.turns", cut)
            for name, cut in zip(names, cuts, strict=True)
        ]
    return {split: shards for split, shards in plan.items() if shards}


def _join_turns(path: Path, shards: Sequence[Shard]) -> None:
    """Write a split's conversations into one file, and check the number of records of each shard."""
    with atomic_file(path) as file:
        for shard in shards:
            lines = shard.turns.read_bytes()
            if not len(shard) == count_records(shard.path) == lines.count(b"\n"):
                raise UserError(f"{shard.path} is damaged: remove it and run the same command again")
            file.write(lines)


def _write_tfds_description(shards: dict[str, list[Shard]], work: WorkFolder) -> None:
    scratch = work.scratch / "tfds"
    shutil.rmtree(scratch, ignore_errors=True)
    builder = LlavaCot100k(shards, data_dir=scratch)
    with contextlib.redirect_stdout(io.StringIO()):  # tfds prints that it downloads
        builder.download_and_prepare()
    for name in ("dataset_info.json", "features.json"):
        with atomic_file(work.result / name) as file:
            file.write((Path(builder.data_dir) / name).read_bytes())


def _describe_dataset(
    settings: dict[str, Any], splits: dict[str, list[AnnotationRow]], summary: Summary
) -> dict[str, Any]:
    """Return the content of the file that describes the prepared data set."""
    return {
        "fingerprint": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        "settings": settings,
        "splits": {split: len(entries) for split, entries in splits.items() if entries},
        **asdict(summary),
        "libraries": {name: version(name) for name in LIBRARIES},
    }


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with atomic_file(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
