"""LLaVA-CoT-100k in the format of tfds: records, shards, and the builder of the data set."""

import contextlib
import errno
import io
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from PIL import Image

from llava_cot_jax.data.raw.annotations import AnnotationRow, open_annotations, read_conversations
from llava_cot_jax.data.raw.images import RawImages
from llava_cot_jax.files import atomic_file, atomic_path
from llava_cot_jax.paths import NO_SPACE
from llava_cot_jax.processing.images import identify_image, open_image

NAME = "llava_cot_100k"
FILE_FORMAT = "array_record"

JPEG_QUALITY = 95

# Each record is a group of its own, for random access. Images are already compressed.
WRITER_OPTIONS = "group_size:1,uncompressed"

FEATURES = tfds.features.FeaturesDict(
    {
        "id": tfds.features.Text(),
        "line": np.int64,
        "source": tfds.features.Text(),
        "image_paths": tfds.features.Sequence(tfds.features.Text()),
        # Bytes of files, since tfds cannot read a sequence of images without decoding them.
        "images": tfds.features.Sequence(tfds.features.Text()),
        "conversations": tfds.features.Sequence({"from": tfds.features.Text(), "value": tfds.features.Text()}),
    }
)
_SERIALIZER = tfds.core.ExampleSerializer(FEATURES.get_serialized_info())


@dataclass(frozen=True)
class Shard:
    """A file of records, with the rows to write into it.

    Attributes:
        path: File of the records.
        turns: File of the conversations alone, with one line of JSON per record.
        entries: Rows, in order.
    """

    path: Path
    turns: Path
    entries: tuple[AnnotationRow, ...]

    def __len__(self) -> int:
        return len(self.entries)


def cut_into_shards(entries: Iterable[AnnotationRow], max_bytes: int, max_rows: int) -> list[tuple[AnnotationRow, ...]]:
    """Divide rows, in their order, into shards of at most ``max_bytes`` of image files and ``max_rows`` rows each."""
    shards: list[list[AnnotationRow]] = []
    size = 0
    for entry in entries:
        entry_size = sum(image.size for image in entry.images)
        size += entry_size
        if not shards or size > max_bytes or len(shards[-1]) == max_rows:
            shards.append([])
            size = entry_size
        shards[-1].append(entry)
    return [tuple(shard) for shard in shards]


def shard_name(split: str, index: int, count: int) -> str:
    """Return the file name of shard ``index`` of ``count``, as tfds requires it."""
    return f"{NAME}-{split}.{FILE_FORMAT}-{index:05d}-of-{count:05d}"


@dataclass(frozen=True)
class ShardWriter:
    """Writer of shards, each complete or not at all. It can be pickled.

    Attributes:
        annotations: File that the rows were read from.
        images: Images of the rows.
        max_side: Longest side in pixels of a written image; larger images are shrunk. None keeps every size.
    """

    annotations: Path
    images: RawImages
    max_side: int | None

    def __call__(self, shard: Shard) -> None:
        """Write one shard.

        Raises:
            UserError: A row can no longer be read.
            OSError: The disk is full or cannot be written.
        """
        # The conversations appear before the shard, so that a finished shard always has them.
        with (
            atomic_path(shard.path) as path,
            atomic_file(shard.turns) as turns,
            open_annotations(self.annotations) as lines,
        ):
            _write_records(path, (self._record(entry, lines, turns) for entry in shard.entries))
            if (written := count_records(path)) != len(shard):
                raise OSError(errno.EIO, f"{written} of {len(shard)} records are there after writing", str(path))

    def _record(self, entry: AnnotationRow, lines: BinaryIO, turns: BinaryIO) -> bytes:
        """Return the record of a row, and write its line to the file of conversations."""
        conversations = read_conversations(lines, entry)
        line = {
            "id": entry.id,
            "source": entry.source,
            "images": len(entry.images),
            "conversations": conversations,
        }
        turns.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        images = [self.images.read(image.name) for image in entry.images]
        example = {
            **line,
            "line": entry.line,
            "image_paths": entry.image_paths,
            "images": [shrink(image, self.max_side) if self.max_side else image for image in images],
        }
        # Without this the order of a record's fields would differ between processes.
        return _SERIALIZER.get_tf_example(FEATURES.encode_example(example)).SerializeToString(deterministic=True)


def _write_records(path: Path, records: Iterable[bytes]) -> None:
    writer = ArrayRecordWriter(str(path), WRITER_OPTIONS)
    try:
        for record in records:
            writer.write(record)
    finally:
        try:
            writer.close()
        except RuntimeError as fault:  # a full disk is reported only on closing
            number = next((n for n in NO_SPACE if os.strerror(n) in str(fault)), errno.EIO)
            raise OSError(number, str(fault), str(path)) from fault


def count_records(path: Path) -> int:
    """Count the records of a shard. Return 0 if it was cut short or its index is damaged."""
    reader = ArrayRecordReader(str(path))
    count: int = reader.num_records()
    with contextlib.suppress(RuntimeError):  # a damaged shard, whose count is 0 already
        reader.close()
    return count


def shrink(image: bytes, max_side: int) -> bytes:
    """Return the image file, or a shrunk one if its longest side exceeds ``max_side`` pixels.

    Raises:
        UserError: ``open_image`` cannot decode the image.
    """
    with warnings.catch_warnings(action="ignore"):
        kind, size = identify_image(image)
        if max(size) <= max_side:
            return image
        whole = open_image(image, max_side)
    width, height = (max(1, round(side * max_side / max(whole.size))) for side in whole.size)
    smaller = io.BytesIO()
    options = {"format": "JPEG", "quality": JPEG_QUALITY} if kind in ("JPEG", "MPO") else {"format": "PNG"}
    whole.resize((width, height), Image.Resampling.LANCZOS).save(smaller, **options)
    return smaller.getvalue()


class LlavaCot100k(tfds.core.ShardBasedBuilder):
    """Builder of a tfds data set from finished shards, which are linked and not written again.

    Args:
        shards: Shards of each split, in order. No split is empty.
        data_dir: Output folder, in tfds' own layout.
    """

    VERSION = tfds.core.Version("2.0.0")
    name = NAME

    def __init__(self, shards: Mapping[str, Sequence[Shard]], data_dir: Path) -> None:
        self._shards = shards
        super().__init__(data_dir=data_dir, file_format=FILE_FORMAT)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, features=FEATURES)

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[Callable[[], Iterator[tuple[int, None]]]]]:
        # tfds only counts these keys, since ``_LinkShard`` links the records.
        return {split: [partial(_keys, shard) for shard in shards] for split, shards in self._shards.items()}

    def _example_writer(self) -> tfds.core.ExampleWriter:
        return _LinkShard({shard.path.name: shard.path for shards in self._shards.values() for shard in shards})


def _keys(shard: Shard) -> Iterator[tuple[int, None]]:
    return ((entry.line, None) for entry in shard.entries)


class _LinkShard(tfds.core.ExampleWriter):
    """Writer for tfds that links a finished shard instead of writing it."""

    def __init__(self, finished: Mapping[str, Path]) -> None:
        super().__init__(tfds.core.FileFormat.ARRAY_RECORD)
        self._finished = finished

    def write(self, path: Path, examples: Iterable[Any]) -> None:
        Path(path).symlink_to(self._finished[path.name])
