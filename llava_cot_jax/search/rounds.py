"""Rounds of a search that goes back to new captions: the static part of it that ``SearchSpec`` holds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rounds:
    """Rounds in which captions and reasonings are written until enough of them are good.

    Attributes:
        keep: Number of captions of a round that are continued.
        most: Largest number of rounds.
        threshold: Score above which the second-best reasoning of all rounds must be.
    """

    keep: int
    most: int
    threshold: float
