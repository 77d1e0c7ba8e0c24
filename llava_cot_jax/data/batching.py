"""Order of the batches of a data set: it depends on the rows' sizes, the batch size, the seed and its start alone.

The rows of a batch have similar sizes and are all padded to one of a few bucket lengths and numbers of images, so that
there is little padding and a training step is compiled for few shapes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np

from llava_cot_jax.data.place import START, Place
from llava_cot_jax.errors import UserError
from llava_cot_jax.rounding import ceil_div

MAX_ROWS_PER_EPOCH = 1 << 30

FILLER = -1
"""Row number that stands for no row, to fill up the last batch of an evaluation."""


@dataclass(frozen=True)
class BatchIndices:
    """Rows of one batch.

    Attributes:
        rows: Row numbers in the data set, or ``FILLER``, int64 [batch].
        length: Number of tokens that each row is padded to.
        images: Number of images that each row is padded to.
    """

    rows: np.ndarray
    length: int
    images: int


def choose_buckets(lengths: np.ndarray, count: int, multiple: int) -> tuple[int, ...]:
    """Return the bucket lengths with the least padding, found by dynamic programming over the multiples.

    Args:
        lengths: Number of tokens of each row, int [rows]; at least one row.
        count: Maximum number of buckets.
        multiple: Number of tokens that each bucket length is a multiple of.

    Returns:
        At most ``count`` increasing lengths; the last one holds the longest row.
    """
    sizes = -(-lengths // multiple)  # in multiples, rounded up
    rows = np.bincount(sizes)  # [multiples + 1]
    below = np.concatenate([[0], np.cumsum(rows)])  # below[m]: rows of fewer multiples than m
    last = len(rows) - 1
    # cost[m]: the least number of multiples that rows of at most m multiples take, padded to the buckets so far.
    cost = np.full(last + 1, np.inf)
    cost[0] = 0
    choices: list[np.ndarray] = []
    for _ in range(count):
        widths = np.arange(last + 1)
        total = cost[None, :] + widths[:, None] * (below[widths + 1][:, None] - below[widths + 1][None, :])
        total[widths[None, :] > widths[:, None]] = np.inf  # [to, from]
        choices.append(total.argmin(axis=1))
        cost = total.min(axis=1)
    buckets: list[int] = []
    top = last
    for choice in reversed(choices):
        if choice[top] < top:
            buckets.append(top * multiple)
        top = int(choice[top])
    return tuple(sorted(buckets))


def bucket_sizes(sizes: np.ndarray, buckets: tuple[int, ...]) -> np.ndarray:
    """Return the smallest bucket that holds each row, or 0 for a row of size 0, int [rows]."""
    return np.asarray((0, *buckets))[np.searchsorted((0, *buckets), sizes)]


class BatchOrder:
    """Batches of every epoch, in order.

    An order can be pickled; equal arguments give equal orders. With ``shuffle`` each epoch has its rows and batches in
    a new order and leaves out the few rows, others each time, that would not fill a batch. Without ``shuffle`` every
    row comes exactly once, shortest first, and the last batch is filled up.

    The rows may be those of several sets, one after the other, each with a weight: the number of times that each of its
    rows comes in an epoch. Of a weight's fraction, such as 0.5, another share of the set comes in each epoch, by turns,
    so that over the epochs all rows of a set come equally often. Without ``shuffle`` weights do not count.

    An order may begin in the middle of an epoch, of which another order had some rows. It has batches of the others
    then, leaves out those that would not fill a batch, and goes on with whole epochs. Batches are counted from the
    first of the first order, and only those after ``start`` are known.

    Attributes:
        batches_per_epoch: Number of batches in a whole epoch.

    Args:
        lengths: Number of tokens that each row is padded to, int [rows]; 0 leaves a row out.
        images: Number of images that each row is padded to, int [rows].
        batch: Number of rows in a batch.
        seed: Seed of the order.
        shuffle: Whether rows and batches come in a new order in each epoch.
        start: Place at which the order begins.
        sets: Number of rows of each set, and its weight. None is one set of weight 1.

    Raises:
        UserError: The order is shuffled and there are fewer rows than in a batch; or by its weight, no row of a set
            comes in an epoch; or there are too many.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        images: np.ndarray,
        batch: int,
        *,
        seed: int,
        shuffle: bool,
        start: Place = START,
        sets: Sequence[tuple[int, float]] | None = None,
    ) -> None:
        self.lengths = lengths
        self.images = images
        self.batch = batch
        self.seed = seed
        self.shuffle = shuffle
        self.sets = tuple(sets) if sets and shuffle else ((len(lengths), 1.0),)
        self._check_weights()
        self.rows_per_epoch = int(self._times(0).sum())
        if shuffle and self.rows_per_epoch < batch:
            raise UserError(f"{self.rows_per_epoch} rows do not fill a batch of {batch}: set a smaller batch_size")
        self.start = start
        self.batches_per_epoch = self.rows_per_epoch // batch if shuffle else ceil_div(self.rows_per_epoch, batch)
        self._first_batches = self.batches_per_epoch if start.seen is None else len(self.rows_of(start.epoch)) // batch

    def __getitem__(self, index: int) -> BatchIndices:
        """Batch ``index``, counted from the beginning of the first epoch."""
        epoch, place = self._locate(index)
        rows = self._epoch(epoch)[place]
        used = rows[rows != FILLER]
        return BatchIndices(rows, length=int(self.lengths[used].max()), images=int(self.images[used].max()))

    def batches_until(self, epochs: int) -> int:
        """Return the number of batches from the very first up to the end of ``epochs`` epochs."""
        if epochs <= self.start.epoch:
            return self.start.batches
        whole = epochs - self.start.epoch - 1
        return self.start.batches + self._first_batches + whole * self.batches_per_epoch

    def place(self, index: int) -> Place:
        """Return the place before batch ``index``."""
        epoch, place = self._locate(index)
        before = self.start.seen if epoch == self.start.epoch else None
        if before is None and not place:
            return Place(index, epoch)
        seen = np.zeros(len(self.lengths), np.int32) if before is None else before.copy()
        if place:
            rows = self._epoch(epoch)[:place]
            seen += np.bincount(rows[rows != FILLER], minlength=len(seen)).astype(np.int32)
        return Place(index, epoch, seen)

    def epochs_before(self, index: int) -> float:
        """Return the number of epochs before batch ``index``, by the share of the rows that were seen."""
        epoch, place = self._locate(index)
        seen = self.rows_per_epoch - len(self.rows_of(epoch)) + place * self.batch
        return epoch + seen / self.rows_per_epoch

    def rows_of(self, epoch: int) -> np.ndarray:
        """Return the rows that are left of an epoch at its start, or at that of the order, int64 [rows].

        A row that is to come several times is there as often.
        """
        times = self._times(epoch)
        if self.start.seen is not None and epoch == self.start.epoch:
            times = np.maximum(times - self.start.seen, 0)
        return np.repeat(np.arange(len(times)), times)

    def _check_weights(self) -> None:
        """Check that of each set some row comes in an epoch, and that an epoch is not too long for the memory.

        Raises:
            UserError: It is not so.
        """
        ends = list(accumulate(count for count, _ in self.sets))
        used = [np.count_nonzero(part) for part in np.split(self.lengths, ends[:-1])]
        for number, (rows, (_, weight)) in enumerate(zip(used, self.sets, strict=True), 1):
            if rows and not round(weight * rows):
                raise UserError(
                    f"data set {number} of {len(used)} has {rows} rows, of which none comes in an epoch by its weight "
                    f"of {weight}: give it at least {1 / rows:.2g}"
                )
        total = sum(rows * weight for rows, (_, weight) in zip(used, self.sets, strict=True))
        if total > MAX_ROWS_PER_EPOCH:
            raise UserError(f"by the weights of data, an epoch has {total:.2g} rows: give smaller weights, more epochs")

    def _times(self, epoch: int) -> np.ndarray:
        """Return how many times each row comes in an epoch, int64 [rows]."""
        times = np.zeros(len(self.lengths), int)
        first = 0
        for number, (count, weight) in enumerate(self.sets):
            rows = first + np.flatnonzero(self.lengths[first : first + count])
            whole = int(weight)
            times[rows] = whole
            if share := round((weight - whole) * len(rows)):
                # Not drawn from the seed, so that an epoch that goes on under another one still comes out whole.
                turns = np.random.default_rng(number).permutation(rows)
                times[turns[(epoch * share + np.arange(share)) % len(rows)]] += 1
            first += count
        return times

    def _locate(self, index: int) -> tuple[int, int]:
        """Return the epoch of a batch, and its place in what is left of the epoch."""
        after = index - self.start.batches
        if after < 0:
            raise IndexError(f"batch {index} is of another order, before batch {self.start.batches}")
        if after < self._first_batches:
            return self.start.epoch, after
        whole, place = divmod(after - self._first_batches, self.batches_per_epoch)
        return self.start.epoch + 1 + whole, place

    def _epoch(self, epoch: int) -> np.ndarray:
        return _batches_of(self, epoch if self.shuffle else 0)


@lru_cache(maxsize=4)  # readers that run ahead may be in the next epoch
def _batches_of(order: BatchOrder, epoch: int) -> np.ndarray:
    """Rows of an epoch's batches, int64 [batches, batch]."""
    left = order.rows_of(epoch)
    batches = len(left) // order.batch if order.shuffle else order.batches_per_epoch
    count = batches * order.batch
    rng = np.random.default_rng((order.seed, epoch))
    rows = rng.permutation(left)[:count] if order.shuffle else left
    # Sorted by bucket, then cut: a batch that spans two buckets takes the larger one.
    rows = rows[np.lexsort((order.lengths[rows], order.images[rows]))]
    rows = np.pad(rows, (0, count - len(rows)), constant_values=FILLER)
    table = rows.reshape(batches, order.batch)
    return rng.permutation(table) if order.shuffle else table
