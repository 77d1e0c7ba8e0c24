"""Scorers, which choose among candidates.

A judge, a verifier and the log-probability are settings of pieces that are compiled. A scorer of a user's own is a
function that is called on the host between compiled stages.
"""

import inspect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llava_cot_jax.checks import check_bool, check_choice, check_int, shown
from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.settings import Sampling
from llava_cot_jax.rounding import ceil_div


@dataclass(frozen=True)
class Judge:
    """Scorer in which the model itself chooses between two candidates, seeing the image.

    Attributes:
        verdict: "token" compares the probabilities of "1" and "2" after a fixed beginning of a verdict. "rationale"
            lets the model write a reason and a verdict, and checks each reasoning without the image first.
        both_orders: Whether each pair is judged twice, with either candidate as response 1. This cancels a preference
            for the first place.
        reason_tokens: Largest number of tokens of a reason with its verdict.
        check_tokens: Largest number of tokens of the check of a reasoning.
        temperature: Temperature that reasons and checks are sampled with.

    Raises:
        UserError: A setting is out of range.
    """

    verdict: Literal["token", "rationale"] = "token"
    both_orders: bool = True
    reason_tokens: int = 128
    check_tokens: int = 64
    temperature: float = 0.6

    def __post_init__(self) -> None:
        check_choice("verdict", self.verdict, ("token", "rationale"))
        check_bool("both_orders", self.both_orders)
        check_int("reason_tokens", self.reason_tokens)
        check_int("check_tokens", self.check_tokens)
        Sampling(self.temperature)

    @property
    def writes_reasons(self) -> bool:
        """Whether the judge samples text, rather than only reading a token's probabilities."""
        return self.verdict == "rationale"

    @property
    def orders(self) -> int:
        """Number of times that a pair is judged."""
        return 2 if self.both_orders else 1

    @property
    def max_new_tokens(self) -> int:
        """Largest number of tokens that the judge writes after a prompt; 1, the verdict, where it writes no reasons."""
        return max(self.reason_tokens, self.check_tokens) if self.writes_reasons else 1

    def queries_per_batch(self, num_candidates: int) -> int:
        """Return the number of prompts of a question that are processed side by side.

        Written reasons are sampled in batches of half as many prompts as there are candidates: a prompt holds two
        candidates, so the batch takes the room that the candidates' own tokens took. A token verdict needs only
        prefill, which gains nothing from larger batches: its batch is one pair, so that none is filled up.
        """
        return ceil_div(num_candidates, 2) if self.writes_reasons else self.orders


@dataclass(frozen=True)
class LogProbability:
    """Scorer that keeps the candidate with the highest mean log-probability of a token."""


@dataclass(frozen=True)
class Verifier:
    """Scorer in which the model itself is asked after each candidate whether it is right, seeing the image.

    A score is the probability of "yes" against "no". It is absolute: it does not depend on the other candidates. The
    highest wins, of equal ones that with the highest mean log-probability. A question takes some 25 tokens for each
    candidate, of which nothing is read again.
    """


ScorerFunction = Callable[[list[Any], str, str, list[str]], Sequence[float]]
"""Function that scores the candidates of a stage: (images, question, stage, texts) -> a score for each text.

The images are Pillow's, in RGB; ``stage`` is the stage's name, or "whole" where answers are sampled whole. A text is
the answer as far as it goes, with its tags: the winners of the stages before, and one of the candidates. The highest
score wins, and of equal ones the first. A candidate whose score is NaN or minus infinity loses.
"""

Scorer = Judge | LogProbability | Verifier
"""Scorers that the compiled search knows."""

AnyScorer = Scorer | ScorerFunction
"""Scorers that a strategy takes: the search's, and functions of a user's own, which are called between its stages."""

_WANTED = "(images, question, stage, texts)"

_LONGEST_QUESTION = 60
"""Number of characters of a question that a message shows."""


@dataclass(frozen=True)
class OwnScorer:
    """Scorer of a user's own. Any two are equal, since a compiled program does not depend on the function.

    Attributes:
        function: The function.
    """

    function: ScorerFunction = field(compare=False)

    @property
    def name(self) -> str:
        """Name of the function, or of the class of a callable object."""
        return getattr(self.function, "__qualname__", type(self.function).__qualname__)

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True)
class OwnScores:
    """Scores of a stage's candidates by a function of the user's own.

    Attributes:
        scorer: Name of the function.
        scores: Score of each candidate; None for one that loses because its score is NaN or minus infinity.
        seconds: Seconds that the function took.
    """

    scorer: str
    scores: list[float | None]
    seconds: float

    @property
    def winner(self) -> int:
        """The candidate with the highest score."""
        return max(range(len(self.scores)), key=lambda i: (_or_lowest(self.scores[i]), -i))


def check_scorer(scorer: Any) -> Scorer | OwnScorer:
    """Return a strategy's scorer as the search takes it.

    Raises:
        UserError: It is none.
    """
    if isinstance(scorer, Scorer | OwnScorer):
        return scorer
    if isinstance(scorer, type) and issubclass(scorer, Scorer):
        raise UserError(f"scorer is {shown(scorer)}; give an object of it: {scorer.__name__}()")
    if callable(scorer):
        return _own_scorer(scorer)
    raise UserError(
        f"scorer is {shown(scorer)}; it must be Judge(), Verifier(), LogProbability() or a function of (images, "
        "question, stage, texts) that returns a score for each text"
    )


def _own_scorer(function: Any) -> OwnScorer:
    """Return the scorer that a callable object is.

    Raises:
        UserError: It cannot take the four arguments.
    """
    scorer = OwnScorer(function)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a function of a library in C may not tell
        return scorer
    try:
        signature.bind(*[None] * 4)
    except TypeError:
        raise UserError(f"scorer is {shown(function)}, which takes {signature}; it must take {_WANTED}") from None
    return scorer


def call_scorer(
    scorer: OwnScorer, images: list[Any], question: str, stage: str, texts: list[str], place: str
) -> OwnScores:
    """Let a scorer score the candidates of a stage.

    Args:
        scorer: The scorer.
        images: Images of the question, opened.
        question: Text of the question.
        stage: Name of the stage.
        texts: The answers as far as they go.
        place: Words that say which question of the user's it is.

    Raises:
        UserError: The function raised an exception, or did not return a usable score for each text.
    """
    short = " ".join(question.split())
    short = short if len(short) <= _LONGEST_QUESTION else f"{short[:_LONGEST_QUESTION]}..."
    subject = f"the scorer {scorer.name}, called in the stage {stage} of {place} ({short}),"
    start = time.perf_counter()
    try:
        returned = scorer.function(images, question, stage, texts)
    except Exception as fault:
        said = " ".join(str(fault).split())
        raise UserError(f"{subject} raised {type(fault).__name__}{said and ': '}{said}") from fault
    seconds = time.perf_counter() - start
    try:
        return OwnScores(scorer.name, _read_scores(returned, len(texts)), seconds)
    except UserError as fault:
        raise UserError(f"{subject} returned {fault}") from None


def _read_scores(returned: Any, count: int) -> list[float | None]:
    """Return ``count`` scores of a function.

    Raises:
        UserError: What is returned is something else. The message says what, to follow "returned".
    """
    import jax.numpy as jnp  # here, as a command that refuses its arguments needs neither
    import numpy as np

    wanted = f"it must return a sequence of {count} numbers, one for each text"
    try:
        scores = np.asarray(returned)
    except Exception:  # arrays of other libraries raise errors of their own
        raise UserError(f"{shown(returned)}: {wanted}") from None
    is_number = jnp.issubdtype(scores.dtype, jnp.floating) or jnp.issubdtype(scores.dtype, jnp.integer)
    if scores.ndim != 1 or (scores.size and not is_number):
        raise UserError(f"{shown(returned)}: {wanted}")
    if len(scores) != count:
        raise UserError(f"{len(scores)} scores for {count} texts: {wanted}")
    numbers: list[float] = scores.astype(float).tolist()
    if math.inf in numbers:
        raise UserError("a score of infinity: the highest score must be a number")
    read = [number if math.isfinite(number) else None for number in numbers]
    if all(number is None for number in read):
        raise UserError("no score that is a number: at least one candidate must have one")
    return read


def _or_lowest(score: float | None) -> float:
    return -math.inf if score is None else score
