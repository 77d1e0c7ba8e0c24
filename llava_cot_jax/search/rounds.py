"""Rounds of a search that goes back to new captions: the static part of it that ``SearchSpec`` holds."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Rounds:
    """Rounds in which captions and reasonings are written until enough of them are good.

    Attributes:
        keep: Number of captions of a round that are continued.
        pool: Number of the best reasonings of all rounds that are remembered: those to be concluded, and at least two.
        most: Largest number of rounds.
        threshold: Score above which the second-best reasoning of all rounds must be for no further round. The compiled
            search takes it as an array, so that another one compiles nothing.
    """

    keep: int
    pool: int
    most: int
    threshold: float = field(compare=False)
