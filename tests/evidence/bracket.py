"""Simulate a tournament bracket and upstream's knockout with a judge that makes mistakes.

    python tests/evidence/bracket.py | tee tests/evidence/bracket.txt

The qualities of candidates are drawn from a standard normal distribution. The judge prefers the first of two with
probability 1 / (1 + exp(-sharpness * difference)), independently each time. Upstream takes two candidates at random
and puts the winner back among the rest. Ours is a random bracket in rounds, so that all pairs of a round go through
the model together. Both judge N - 1 pairs.
"""

import argparse
import datetime

import numpy as np

TRIALS = 200_000


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"{datetime.date.today()}; numpy {np.__version__}; {TRIALS:,} trials a row, standard errors at most 0.0023")
    print("sharpness  N   the best wins: upstream  bracket   winner's mean quality: upstream  bracket  the best's")
    for sharpness in (0.5, 1.0, 2.0, 5.0):
        for count in (2, 4, 10):
            rng = np.random.default_rng([count, int(10 * sharpness)])
            quality = rng.normal(size=(TRIALS, count))
            best, top = quality.argmax(axis=1), quality.max(axis=1).mean()
            row = [f"{sharpness:9} {count:2}"]
            won = [play(quality, sharpness, rng) for play in (put_back, bracket)]
            row.append(f"{(won[0] == best).mean():25.3f} {(won[1] == best).mean():8.3f}")
            means = [np.take_along_axis(quality, w[:, None], 1).mean() for w in won]
            row.append(f"{means[0]:33.3f} {means[1]:8.3f} {top:11.3f}")
            print(" ".join(row))


def prefers_first(first: np.ndarray, second: np.ndarray, sharpness: float, rng: np.random.Generator) -> np.ndarray:
    return rng.random(first.shape) < 1 / (1 + np.exp(-sharpness * (first - second)))


def put_back(quality: np.ndarray, sharpness: float, rng: np.random.Generator) -> np.ndarray:
    """Return the index of the winner of each trial by upstream's knockout."""
    alive = np.tile(np.arange(quality.shape[1]), (len(quality), 1))
    while alive.shape[1] > 1:
        alive = rng.permuted(alive, axis=1)
        first, second = (np.take_along_axis(quality, alive[:, i : i + 1], 1)[:, 0] for i in (0, 1))
        kept = np.where(prefers_first(first, second, sharpness, rng), alive[:, 0], alive[:, 1])
        alive = np.concatenate([kept[:, None], alive[:, 2:]], axis=1)
    return alive[:, 0]


def bracket(quality: np.ndarray, sharpness: float, rng: np.random.Generator) -> np.ndarray:
    """Return the index of the winner of each trial by a bracket. A candidate without an opponent goes through first."""
    alive = rng.permuted(np.tile(np.arange(quality.shape[1]), (len(quality), 1)), axis=1)
    while (count := alive.shape[1]) > 1:
        first, second = alive[:, 0 : count - count % 2 : 2], alive[:, 1::2]
        a, b = (np.take_along_axis(quality, x, 1) for x in (first, second))
        kept = np.where(prefers_first(a, b, sharpness, rng), first, second)
        alive = np.concatenate([alive[:, count - count % 2 :], kept], axis=1)
    return alive[:, 0]


if __name__ == "__main__":
    main()
