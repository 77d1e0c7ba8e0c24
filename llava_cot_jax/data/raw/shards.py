"""LLaVA-CoT-100k as tfds reads it: the records, the shards that hold them, and the builder that binds these."""

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

from llava_cot_jax.data.raw.annotations import Entry, open_annotations, read_conversations
from llava_cot_jax.data.raw.images import RawImages
from llava_cot_jax.data.raw.work_folder import NO_SPACE, beside, whole_file
from llava_cot_jax.processing.images import open_image

NAME = "llava_cot_100k"
FILE_FORMAT = "array_record"

JPEG_QUALITY = 95

# A record is a group of its own, for random access. Images are compressed already.
WRITER_OPTIONS = "group_size:1,uncompressed"

FEATURES = tfds.features.FeaturesDict(
    {
        "id": tfds.features.Text(),
        "line": np.int64,
        "source": tfds.features.Text(),
        "image_path": tfds.features.Text(),
        "image": tfds.features.Image(),
        "conversations": tfds.features.Sequence({"from": tfds.features.Text(), "value": tfds.features.Text()}),
    }
)
_SERIALIZER = tfds.core.ExampleSerializer(FEATURES.get_serialized_info())


@dataclass(frozen=True)
class Shard:
    """A file of records, and what goes into it.

    Attributes:
        path: the file.
        turns: another file, of the conversations alone: a line of JSON for each record.
        entries: the rows, in order.
    """

    path: Path
    turns: Path
    entries: tuple[Entry, ...]

    def __len__(self) -> int:
        return len(self.entries)


def cut_into_shards(entries: Iterable[Entry], max_bytes: int, max_rows: int) -> list[tuple[Entry, ...]]:
    """Rows in their order, as many to a shard as come to at most ``max_bytes`` of image files and ``max_rows``."""
    shards: list[list[Entry]] = []
    size = 0
    for entry in entries:
        size += entry.image.size
        if not shards or size > max_bytes or len(shards[-1]) == max_rows:
            shards.append([])
            size = entry.image.size
        shards[-1].append(entry)
    return [tuple(shard) for shard in shards]


def shard_name(split: str, index: int, count: int) -> str:
    """The file name of shard ``index`` of ``count``, as tfds wants it."""
    return f"{NAME}-{split}.{FILE_FORMAT}-{index:05d}-of-{count:05d}"


@dataclass(frozen=True)
class WriteShard:
    """Writes shards, each whole or not at all. Can be pickled.

    Attributes:
        annotations: the file that the entries were read from.
        images: where their images are.
        max_side: pixels; larger images are shrunk to so many on their longest side.
    """

    annotations: Path
    images: RawImages
    max_side: int | None

    def __call__(self, shard: Shard) -> None:
        """Write one.

        Raises:
            UserError: a row cannot be read any more.
            OSError: the disk is full, or else not fit to be written.
        """
        # The conversations first: where the shard is, they are.
        with beside(shard.path) as path, whole_file(shard.turns) as turns, open_annotations(self.annotations) as lines:
            _write_records(path, (self._record(entry, lines, turns) for entry in shard.entries))
            if (written := count_records(path)) != len(shard):
                raise OSError(errno.EIO, f"{written} of {len(shard)} records are there after writing", str(path))

    def _record(self, entry: Entry, lines: BinaryIO, turns: BinaryIO) -> bytes:
        """The record of a row; its line of the conversations is written on the way."""
        conversations = read_conversations(lines, entry)
        line = {"id": entry.id, "source": entry.source, "conversations": conversations}
        turns.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        image = self.images.read(entry.image.name)
        example = {
            **line,
            "line": entry.line,
            "image_path": entry.image_path,
            "image": shrink(image, self.max_side) if self.max_side else image,
        }
        # Else the fields of a record would stand in another order in every process.
        return _SERIALIZER.get_tf_example(FEATURES.encode_example(example)).SerializeToString(deterministic=True)


def _write_records(path: Path, records: Iterable[bytes]) -> None:
    writer = ArrayRecordWriter(str(path), WRITER_OPTIONS)
    try:
        for record in records:
            writer.write(record)
    finally:
        try:
            writer.close()
        except RuntimeError as fault:  # it keeps to itself until now that the disk was full
            number = next((n for n in NO_SPACE if os.strerror(n) in str(fault)), errno.EIO)
            raise OSError(number, str(fault), str(path)) from fault


def count_records(path: Path) -> int:
    """How many records a shard has; 0 if it was cut short, or its index is damaged."""
    reader = ArrayRecordReader(str(path))
    count: int = reader.num_records()
    with contextlib.suppress(RuntimeError):  # damage, of which the count knows
        reader.close()
    return count


def shrink(image: bytes, max_side: int) -> bytes:
    """The image file itself, or, if it is larger than ``max_side`` pixels, a smaller one of what ``open_image`` sees.

    Raises:
        UserError: what ``open_image`` refuses.
    """
    with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(image)) as file:
        longest, is_jpeg = max(file.size), file.format in ("JPEG", "MPO")
        if longest <= max_side:
            return image
        whole = open_image(image)
    width, height = (max(1, round(side * max_side / longest)) for side in whole.size)
    smaller = io.BytesIO()
    options = {"format": "JPEG", "quality": JPEG_QUALITY} if is_jpeg else {"format": "PNG"}
    whole.resize((width, height), Image.Resampling.LANCZOS).save(smaller, **options)
    return smaller.getvalue()


class LlavaCot100k(tfds.core.ShardBasedBuilder):
    """Makes a tfds data set of finished shards: their bytes are linked, not written anew.

    Args:
        shards: those of each split, in order; no split is empty.
        data_dir: where to, in tfds' own layout.
    """

    VERSION = tfds.core.Version("1.0.0")
    name = NAME

    def __init__(self, shards: Mapping[str, Sequence[Shard]], data_dir: Path) -> None:
        self._shards = shards
        super().__init__(data_dir=data_dir, file_format=FILE_FORMAT)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, features=FEATURES)

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[Callable[[], Iterator[tuple[int, None]]]]]:
        # Only counted: see _LinkShard.
        return {split: [partial(_keys, shard) for shard in shards] for split, shards in self._shards.items()}

    def _example_writer(self) -> tfds.core.ExampleWriter:
        return _LinkShard({shard.path.name: shard.path for shards in self._shards.values() for shard in shards})


def _keys(shard: Shard) -> Iterator[tuple[int, None]]:
    return ((entry.line, None) for entry in shard.entries)


class _LinkShard(tfds.core.ExampleWriter):
    """Puts a finished shard where tfds would write it."""

    def __init__(self, finished: Mapping[str, Path]) -> None:
        super().__init__(tfds.core.FileFormat.ARRAY_RECORD)
        self._finished = finished

    def write(self, path: Path, examples: Iterable[Any]) -> None:
        Path(path).symlink_to(self._finished[path.name])
