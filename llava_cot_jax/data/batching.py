"""Which rows make up which batch: a function of the lengths, the batch size and the seed alone.

The rows of a batch are of similar length and are all padded to one of a few bucket lengths, so that
little is padded and a training step is compiled for few shapes.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from llava_cot_jax.errors import UserError

FILLER = -1
"""Stands for no row: it fills up the last batch of an evaluation."""


@dataclass(frozen=True)
class Batch:
    """One batch of the plan.

    Attributes:
        rows: int64 [batch], rows of the data set, or FILLER.
        length: the tokens that each is padded to.
    """

    rows: np.ndarray
    length: int


def choose_buckets(lengths: np.ndarray, count: int, multiple: int) -> tuple[int, ...]:
    """The bucket lengths that leave the least to pad, by dynamic programming over the multiples.

    Args:
        lengths: int [rows], at least one.
        count: how many buckets at most.
        multiple: each bucket's length is a multiple of it.

    Returns:
        Increasing lengths, at most ``count``; the last one holds the longest row.
    """
    sizes = -(-lengths // multiple)  # in multiples, rounded up
    rows = np.bincount(sizes)  # [multiples + 1]
    below = np.concatenate([[0], np.cumsum(rows)])  # below[m]: rows of fewer multiples than m
    last = len(rows) - 1
    # cost[m]: the least multiples that rows of at most m take, all padded, in the buckets used so far.
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


class Plan:
    """The batches of every epoch, in order. Can be pickled; equal arguments give equal plans.

    With ``shuffle`` each epoch visits the rows in a new order, its batches too, and leaves out the few
    (fewer than a batch, others each time) that would not fill one. Without, every row comes exactly
    once, shortest first, and the last batch is filled up.

    Raises:
        UserError: fewer rows than a batch, to shuffle.
    """

    def __init__(self, lengths: np.ndarray, buckets: tuple[int, ...], batch: int, *, seed: int, shuffle: bool) -> None:
        self.rows = np.flatnonzero(lengths)
        self.sizes = np.asarray(buckets)[np.searchsorted(buckets, lengths)]  # [rows of the data set]
        self.batch = batch
        self.seed = seed
        self.shuffle = shuffle
        if shuffle and len(self.rows) < batch:
            raise UserError(f"{len(self.rows)} rows do not fill a batch of {batch}: take a smaller batch")
        self.batches_per_epoch = len(self.rows) // batch if shuffle else -(-len(self.rows) // batch)

    def __getitem__(self, index: int) -> Batch:
        """Batch ``index``, counted from the beginning of the first epoch."""
        epoch, place = divmod(index, self.batches_per_epoch)
        batches = _epoch(self, epoch if self.shuffle else 0)
        rows = batches[place]
        return Batch(rows, length=int(self.sizes[rows[rows != FILLER]].max()))


@lru_cache(maxsize=4)  # readers that run ahead are in the next epoch already
def _epoch(plan: Plan, epoch: int) -> np.ndarray:
    """The rows of an epoch's batches, int64 [batches, batch]."""
    count = plan.batches_per_epoch * plan.batch
    rng = np.random.default_rng((plan.seed, epoch))
    rows = rng.permutation(plan.rows)[:count] if plan.shuffle else plan.rows
    # Sorted by bucket, then cut: a batch that spans two buckets takes the longer one.
    rows = rows[np.argsort(plan.sizes[rows], kind="stable")]
    rows = np.pad(rows, (0, count - len(rows)), constant_values=FILLER)
    batches = rows.reshape(plan.batches_per_epoch, plan.batch)
    return rng.permutation(batches) if plan.shuffle else batches
