"""The index of a data set: how many tokens each of its rows has, or why it is left out."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import numpy as np

from llava_cot_jax.data.chat import Chat
from llava_cot_jax.data.rows import Rows
from llava_cot_jax.data.settings import ChatSettings
from llava_cot_jax.errors import UserError
from llava_cot_jax.paths import cache_folder
from llava_cot_jax.processing.processor import Processor

CHUNK = 512
"""Rows that are tokenised at once, on all cores: the tokenizer spreads them over its own threads."""


@dataclass(frozen=True)
class Index:
    """The lengths of a data set's rows under one tokenizer and one ``ChatSettings``.

    Attributes:
        fingerprint: of everything that the lengths depend on: rows, tokenizer, chat template, settings.
        lengths: int32 [rows], tokens; 0 where a row is left out.
        left_out: why, by row.
    """

    fingerprint: str
    lengths: np.ndarray
    left_out: dict[int, str]

    @classmethod
    def open(
        cls,
        rows: Rows,
        processor: Processor,
        settings: ChatSettings,
        folder: Path,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Self:
        """Read the index from ``folder``, or build it and keep it there.

        Args:
            folder: where indices are cached, each under its fingerprint. Any number of processes may
                share it.
            on_progress: called with the rows done and the rows in all, while one is built.

        Raises:
            UserError: no row is left to train on.
        """
        fingerprint = _fingerprint(rows, processor, settings)
        path = folder / f"{fingerprint}.json"
        kept = cls._read(path, fingerprint, len(rows))
        index = kept or cls._build(rows, Chat(processor, settings), fingerprint, on_progress)
        if not index.lengths.any():
            raise UserError(f"none of the {len(rows)} rows can be trained on: {index.summary()}")
        if not kept:
            index._write(path)
        return index

    def summary(self) -> str:
        """How many rows are left out, and for what reasons, on one line."""
        kinds = Counter(self.left_out.values()).most_common()
        return f"{len(self.left_out)} of {len(self.lengths)} rows left out" + "".join(
            f"; {n}: {kind}" for kind, n in kinds
        )

    @classmethod
    def _build(cls, rows: Rows, chat: Chat, fingerprint: str, on_progress: Callable[[int, int], None]) -> Self:
        found: list[int | str] = []
        while len(found) < len(rows):
            some = range(len(found), min(len(found) + CHUNK, len(rows)))
            found += chat.lengths([rows.turns(i) for i in some])
            on_progress(len(found), len(rows))
        lengths = np.array([0 if isinstance(length, str) else length for length in found], np.int32)
        return cls(fingerprint, lengths, {i: reason for i, reason in enumerate(found) if isinstance(reason, str)})

    @classmethod
    def _read(cls, path: Path, fingerprint: str, count: int) -> Self | None:
        """The index that was kept, or None if there is none that can be used."""
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            lengths = np.array(kept["lengths"], np.int32)
            left_out = {int(i): str(reason) for i, reason in kept["left_out"].items()}
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return None
        whole = kept.get("fingerprint") == fingerprint and lengths.shape == (count,)
        return cls(fingerprint, lengths, left_out) if whole else None

    def _write(self, path: Path) -> None:
        content = {"fingerprint": self.fingerprint, "lengths": self.lengths.tolist(), "left_out": self.left_out}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_suffix(f".{os.getpid()}")
            beside.write_text(json.dumps(content), encoding="utf-8")
            beside.replace(path)
        except OSError as fault:
            raise UserError(f"the index of lengths cannot be kept in {path.parent}: {fault.strerror}") from fault


def default_cache() -> Path:
    """Where indices are kept if nothing else is said."""
    return cache_folder() / "index"


def _fingerprint(rows: Rows, processor: Processor, settings: ChatSettings) -> str:
    tokenizer = processor.tokenizer
    parts = (
        rows.fingerprint,
        tokenizer.backend_tokenizer.to_str(),
        str(tokenizer.chat_template),
        json.dumps(asdict(settings), sort_keys=True),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
