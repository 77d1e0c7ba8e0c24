"""Index of a data set: the numbers of tokens and images of each row, or the reason for which it is skipped."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Self

import numpy as np

from llava_cot_jax.data.chat import Chat, ConversationSize
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
    """Sizes of a data set's rows under one tokenizer and one ``ChatSettings``.

    Attributes:
        fingerprint: Hash of everything that the sizes depend on: rows, tokenizer, chat template and settings.
        lengths: Number of tokens of each row, int32 [rows]; 0 where a row is skipped.
        images: Number of images of each row, int32 [rows]; 0 where a row is skipped.
        cut_turns: Number of turns of each row that do not fit or have no answer to train on, int32 [rows]; 0 where a
            row is skipped.
        skipped: Reasons for which rows are skipped, by row number.
    """

    fingerprint: str
    lengths: np.ndarray
    images: np.ndarray
    cut_turns: np.ndarray
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

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Return the index of the rows of several data sets, one after the other."""
        if len(parts) == 1:
            return parts[0]
        starts = accumulate((len(part.lengths) for part in parts), initial=0)
        return cls(
            hashlib.sha256("\0".join(part.fingerprint for part in parts).encode()).hexdigest()[:16],
            np.concatenate([part.lengths for part in parts]),
            np.concatenate([part.images for part in parts]),
            np.concatenate([part.cut_turns for part in parts]),
            {
                start + i: reason
                for start, part in zip(starts, parts, strict=False)
                for i, reason in part.skipped.items()
            },
        )

    def summary(self) -> str:
        """Return on one line how many rows have how many images, are cut or are skipped, and for what reasons."""
        counts = Counter(self.images[self.lengths > 0].tolist())
        parts: list[str] = []
        if counts.keys() > {1} or 1 not in counts:
            parts += [f"{n} with {images} image{'s' * (images != 1)}" for images, n in sorted(counts.items())]
        if rows := np.count_nonzero(self.cut_turns):
            parts.append(f"{rows} rows lose {self.cut_turns.sum()} turns at their end")
        kinds = Counter(self.skipped.values()).most_common()
        parts += [f"{len(self.skipped)} of {len(self.lengths)} rows skipped", *(f"{n}: {kind}" for kind, n in kinds)]
        return "; ".join(parts)

    @classmethod
    def _build(cls, rows: Rows, chat: Chat, fingerprint: str, on_progress: OnProgress) -> Self:
        found: list[ConversationSize | str] = []
        while len(found) < len(rows):
            some = range(len(found), min(len(found) + INDEX_CHUNK, len(rows)))
            found += chat.sizes([rows.turns(i) for i in some])
            on_progress(len(found), len(rows))
        none = ConversationSize(tokens=0, images=0, cut_turns=0)
        sizes = [none if isinstance(size, str) else size for size in found]
        return cls(
            fingerprint,
            np.array([size.tokens for size in sizes], np.int32),
            np.array([size.images for size in sizes], np.int32),
            np.array([size.cut_turns for size in sizes], np.int32),
            {i: reason for i, reason in enumerate(found) if isinstance(reason, str)},
        )

    @classmethod
    def _read(cls, path: Path, fingerprint: str, count: int) -> Self | None:
        """Read a saved index. Return None if there is none that can be used."""
        try:
            kept = read_json(path)
            lengths, images, cut_turns = (np.array(kept[name], np.int32) for name in ("lengths", "images", "cut_turns"))
            skipped = {int(i): str(reason) for i, reason in kept["left_out"].items()}
        except (ValueError, KeyError, AttributeError, TypeError):  # no such file is a ``UserError``, a ``ValueError``
            return None
        shapes = {array.shape for array in (lengths, images, cut_turns)}
        whole = kept.get("fingerprint") == fingerprint and shapes == {(count,)}
        return cls(fingerprint, lengths, images, cut_turns, skipped) if whole else None

    def _write(self, path: Path) -> None:
        content = {
            "fingerprint": self.fingerprint,
            "lengths": self.lengths.tolist(),
            "images": self.images.tolist(),
            "cut_turns": self.cut_turns.tolist(),
            "left_out": self.skipped,
        }
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
