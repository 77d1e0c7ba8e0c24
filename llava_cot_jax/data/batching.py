"""Order of the batches of a data set, which depends on the lengths, the batch size and the seed alone.

The rows of a batch have similar lengths and are all padded to one of a few bucket lengths, so that there is little
padding and a training step is compiled for few shapes.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from llava_cot_jax.errors import UserError
from llava_cot_jax.rounding import ceil_div

FILLER = -1
"""Row number that stands for no row, to fill up the last batch of an evaluation."""


@dataclass(frozen=True)
class BatchIndices:
    """Rows of one batch.

    Attributes:
        rows: Row numbers in the data set, or ``FILLER``, int64 [batch].
        length: Number of tokens that each row is padded to.
    """

    rows: np.ndarray
    length: int


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


class BatchOrder:
    """Batches of every epoch, in order.

    An order can be pickled; equal arguments give equal orders. With ``shuffle`` each epoch has its rows and batches in
    a new order and leaves out the few rows, others each time, that would not fill a batch. Without ``shuffle`` every
    row comes exactly once, shortest first, and the last batch is filled up.

    Raises:
        UserError: The order is shuffled and there are fewer rows than in a batch.
    """

    def __init__(self, lengths: np.ndarray, buckets: tuple[int, ...], batch: int, *, seed: int, shuffle: bool) -> None:
        self.rows = np.flatnonzero(lengths)
        self.sizes = np.asarray(buckets)[np.searchsorted(buckets, lengths)]  # [rows of the data set]
        self.batch = batch
        self.seed = seed
        self.shuffle = shuffle
        if shuffle and len(self.rows) < batch:
            raise UserError(f"{len(self.rows)} rows do not fill a batch of {batch}: set a smaller batch_size")
        self.batches_per_epoch = len(self.rows) // batch if shuffle else ceil_div(len(self.rows), batch)

    def __getitem__(self, index: int) -> BatchIndices:
        """Batch ``index``, counted from the beginning of the first epoch."""
        epoch, place = divmod(index, self.batches_per_epoch)
        batches = _epoch(self, epoch if self.shuffle else 0)
        rows = batches[place]
        return BatchIndices(rows, length=int(self.sizes[rows[rows != FILLER]].max()))


@lru_cache(maxsize=4)  # readers that run ahead may be in the next epoch
def _epoch(order: BatchOrder, epoch: int) -> np.ndarray:
    """Rows of an epoch's batches, int64 [batches, batch]."""
    count = order.batches_per_epoch * order.batch
    rng = np.random.default_rng((order.seed, epoch))
    rows = rng.permutation(order.rows)[:count] if order.shuffle else order.rows
    # Sorted by bucket, then cut: a batch that spans two buckets takes the longer one.
    rows = rows[np.argsort(order.sizes[rows], kind="stable")]
    rows = np.pad(rows, (0, count - len(rows)), constant_values=FILLER)
    batches = rows.reshape(order.batches_per_epoch, order.batch)
    return rng.permutation(batches) if order.shuffle else batches
