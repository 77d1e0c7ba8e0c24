"""A prepared data set, read at random."""

import json
import operator
import os
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from llava_cot_jax.data.description import read_description, turns_name
from llava_cot_jax.data.index import default_cache
from llava_cot_jax.data.raw.annotations import make_turns
from llava_cot_jax.data.rows import Row, Turn
from llava_cot_jax.errors import UserError
from llava_cot_jax.paths import access, as_path, bucket_files, is_remote

if TYPE_CHECKING:
    import tensorflow_datasets as tfds


class PreparedRows:
    """The ``Rows`` of a split of a prepared directory, on a disk or in a bucket.

    Files are opened on first use, in each process anew. Of those in a bucket the conversations are copied
    into the user's cache folder, once for all processes; records are read where they are.

    Raises:
        UserError: the directory is none that was prepared, or it has no row in the split.
    """

    def __init__(self, directory: str | Path, split: str) -> None:
        self._directory = as_path(directory)
        self._split = split
        description = read_description(self._directory)
        splits = description["splits"]
        if split not in splits:
            raise UserError(
                f"{directory} has no rows in split {split!r}, only in {' and '.join(splits)}: name one of these, or "
                "prepare the data with another share for validation"
            )
        self._length: int = splits[split]
        self._fingerprint = f"{description['fingerprint']}-{split}"

    def __reduce__(self) -> tuple[type, tuple[Path, str]]:
        return PreparedRows, (self._directory, self._split)

    @property
    def fingerprint(self) -> str:
        """Changes with the raw set, with how it was prepared, and with the split."""
        return self._fingerprint

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Row:
        """The row at ``index``; its image is the bytes of a file.

        Raises:
            IndexError: there is none.
            UserError: its record is damaged, or is not the one that the file of conversations has in its place.
        """
        index = self._checked(index)
        source = self._source
        try:
            record = source[index]
        except Exception as fault:  # what array_record raises is not documented
            raise UserError(
                f"record {index} of the split {self._split!r} is damaged: restore {self._shard(index)}, or prepare the "
                f"data anew ({fault})"
            ) from fault
        conversations = zip(record["conversations"]["from"], record["conversations"]["value"], strict=True)
        turns = make_turns([{"from": speaker.decode(), "value": text.decode()} for speaker, text in conversations])
        if turns != self.turns(index):
            raise UserError(f"{self._turns_path}, line {index + 1} is not what its record has: prepare the data anew")
        return Row(record["id"].decode(), record["source"].decode(), record["image"], turns)

    def turns(self, index: int) -> tuple[Turn, ...]:
        """The conversation alone, from a file without images.

        Raises:
            IndexError: there is none.
            UserError: it is damaged.
        """
        index = self._checked(index)
        file, offsets = self._lines
        begin, end = offsets[index : index + 2].tolist()
        try:
            # Not seek and read: threads may share the file.
            return make_turns(json.loads(os.pread(file.fileno(), end - begin, begin))["conversations"])
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
        return self._directory / turns_name(self._split)

    @cached_property
    def _info(self) -> "tfds.core.SplitInfo":
        return self._builder.info.splits[self._split]

    @cached_property
    def _builder(self) -> "tfds.core.DatasetBuilder":
        import tensorflow_datasets as tfds

        try:
            with access(self._directory):
                return tfds.builder_from_directory(self._directory)
        except UserError:
            raise
        except Exception as fault:  # whatever reading a damaged JSON file raises
            raise UserError(
                f"{self._directory}/dataset_info.json or features.json is damaged: prepare the data anew"
            ) from fault

    @cached_property
    def _source(self) -> Sequence[dict[str, Any]]:
        import tensorflow_datasets as tfds

        source: Sequence[dict[str, Any]] = self._builder.as_data_source(
            self._split, decoders={"image": tfds.decode.SkipDecoding()}
        )
        return source

    def _shard(self, index: int) -> Path:
        """The file that holds a record."""
        return as_path(self._info.filepaths[bisect_right(list(accumulate(self._info.shard_lengths)), index)])

    @cached_property
    def _lines(self) -> tuple[BinaryIO, np.ndarray]:
        """The file of conversations, and int64 [records + 1]: where each line begins, and where the last one ends."""
        with access(self._turns_path):
            file = self._turns_on_disk().open("rb")
            offsets = np.fromiter(accumulate(map(len, file), initial=0), np.int64)
        if len(offsets) != self._length + 1:
            raise UserError(
                f"{self._turns_path} has {len(offsets) - 1} lines, not {self._length}: prepare the data anew"
            )
        return file, offsets

    def _turns_on_disk(self) -> Path:
        """The file of conversations; of one in a bucket, a copy in the cache, named by what is in the bucket now."""
        if not is_remote(self._turns_path):
            return self._turns_path
        cache = default_cache().with_name("turns")
        copy = cache / f"{bucket_files().ukey(str(self._turns_path))}.jsonl"
        if not copy.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=cache) as beside:
                bucket_files().get_file(str(self._turns_path), f"{beside}/{copy.name}")
                Path(beside, copy.name).replace(copy)
        return copy
