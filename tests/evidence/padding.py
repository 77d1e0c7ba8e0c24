"""Compute the share of padding in a training epoch's tokens, with and without batches grouped by length.

    python tests/evidence/padding.py | tee tests/evidence/padding.txt

Lengths are drawn, not measured, since the data set itself is not at hand. They follow a log-normal distribution whose
mean is 600 tokens and whose logarithm has a standard deviation of 0.45 (a twentieth of the examples are above 1140
tokens), as answers of four stages have it. There are 98,600 examples, without those above 2048 tokens.
"""

import argparse
import datetime
import platform

import numpy as np

from llava_cot_jax.data.batching import BatchOrder, bucket_sizes, choose_buckets

ROWS, MEAN, SD, MAX_LENGTH, MULTIPLE = 98_600, 600, 0.45, 2048, 128


def draw_lengths() -> np.ndarray:
    lengths = np.random.default_rng(0).lognormal(np.log(MEAN) - SD**2 / 2, SD, ROWS).astype(np.int32)
    return lengths[lengths <= MAX_LENGTH]


def padding(lengths: np.ndarray, buckets: tuple[int, ...], batch: int) -> float:
    order = BatchOrder(bucket_sizes(lengths, buckets), np.ones_like(lengths), batch, seed=0, shuffle=True)
    batches = [order[i] for i in range(order.batches_per_epoch)]
    return 1 - sum(lengths[b.rows].sum() for b in batches) / sum(b.length * batch for b in batches)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    lengths = draw_lengths()
    print(f"{datetime.date.today()}  Python {platform.python_version()}  numpy {np.__version__}  {platform.machine()}")
    print(f"{len(lengths)} rows, mean {lengths.mean():.0f}, median {np.median(lengths):.0f}, longest {lengths.max()}")
    for batch in (32, 256):
        print(f"\nbatches of {batch}")
        _line("random order, all to the longest of the set", padding(lengths, (MAX_LENGTH,), batch), "1 length")
        # As upstream does: a compiled step would need a shape for almost every batch.
        rows = np.random.default_rng(0).permutation(lengths)[: len(lengths) // batch * batch].reshape(-1, batch)
        longest = rows.max(axis=1)
        share = 1 - rows.sum() / (longest * batch).sum()
        _line("random order, each to its own longest", share, f"{len(set(longest.tolist()))} lengths")
        for count in (2, 4, 6, 8):
            buckets = choose_buckets(lengths, count, MULTIPLE)
            _line(f"grouped by length into {count}", padding(lengths, buckets, batch), " ".join(map(str, buckets)))


def _line(what: str, share: float, lengths: str) -> None:
    print(f"  {what:44s}{share:6.1%}  {lengths}")


if __name__ == "__main__":
    main()
