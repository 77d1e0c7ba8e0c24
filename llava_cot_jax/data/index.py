"""Index of a data set: the number of tokens of each row, or the reason for which it is skipped."""

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import numpy as np

from llava_cot_jax.data.chat import Chat
from llava_cot_jax.data.rows import Rows
from llava_cot_jax.data.settings import ChatSettings
from llava_cot_jax.errors import UserError
from llava_cot_jax.files import keeping_in_cache, read_json, write_json
from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.progress import OnProgress

INDEX_CHUNK = 512
"""Number of rows that are tokenised at a time. The tokenizer spreads them over its own threads, on all cores."""


@dataclass(frozen=True)
class Index:
    """Lengths of a data set's rows under one tokenizer and one ``ChatSettings``.

    Attributes:
        fingerprint: Hash of everything that the lengths depend on: rows, tokenizer, chat template and settings.
        lengths: Number of tokens of each row, int32 [rows]; 0 where a row is skipped.
        skipped: Reasons for which rows are skipped, by row number.
    """

    fingerprint: str
    lengths: np.ndarray
    skipped: dict[int, str]

    @classmethod
    def open(
        cls,
        rows: Rows,
        processor: Processor,
        settings: ChatSettings,
        folder: Path | None,
        on_progress: OnProgress = lambda done, total: None,
    ) -> Self:
        """Read the index from ``folder``, or build it and save it there.

        Args:
            rows: Data set.
            processor: Processor whose tokenizer and chat template are used.
            settings: Settings by which turns become tokens.
            folder: Folder where indices are cached, each under its fingerprint. Any number of processes may share it.
                With None, or where nothing can be written, the index is not kept.
            on_progress: Function that is called with the number of rows done and of all rows while an index is built.

        Raises:
            UserError: No row is left to train on.
        """
        fingerprint = _fingerprint(rows, processor, settings)
        path = folder / f"{fingerprint}.json" if folder else None
        kept = cls._read(path, fingerprint, len(rows)) if path else None
        index = kept or cls._build(rows, Chat(processor, settings), fingerprint, on_progress)
        if not index.lengths.any():
            raise UserError(f"none of the {len(rows)} rows can be trained on: {index.summary()}")
        if path and not kept:
            index._write(path)
        return index

    def summary(self) -> str:
        """Return on one line how many rows are skipped, and for what reasons."""
        kinds = Counter(self.skipped.values()).most_common()
        return f"{len(self.skipped)} of {len(self.lengths)} rows skipped" + "".join(
            f"; {n}: {kind}" for kind, n in kinds
        )

    @classmethod
    def _build(cls, rows: Rows, chat: Chat, fingerprint: str, on_progress: OnProgress) -> Self:
        found: list[int | str] = []
        while len(found) < len(rows):
            some = range(len(found), min(len(found) + INDEX_CHUNK, len(rows)))
            found += chat.lengths([rows.turns(i) for i in some])
            on_progress(len(found), len(rows))
        lengths = np.array([0 if isinstance(length, str) else length for length in found], np.int32)
        return cls(fingerprint, lengths, {i: reason for i, reason in enumerate(found) if isinstance(reason, str)})

    @classmethod
    def _read(cls, path: Path, fingerprint: str, count: int) -> Self | None:
        """Read a saved index. Return None if there is none that can be used."""
        try:
            kept = read_json(path)
            lengths = np.array(kept["lengths"], np.int32)
            skipped = {int(i): str(reason) for i, reason in kept["left_out"].items()}
        except (ValueError, KeyError, AttributeError, TypeError):  # no such file is a ``UserError``, a ``ValueError``
            return None
        whole = kept.get("fingerprint") == fingerprint and lengths.shape == (count,)
        return cls(fingerprint, lengths, skipped) if whole else None

    def _write(self, path: Path) -> None:
        content = {"fingerprint": self.fingerprint, "lengths": self.lengths.tolist(), "left_out": self.skipped}
        with keeping_in_cache(path.parent, "counts of tokens"):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, content, indent=None, shared=True)


def _fingerprint(rows: Rows, processor: Processor, settings: ChatSettings) -> str:
    tokenizer = processor.tokenizer
    parts = (
        rows.fingerprint,
        tokenizer.backend_tokenizer.to_str(),
        str(tokenizer.chat_template),
        json.dumps(asdict(settings), sort_keys=True),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
