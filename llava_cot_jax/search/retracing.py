"""Stage-wise retracing search (SWIRES of LLaVA-CoT's ICCV version): new captions while the reasonings are weak."""

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import TYPE_CHECKING, Any, Self

from llava_cot_jax.checks import check_int, check_number
from llava_cot_jax.errors import UserError
from llava_cot_jax.files import write_text
from llava_cot_jax.paths import as_path, reading_errors, writing_errors
from llava_cot_jax.search.rounds import Rounds
from llava_cot_jax.search.scorers import Verifier
from llava_cot_jax.search.strategies import SearchSpec, StageBeam
from llava_cot_jax.stage_format import LLAVA_COT, StageFormat

if TYPE_CHECKING:
    from llava_cot_jax.search.trace import Trace

DEVIATIONS = 0.2533
"""Standard deviations that the threshold lies above the mean, as upstream's does: four in ten scores lie above it, were
they distributed normally."""


@dataclass(frozen=True)
class Retracing:
    """Strategy of stage-wise retracing search, in which the verifier scores captions, reasonings and conclusions.

    There is one summary. A round writes captions, keeps the best, and writes reasonings after each. It is the last one
    once the second-best reasoning of all rounds scores above the threshold. Then the best reasonings of all rounds are
    each continued by one conclusion, of which the best wins. Of equal scores the higher mean log-probability decides.

    Attributes:
        captions: Number of captions of a round.
        keep: Number of captions that are kept of them.
        reasonings: Number of reasonings after each of these.
        conclusions: Number of reasonings of all rounds that are continued by a conclusion.
        threshold: Score, from 0 to 1, above which the second-best reasoning must be. ``Threshold`` finds one.
        max_rounds: Largest number of rounds.
        temperature: Temperature of sampling.
        max_new_tokens: Largest number of tokens of a candidate; by default 1024, or what the context leaves.
        top_k: Number of likeliest tokens that are sampled from; None is all.
        top_p: Probability up to which the likeliest tokens are sampled from.
        format: Format of the stages, of which there are four.

    Raises:
        UserError: A setting is not of its type, or out of range.
    """

    captions: int = 4
    keep: int = 2
    reasonings: int = 2
    conclusions: int = 3
    threshold: float = 0.5
    max_rounds: int = 5
    temperature: float = 0.6
    max_new_tokens: int | None = None
    top_k: int | None = 50
    top_p: float = 0.9
    format: StageFormat = field(default=LLAVA_COT, repr=False)

    def __post_init__(self) -> None:
        self.to_spec()  # refuses wrong settings now

    def to_spec(self) -> SearchSpec:
        """Return the static part of the compiled search."""
        for name in ("captions", "keep", "reasonings", "conclusions", "max_rounds"):
            check_int(name, getattr(self, name))
        check_number("threshold", self.threshold)
        if not 0 <= self.threshold <= 1:
            raise UserError(f"threshold is {self.threshold}; a verifier's score is from 0 to 1")
        if self.keep > self.captions:
            raise UserError(f"keep is {self.keep}, but there are {self.captions} captions to keep them of")
        written, pool = self.keep * self.reasonings, max(self.conclusions, 2)
        if written < pool:
            raise UserError(
                f"a round has {written} reasonings (keep times reasonings), but the search needs {pool}: for a "
                f"second-best one, and for {self.conclusions} conclusions"
            )
        beam = StageBeam(
            1, Verifier(), self.temperature, self.max_new_tokens, self.top_k, self.top_p, None, self.format
        )
        if len(self.format.stages) != 4:
            raise UserError(
                f"format {self.format.name} has {len(self.format.stages)} stages, but a retracing search needs four: "
                "a plan, a caption, a reasoning and a conclusion"
            )
        return replace(
            beam.to_spec(),
            num_candidates=(1, self.captions, written, self.conclusions),
            scorers=(None, Verifier(), Verifier(), Verifier()),  # there is nothing to choose from one summary
            rounds=Rounds(self.keep, pool, self.max_rounds, float(self.threshold)),
        )


@dataclass(frozen=True)
class Threshold:
    """Threshold of a retracing search with the scores that it was found from.

    Attributes:
        mean: Mean of the scores of reasonings.
        std: Standard deviation of these.
        count: Number of these.
        threshold: The mean and ``DEVIATIONS`` standard deviations.
    """

    mean: float
    std: float
    count: int
    threshold: float

    @classmethod
    def of(cls, scores: Iterable[float]) -> Self:
        """Return the threshold that scores give.

        Raises:
            UserError: There are fewer than two.
        """
        values = list(scores)
        if len(values) < 2:
            raise UserError(f"a threshold needs the scores of at least two reasonings, but there are {len(values)}")
        mean, std = statistics.fmean(values), statistics.pstdev(values)
        return cls(mean, std, len(values), min(mean + DEVIATIONS * std, 1.0))

    def write(self, path: str | PathLike[str]) -> None:
        """Write the threshold to a JSON file.

        Raises:
            UserError: The file cannot be written.
        """
        with writing_errors(as_path(path)):
            write_text(as_path(path), json.dumps(vars(self), indent=1) + "\n")


def read_threshold(number_or_path: str) -> float:
    """Return a threshold that is given as a number, or as a file that ``Threshold.write`` has written.

    Raises:
        UserError: It is neither.
    """
    try:
        return float(number_or_path)
    except ValueError:
        path = as_path(number_or_path)
    with reading_errors(path):
        content = path.read_bytes()
    try:
        value: Any = json.loads(content)["threshold"]
    except (ValueError, KeyError, TypeError):
        value = None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{path} holds no threshold: give a number, or a file that generate --threshold_to has written")
    return float(value)


def reasoning_scores(trace: "Trace") -> list[float]:
    """Return the scores of the reasonings of a search's first round, which no threshold has selected."""
    stage = next(stage for stage in trace.stages if stage.round == 1 and stage.candidates[0].parent is not None)
    return [candidate.score for candidate in stage.candidates if candidate.score is not None]
