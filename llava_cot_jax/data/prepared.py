"""Random access to the rows of a prepared data set."""

import json
import operator
import os
import shutil
import tempfile
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np

from llava_cot_jax.data.description import read_description, turns_name
from llava_cot_jax.data.raw.annotations import make_turns
from llava_cot_jax.data.rows import Row, Turn
from llava_cot_jax.errors import UserError
from llava_cot_jax.files import atomic_path, cache_folder, usable_cache
from llava_cot_jax.paths import as_path, bucket_filesystem, is_remote, reading_errors

if TYPE_CHECKING:
    import tensorflow_datasets as tfds


class PreparedRows:
    """``Rows`` of a split of a prepared data set, on a disk or in a bucket.

    Each process opens the files on first use. The conversations of a data set in a bucket are copied into the user's
    cache folder, once for all processes; its records are read from the bucket.

    Raises:
        UserError: The folder is no prepared data set, or has no rows in the split.
    """

    def __init__(self, folder: str | Path, split: str) -> None:
        self._folder = as_path(folder)
        self._split = split
        description = read_description(self._folder)
        splits = description["splits"]
        if split not in splits:
            raise UserError(
                f"{folder} has no rows in split {split!r}, only in {' and '.join(splits)}: name one of these, or "
                "prepare the data with another share for validation; a training may validate on another data set "
                "(validation_data), or on none (eval_examples: 0, eval_generations: 0)"
            )
        self._length: int = splits[split]
        self._fingerprint = f"{description['fingerprint']}-{split}"

    def __reduce__(self) -> tuple[type, tuple[Path, str]]:
        return PreparedRows, (self._folder, self._split)

    @property
    def fingerprint(self) -> str:
        """Hash of the raw data set and of the settings that it was prepared with, and the name of the split."""
        return self._fingerprint

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Row:
        """Read the row at ``index``; its images are the bytes of files.

        Raises:
            IndexError: There is no row at ``index``.
            UserError: The record is damaged, or differs from its line in the file of conversations.
        """
        index = self._checked(index)
        source = self._source
        try:
            record = source[index]
        except Exception as fault:  # the exceptions of array_record are not documented
            raise UserError(
                f"record {index} of the split {self._split!r} is damaged: restore {self._shard(index)}, or prepare the "
                f"data anew ({fault})"
            ) from fault
        images = (record["image"],) if "image" in record else tuple(record["images"])
        said = zip(record["conversations"]["from"], record["conversations"]["value"], strict=True)
        conversations = [{"from": speaker.decode(), "value": text.decode()} for speaker, text in said]
        turns = make_turns(conversations, len(images))
        if turns != self.turns(index):
            raise UserError(f"{self._turns_path}, line {index + 1} differs from its record: prepare the data anew")
        return Row(record["id"].decode(), record["source"].decode(), images, turns)

    def turns(self, index: int) -> tuple[Turn, ...]:
        """Read the conversation of a row alone, from a file without images.

        Raises:
            IndexError: There is no row at ``index``.
            UserError: The line of the conversation is damaged.
        """
        index = self._checked(index)
        file, offsets = self._lines
        begin, end = offsets[index : index + 2].tolist()
        try:
            # Threads may share the file, so that seek and read would not be safe.
            line = json.loads(os.pread(file.fileno(), end - begin, begin))
            return make_turns(line["conversations"], line.get("images", 1))  # version 1 of the format had one
        except (ValueError, TypeError, KeyError) as fault:
            raise UserError(
                f"{self._turns_path}, line {index + 1} is damaged: prepare the data anew ({fault})"
            ) from fault

    def _checked(self, index: int) -> int:
        index = operator.index(index)
        if not 0 <= index < self._length:
            raise IndexError(f"there is no row {index} of {self._length}")
        return index

    @property
    def _turns_path(self) -> Path:
        return self._folder / turns_name(self._split)

    @cached_property
    def _info(self) -> "tfds.core.SplitInfo":
        return self._builder.info.splits[self._split]

    @cached_property
    def _builder(self) -> "tfds.core.DatasetBuilder":
        import tensorflow_datasets as tfds

        try:
            with reading_errors(self._folder):
                return tfds.builder_from_directory(self._folder)
        except UserError:
            raise
        except Exception as fault:  # tfds does not document what a damaged JSON file raises
            raise UserError(
                f"{self._folder}/dataset_info.json or features.json is damaged: prepare the data anew"
            ) from fault

    @cached_property
    def _source(self) -> Sequence[dict[str, Any]]:
        import tensorflow_datasets as tfds

        # Version 1 of the format had one image in each record, which tfds would decode.
        decoders = {"image": tfds.decode.SkipDecoding()} if "image" in self._builder.info.features else None
        source: Sequence[dict[str, Any]] = self._builder.as_data_source(self._split, decoders=decoders)
        return source

    def _shard(self, index: int) -> Path:
        """Return the file that holds a record."""
        return as_path(self._info.filepaths[bisect_right(list(accumulate(self._info.shard_lengths)), index)])

    @cached_property
    def _lines(self) -> tuple[BinaryIO, np.ndarray]:
        """File of conversations, with the offsets in bytes of its lines and of its end, int64 [records + 1]."""
        with reading_errors(self._turns_path):
            file = self._open_turns()
            offsets = np.fromiter(accumulate(map(len, file), initial=0), np.int64)
        if len(offsets) != self._length + 1:
            raise UserError(
                f"{self._turns_path} has {len(offsets) - 1} lines, not {self._length}: prepare the data anew"
            )
        return file, offsets

    def _open_turns(self) -> BinaryIO:
        """Open the file of conversations on a disk.

        A file in a bucket is copied into the cache, under a name that changes with the file's version in the bucket.
        Without a cache, the copy is a temporary file.
        """
        if not is_remote(self._turns_path):
            return self._turns_path.open("rb")
        bucket, name = bucket_filesystem(), str(self._turns_path)
        folder = usable_cache(cache_folder("turns"), "conversations")
        if not folder:
            temporary = tempfile.TemporaryFile()  # noqa: SIM115 - it stays open as long as this object
            with bucket.open(name) as source:
                shutil.copyfileobj(source, temporary)
            temporary.seek(0)
            return cast(BinaryIO, temporary)
        copy = folder / f"{bucket.ukey(name)}.jsonl"
        if not copy.exists():
            with atomic_path(copy, shared=True) as partial:
                bucket.get_file(name, str(partial))
        return copy.open("rb")
