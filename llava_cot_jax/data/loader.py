"""Batches for a training step, in few shapes, the same for any number of hosts and from any batch on.

grain decodes the rows in threads or worker processes; each host decodes the rows that its own devices hold. The state
of the loader is one integer, the index of the next batch, as long as batches keep their size and their order;
``Place`` is what stays right when they do not.
"""

import hashlib
import json
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import grain
import jax
import numpy as np
from absl import flags

from llava_cot_jax.data.batching import FILLER, BatchOrder, bucket_sizes, choose_buckets
from llava_cot_jax.data.chat import Chat, Conversation, SkippedConversation
from llava_cot_jax.data.index import Index
from llava_cot_jax.data.place import Place
from llava_cot_jax.data.rows import Mixture, Row, Rows, asks_verifier
from llava_cot_jax.data.settings import ChatSettings, LoaderSettings
from llava_cot_jax.data.workers import die_with_parent, expect_leftover_memory
from llava_cot_jax.errors import UserError
from llava_cot_jax.files import cache_folder
from llava_cot_jax.processing.images import open_image
from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.progress import OnProgress

READY = 2
"""Number of batches that are on the devices ahead of their use."""


class Loader:
    """Stream of the batches of a data set onto a mesh.

    Attributes:
        index: Sizes of the rows, and the reasons for which rows are skipped.
        buckets: Lengths that batches have, in tokens, increasing.
        image_buckets: Numbers of images that batches have, apart from none, increasing.
        sets: Number of rows of each data set, without those that are skipped, and its weight.
        batches_per_epoch: Number of batches in an epoch, the same in every epoch.
        fingerprint: Hash of everything that decides which rows a batch has. A run that resumes from the number of a
            batch must find the same fingerprint.
        rows_fingerprint: Identification of the rows alone, whose numbers a ``Place`` has.

    Args:
        rows: Data set. Rows of a ``Mixture`` come as often in each epoch as its weights say.
        processor: Processor of the model's checkpoint.
        chat: Settings by which turns become tokens.
        settings: Settings by which rows become batches.
        sharding: Sharding of the first axis of every array of a batch.
        shuffle: Whether each epoch has a new order, as in training. Otherwise each row comes once, and the rows that
            fill up the last batch have ``row`` FILLER and an empty loss mask.
        cache: Folder of the indices of lengths; by default in the user's cache folder.
        on_progress: Function that is called with the number of rows done and of all rows while the index is built.

    Raises:
        UserError: There are no rows to train on, or the batch is larger than their number or does not divide over
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
        on_progress: OnProgress = lambda done, total: None,
    ) -> None:
        self._rows = rows
        self._settings = settings
        self._sharding = sharding
        self._mine = _rows_of_this_process(sharding, settings.batch_size)
        self.rows_fingerprint = rows.fingerprint
        parts, weights = (rows.parts, rows.weights) if isinstance(rows, Mixture) else ((rows,), (1.0,))
        folder = cache or cache_folder("index")
        self.index = Index.join([Index.open(part, processor, chat, folder, on_progress) for part in parts])
        lengths, images = self.index.lengths, self.index.images
        sets = [(len(part), weight) for part, weight in zip(parts, weights, strict=True)]
        ends = list(accumulate(count for count, _ in sets))
        used = [int(np.count_nonzero(part)) for part in np.split(lengths, ends[:-1])]
        self.sets = list(zip(used, weights, strict=True))
        self.buckets = choose_buckets(lengths[lengths > 0], settings.num_buckets, settings.pad_to_multiple_of)
        self.image_buckets = choose_buckets(images[images > 0], settings.num_image_buckets, 1) if images.any() else ()
        self._make_order = partial(
            BatchOrder,
            bucket_sizes(lengths, self.buckets),
            bucket_sizes(images, self.image_buckets),
            settings.batch_size,
            seed=settings.seed,
            shuffle=shuffle,
            sets=sets,
        )
        self._order = self._make_order()
        self.batches_per_epoch = self._order.batches_per_epoch
        has_probes = any(map(asks_verifier, parts))
        self._encode = partial(_Batches, rows, processor, Chat(processor, chat), lengths, self._mine, has_probes)
        decisive = (
            self.index.fingerprint,
            self.buckets,
            self.image_buckets,
            settings.batch_size,
            settings.seed,
            shuffle,
            weights,
        )
        self.fingerprint = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:16]

    def start_at(self, start: Place) -> None:
        """Begin in the middle of an epoch, of which batches of other sizes or in another order had some rows.

        Args:
            start: Place of this data set at which the batches of this loader begin.
        """
        self._order = self._make_order(start=start)

    @property
    def start(self) -> Place:
        """Place at which the batches of this loader begin."""
        return self._order.start

    def place(self, index: int) -> Place:
        """Return the place before batch ``index``."""
        return self._order.place(index)

    def batches_until(self, epochs: int) -> int:
        """Return the number of batches, from the very first, up to the end of ``epochs`` epochs."""
        return self._order.batches_until(epochs)

    def epochs_before(self, index: int) -> float:
        """Return the number of epochs before batch ``index``, by the share of the rows that were seen."""
        return self._order.epochs_before(index)

    def batches(self, start: int, stop: int) -> Iterator[dict[str, jax.Array]]:
        """Iterate over the batches from ``start`` up to, but not including, ``stop``, on the mesh and read ahead.

        Threads and worker processes end when the iterator is exhausted, closed, or no longer referenced.

        Yields:
            Global arrays: those of ``Processor.collate``, and ``loss_mask`` bool [batch, tokens], ``stage`` int8
            [batch, tokens] (as in ``Conversation``) and ``row`` int32 [batch]. A batch of rows without images has no
            arrays of images. Where the data set trains the verifier, there are also ``probe`` bool [batch, tokens],
            which tokens are the verifier's question, and, as in ``EncodedProbe``, ``probe_answers`` int32 [batch, 2],
            ``probe_value`` float32 [batch] and ``probe_weight`` float32 [batch], which is 0 for rows without one.

        Raises:
            UserError: A record or image is damaged, or a worker process died. The message names the record.
        """
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain's workers copy absl's flags
        expect_leftover_memory()
        threads = self._settings.num_threads
        processes = grain.MultiprocessingOptions(self._settings.num_workers, per_worker_buffer_size=1)
        dataset = (
            grain.MapDataset.source(self._encode(self._order, stop))[start:]
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
            raise UserError(
                "a worker process of the data died, perhaps because memory ran out: use fewer workers"
            ) from fault
        finally:
            iterator.close()

    def lengths(self, index: int) -> np.ndarray:
        """Number of tokens of each row of a batch without its padding, int32 [rows]; fillers are left out."""
        rows = self._order[index].rows
        return self.index.lengths[rows[rows != FILLER]]

    def images(self, index: int) -> np.ndarray:
        """Number of images of each row of a batch without its padding, int32 [rows]; fillers are left out."""
        rows = self._order[index].rows
        return self.index.images[rows[rows != FILLER]]

    def rows_of_epoch(self) -> np.ndarray:
        """Rows that come in the epoch of the first batch of this loader, each as often as it comes, int64 [rows]."""
        return self._order.rows_of(self.place(self.start.batches).epoch)

    def row_ids(self, index: int) -> list[str]:
        """Ids of the rows of a batch; fillers are left out."""
        rows = self._order[index].rows
        return [self._rows[int(row)].id for row in rows[rows != FILLER]]

    def padding(self) -> float:
        """Share of the tokens that is padding, in the first batches of this loader, as many as an epoch has."""
        first = self.start.batches
        epoch_batches = range(first, first + self.batches_per_epoch)
        used = sum(int(self.lengths(i).sum()) for i in epoch_batches)
        return 1 - used / sum(self._order[i].rows.size * self._order[i].length for i in epoch_batches)

    def _to_mesh(self, local: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return {
            name: jax.make_array_from_process_local_data(
                self._sharding, array, (self._settings.batch_size, *array.shape[1:])
            )
            for name, array in local.items()
        }


@dataclass(frozen=True)
class _Batches:
    """Random access for grain to the part of each batch that this process holds.

    Attributes:
        rows: Data set.
        processor: Processor that makes the arrays of images and tokens.
        chat: Encoder of the conversations.
        lengths: Number of tokens of each row, int32 [rows of the data set].
        mine: Positions in a batch that this process fills, int64 [rows of this process].
        has_probes: Whether batches have the arrays of the verifier's questions.
        order: Order of the batches.
        stop: Number of batches.
    """

    rows: Rows
    processor: Processor
    chat: Chat
    lengths: np.ndarray
    mine: np.ndarray
    has_probes: bool
    order: BatchOrder
    stop: int

    def __len__(self) -> int:
        return self.stop

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        batch = self.order[index]
        places = batch.rows[self.mine]
        # A filler has the content of the batch's first row, with an empty loss mask.
        chosen = np.where(places == FILLER, batch.rows[0], places).tolist()
        rows = [(row, self.rows[row]) for row in chosen]
        conversations = [self._encode(number, row) for number, row in rows]
        try:
            inputs = self.processor.collate(
                [conversation.ids for conversation in conversations],
                [row.images[: conversation.images] for (_, row), conversation in zip(rows, conversations, strict=True)],
                length=batch.length,
                num_images=batch.images,
            )
        except UserError:
            for number, row in rows:
                _check_images(number, row)
            raise
        marks = {
            name: np.zeros(inputs["input_ids"].shape, kind) for name, kind in (("loss_mask", bool), ("stage", np.int8))
        }
        if self.has_probes:
            marks |= _probes(conversations, places, batch.length)
        for i, conversation in enumerate(conversations):
            if places[i] != FILLER:
                marks["loss_mask"][i, : len(conversation.ids)] = conversation.loss_mask
                marks["stage"][i, : len(conversation.ids)] = conversation.stage
        return inputs | marks | {"row": places.astype(np.int32)}

    def _encode(self, index: int, row: Row) -> Conversation:
        try:
            conversation = self.chat.encode(row.turns)
            if len(conversation.ids) != self.lengths[index]:
                raise SkippedConversation(
                    f"it has {len(conversation.ids)} tokens, but {self.lengths[index]} in the index of lengths"
                )
        except SkippedConversation as change:
            raise UserError(
                f"row {index} ({row.id}) was changed since its tokens were counted: {change}; prepare the data anew"
            ) from change
        return conversation


def _probes(conversations: Sequence[Conversation], places: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """Return the arrays of the verifier's questions of a batch, as ``Loader.batches`` describes them.

    Args:
        conversations: Conversation of each row.
        places: Row number of each row, or ``FILLER``.
        length: Number of tokens that each row is padded to.
    """
    count = len(conversations)
    arrays = {
        "probe": np.zeros((count, length), bool),
        "probe_answers": np.zeros((count, 2), np.int32),
        "probe_value": np.zeros(count, np.float32),
        "probe_weight": np.zeros(count, np.float32),
    }
    for i, conversation in enumerate(conversations):
        if (probe := conversation.probe) and places[i] != FILLER:
            end = len(conversation.ids)
            arrays["probe"][i, end - probe.length : end] = True
            arrays["probe_answers"][i] = probe.answers
            arrays["probe_value"][i] = probe.value
            arrays["probe_weight"][i] = probe.weight
    return arrays


def _check_images(index: int, row: Row) -> None:
    """Check that the images of a row can be decoded.

    Raises:
        UserError: An image is damaged. The message names the row.
    """
    try:
        for image in row.images:
            open_image(image)
    except UserError as mistake:
        raise UserError(f"row {index} ({row.id}): {mistake}") from mistake


def _rows_of_this_process(sharding: jax.sharding.Sharding, batch: int) -> np.ndarray:
    """Return the positions in a global batch that the devices of this process hold, int64 [positions], increasing."""
    try:
        shards = sharding.addressable_devices_indices_map((batch,)).values()
    except ValueError:
        raise UserError(
            f"a batch of {batch} rows does not divide over the devices: set batch_size to a multiple of their number"
        ) from None
    held = np.zeros(batch, bool)
    for shard in shards:
        held[shard] = True
    return np.flatnonzero(held)


def _begin_worker(index: int, count: int) -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends the workers
