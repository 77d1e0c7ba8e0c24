"""Batches for a training step: of few shapes, the same for any number of hosts, from any batch on.

grain decodes the rows in threads or worker processes; each host decodes those that its own devices
hold. The state of the data is one integer, the index of the next batch.
"""

import hashlib
import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grain
import jax
import numpy as np
from absl import flags

from llava_cot_jax.data.batching import FILLER, Plan, choose_buckets
from llava_cot_jax.data.chat import Chat, Conversation, LeftOut
from llava_cot_jax.data.index import Index, default_cache
from llava_cot_jax.data.rows import Row, Rows
from llava_cot_jax.data.settings import ChatSettings, LoaderSettings
from llava_cot_jax.data.workers import die_with_parent
from llava_cot_jax.errors import UserError
from llava_cot_jax.processing.images import open_image
from llava_cot_jax.processing.processor import Processor

READY = 2
"""Batches that wait on the devices for their turn."""


class Loader:
    """Streams the batches of a data set onto a mesh.

    Attributes:
        index: the rows' lengths, and what is left out and why.
        buckets: the lengths that batches have, in tokens, increasing.
        batches_per_epoch: the same in every epoch.
        fingerprint: of all that decides which rows batch ``i`` has. A run that resumes from an index
            of batches must find the same.

    Args:
        rows: the data set.
        processor: of the model's checkpoint.
        chat: how turns become tokens.
        settings: how rows become batches.
        sharding: of the first axis of every array of a batch.
        shuffle: anew in each epoch, to train; otherwise each row comes once, and rows that fill up the
            last batch have ``row`` FILLER and train nothing.
        cache: where the index of lengths is kept; by default in the user's cache folder.
        on_progress: called with rows done and rows in all, while that index is built.

    Raises:
        UserError: no rows to train on, or a batch that is too large for them or does not divide over
            the devices.
    """

    def __init__(
        self,
        rows: Rows,
        processor: Processor,
        chat: ChatSettings,
        settings: LoaderSettings,
        sharding: jax.sharding.Sharding,
        *,
        shuffle: bool = True,
        cache: Path | None = None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._rows = rows
        self._settings = settings
        self._sharding = sharding
        self._mine = _rows_of_this_process(sharding, settings.batch)
        self.index = Index.open(rows, processor, chat, cache or default_cache(), on_progress)
        lengths = self.index.lengths
        self.buckets = choose_buckets(lengths[lengths > 0], settings.buckets, settings.multiple)
        self._plan = Plan(lengths, self.buckets, settings.batch, seed=settings.seed, shuffle=shuffle)
        self.batches_per_epoch = self._plan.batches_per_epoch
        self._batches = partial(_Batches, rows, processor, Chat(processor, chat), lengths, self._plan, self._mine)
        decisive = (self.index.fingerprint, self.buckets, settings.batch, settings.seed, shuffle)
        self.fingerprint = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:16]

    def batches(self, start: int, stop: int) -> Iterator[dict[str, jax.Array]]:
        """The batches from ``start`` up to ``stop``, on the mesh, read ahead.

        Threads and worker processes end with the iterator: exhausted, closed, or no longer referenced.

        Yields:
            Global arrays: what ``Processor`` gives, one image a row, with ``loss_mask`` bool [batch,
            tokens], ``stage`` int8 [batch, tokens] (see ``Conversation``) and ``row`` int32 [batch].

        Raises:
            UserError: a damaged record or image, by name; or a worker process died.
        """
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain's workers copy absl's flags
        threads = self._settings.threads
        processes = grain.MultiprocessingOptions(self._settings.workers, per_worker_buffer_size=1)
        dataset = (
            grain.MapDataset.source(self._batches(stop))[start:]
            .to_iter_dataset(grain.ReadOptions(threads, prefetch_buffer_size=threads))
            .mp_prefetch(processes, worker_init_fn=_begin_worker)
            .map(self._to_mesh)
        )
        iterator = iter(grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=READY))
        try:
            yield from iterator
        except RuntimeError as fault:
            if "Worker process was terminated" not in str(fault):
                raise
            raise UserError("a worker process of the data died, out of memory perhaps: use fewer workers") from fault
        finally:
            iterator.close()

    def lengths(self, index: int) -> np.ndarray:
        """The tokens of each row of a batch, without padding: int32 [rows], fillers left out."""
        rows = self._plan[index].rows
        return self.index.lengths[rows[rows != FILLER]]

    def row_ids(self, index: int) -> list[str]:
        """The ids of the rows of a batch."""
        rows = self._plan[index].rows
        return [self._rows[int(row)].id for row in rows[rows != FILLER]]

    def padding(self, epoch: int = 0) -> float:
        """The share of an epoch's tokens that are padding."""
        first = epoch * self.batches_per_epoch
        epoch_batches = range(first, first + self.batches_per_epoch)
        used = sum(int(self.lengths(i).sum()) for i in epoch_batches)
        return 1 - used / sum(self._plan[i].rows.size * self._plan[i].length for i in epoch_batches)

    def _to_mesh(self, local: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return {
            name: jax.make_array_from_process_local_data(
                self._sharding, array, (self._settings.batch, *array.shape[1:])
            )
            for name, array in local.items()
        }


@dataclass(frozen=True)
class _Batches:
    """The part of each batch that this process holds, by the index of the batch: what grain reads at random.

    Attributes:
        mine: the places in a batch that this process fills.
        stop: the batches in all.
    """

    rows: Rows
    processor: Processor
    chat: Chat
    lengths: np.ndarray
    plan: Plan
    mine: np.ndarray
    stop: int

    def __len__(self) -> int:
        return self.stop

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        batch = self.plan[index]
        places = batch.rows[self.mine]
        # A filler is any row of the batch, without its training.
        chosen = np.where(places == FILLER, batch.rows[0], places).tolist()
        rows = [(row, self.rows[row]) for row in chosen]
        conversations = [self._encode(number, row) for number, row in rows]
        try:
            inputs = self.processor.collate(
                [conversation.ids for conversation in conversations],
                [[row.image] for _, row in rows],
                length=batch.length,
            )
        except UserError:
            for number, row in rows:
                _check_image(number, row)
            raise
        marks = {
            name: np.zeros(inputs["input_ids"].shape, kind) for name, kind in (("loss_mask", bool), ("stage", np.int8))
        }
        for i, conversation in enumerate(conversations):
            if places[i] != FILLER:
                marks["loss_mask"][i, : len(conversation.ids)] = conversation.loss_mask
                marks["stage"][i, : len(conversation.ids)] = conversation.stage
        return inputs | marks | {"row": places.astype(np.int32)}

    def _encode(self, index: int, row: Row) -> Conversation:
        try:
            conversation = self.chat.encode(row.turns)
            if len(conversation.ids) != self.lengths[index]:
                raise LeftOut(
                    f"it has {len(conversation.ids)} tokens, but {self.lengths[index]} in the index of lengths"
                )
        except LeftOut as change:
            raise UserError(
                f"row {index} ({row.id}) was changed since its tokens were counted: {change}; prepare the data anew"
            ) from change
        return conversation


def _check_image(index: int, row: Row) -> None:
    """Name the row of a damaged image."""
    try:
        open_image(row.image)
    except UserError as mistake:
        raise UserError(f"row {index} ({row.id}): {mistake}") from mistake


def _rows_of_this_process(sharding: jax.sharding.Sharding, batch: int) -> np.ndarray:
    """The places of a global batch that the devices of this process hold, int64 [places], increasing."""
    try:
        shards = sharding.addressable_devices_indices_map((batch,)).values()
    except ValueError:
        raise UserError(f"a batch of {batch} rows does not divide over the devices: take a multiple") from None
    held = np.zeros(batch, bool)
    for shard in shards:
        held[shard] = True
    return np.flatnonzero(held)


def _begin_worker(index: int, count: int) -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to see: it ends the workers
