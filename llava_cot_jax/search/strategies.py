"""Strategies by which an answer is searched for: settings of one mechanism that samples, scores and keeps candidates.

``StageBeam`` searches stage by stage (LLaVA-CoT, arXiv 2411.10440v3, section 3.2). The other strategies sample whole
answers, which is the same search with a single stage that has no tags.
"""

from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.settings import DEFAULT_MAX_NEW_TOKENS, Sampling
from llava_cot_jax.rounding import ceil_div
from llava_cot_jax.stages import STAGES

DEFAULT_STAGE_TOKENS = 1024
"""Largest number of tokens of a candidate of a stage where no length is given."""

_Value = TypeVar("_Value")


def _check_positive(name: str, value: int) -> None:
    """Check that ``value`` of the setting ``name`` is at least 1."""
    if value < 1:
        raise UserError(f"{name} is {value}; it must be at least 1")


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
        if self.verdict not in ("token", "rationale"):
            raise UserError(f'verdict is {self.verdict!r}; it must be "token" or "rationale"')
        _check_positive("reason_tokens", self.reason_tokens)
        _check_positive("check_tokens", self.check_tokens)
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


Scorer = Judge | LogProbability


@dataclass(frozen=True)
class SearchSpec:
    """Static part of a compiled search, which a strategy determines.

    Attributes:
        stages: Tags of the stages in order; empty where whole answers are sampled.
        num_candidates: Number of candidates of each stage.
        temperatures: Temperature of each stage.
        max_new_tokens: Largest number of tokens of a candidate of each stage.
        sampling: top_k and top_p; its temperature is the highest of the stages.
        scorer: Scorer that chooses among candidates; None keeps the first.
        shrinks: Whether ``max_new_tokens`` is a default, which shrinks to what a model's context leaves.

    Raises:
        UserError: A setting is out of range.
    """

    stages: tuple[str, ...]
    num_candidates: tuple[int, ...]
    temperatures: tuple[float, ...]
    max_new_tokens: tuple[int, ...]
    sampling: Sampling
    scorer: Scorer | None
    shrinks: bool = False

    def __post_init__(self) -> None:
        _check_positive("num_candidates", min(self.num_candidates))
        _check_positive("max_new_tokens", min(self.max_new_tokens))
        for temperature in self.temperatures:
            Sampling(temperature)

    @property
    def num_stages(self) -> int:
        """Number of stages, 1 where whole answers are sampled."""
        return len(self.num_candidates)

    @property
    def judge(self) -> Judge | None:
        """The scorer, where it is a judge and a stage has candidates to choose between."""
        return self.scorer if isinstance(self.scorer, Judge) and max(self.num_candidates) > 1 else None


class Strategy(Protocol):
    """Way to search for an answer, as ``Reasoner`` takes it."""

    def to_spec(self) -> SearchSpec:
        """Return the static part of the compiled search."""


def _whole_answers(
    num_candidates: int,
    temperature: float,
    max_new_tokens: int | None,
    top_k: int | None = None,
    top_p: float = 1.0,
    scorer: Scorer | None = None,
) -> SearchSpec:
    """Return a search that samples whole answers."""
    sampling = Sampling(temperature, top_k, top_p)
    longest = DEFAULT_MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens
    return SearchSpec((), (num_candidates,), (temperature,), (longest,), sampling, scorer, max_new_tokens is None)


@dataclass(frozen=True)
class Greedy:
    """Strategy of one answer made of the likeliest tokens.

    Attributes:
        max_new_tokens: Largest number of tokens of the answer; by default 2048, or what the context leaves.
    """

    max_new_tokens: int | None = None

    def to_spec(self) -> SearchSpec:
        """Return the static part of the compiled search."""
        return _whole_answers(1, 0.0, self.max_new_tokens)


@dataclass(frozen=True)
class Sample:
    """Strategy of one sampled answer, by default with LLaVA-CoT's settings.

    Attributes:
        temperature: Temperature of sampling.
        max_new_tokens: Largest number of tokens of the answer; by default 2048, or what the context leaves.
        top_k: Number of likeliest tokens that are sampled from; None is all.
        top_p: Probability up to which the likeliest tokens are sampled from.
    """

    temperature: float = 0.6
    max_new_tokens: int | None = None
    top_k: int | None = 50
    top_p: float = 0.9

    def to_spec(self) -> SearchSpec:
        """Return the static part of the compiled search."""
        return _whole_answers(1, self.temperature, self.max_new_tokens, self.top_k, self.top_p)


@dataclass(frozen=True)
class MajorityVote:
    """Strategy of sampled answers, of which one with the most common conclusion is kept.

    Conclusions are compared without case, spacing, and punctuation at their ends. Among the answers with the most
    common conclusion, and between conclusions that are equally common, the highest mean log-probability of a token
    decides (Wang et al., arXiv 2203.11171).

    Attributes:
        num_candidates: Number of answers.
        temperature: Temperature of sampling.
        max_new_tokens: Largest number of tokens of an answer; by default 2048, or what the context leaves.
        top_k: Number of likeliest tokens that are sampled from; None is all.
        top_p: Probability up to which the likeliest tokens are sampled from.
    """

    num_candidates: int = 8
    temperature: float = 0.6
    max_new_tokens: int | None = None
    top_k: int | None = 50
    top_p: float = 0.9

    def to_spec(self) -> SearchSpec:
        """Return the static part of the compiled search."""
        return _whole_answers(self.num_candidates, self.temperature, self.max_new_tokens, self.top_k, self.top_p)


@dataclass(frozen=True)
class BestOfN:
    """Strategy of sampled answers, of which the scorer chooses one.

    Attributes:
        num_candidates: Number of answers.
        scorer: Scorer that chooses.
        temperature: Temperature of sampling.
        max_new_tokens: Largest number of tokens of an answer; by default 2048, or what the context leaves.
        top_k: Number of likeliest tokens that are sampled from; None is all.
        top_p: Probability up to which the likeliest tokens are sampled from.
    """

    num_candidates: int = 8
    scorer: Scorer = Judge()
    temperature: float = 0.6
    max_new_tokens: int | None = None
    top_k: int | None = 50
    top_p: float = 0.9

    def to_spec(self) -> SearchSpec:
        """Return the static part of the compiled search."""
        return _whole_answers(
            self.num_candidates, self.temperature, self.max_new_tokens, self.top_k, self.top_p, self.scorer
        )


@dataclass(frozen=True)
class StageBeam:
    """Strategy of stage-level beam search: of the candidates for each stage, the scorer chooses which one to continue.

    ``num_candidates``, ``temperature`` and ``max_new_tokens`` take one value for all stages, or a tuple with one for
    each stage in order.

    Attributes:
        num_candidates: Number of candidates of a stage.
        scorer: Scorer that chooses.
        temperature: Temperature of sampling.
        max_new_tokens: Largest number of tokens of a candidate; by default 1024, or what the context leaves for each
            stage.
        top_k: Number of likeliest tokens that are sampled from; None is all.
        top_p: Probability up to which the likeliest tokens are sampled from.
        stages: Tags of the stages in order.
    """

    num_candidates: int | tuple[int, ...] = 4
    scorer: Scorer = Judge()
    temperature: float | tuple[float, ...] = 0.6
    max_new_tokens: int | tuple[int, ...] | None = None
    top_k: int | None = 50
    top_p: float = 0.9
    stages: tuple[str, ...] = STAGES

    def to_spec(self) -> SearchSpec:
        """Return the static part of the compiled search.

        Raises:
            UserError: There are no stages, a stage is given twice, or a tuple does not have one value for each stage.
        """
        if not self.stages or not all(self.stages) or len(set(self.stages)) < len(self.stages):
            raise UserError(f"stages must be different tags, at least one; got {self.stages}")
        temperatures = self._per_stage("temperature", self.temperature)
        longest = DEFAULT_STAGE_TOKENS if self.max_new_tokens is None else self.max_new_tokens
        return SearchSpec(
            stages=tuple(self.stages),
            num_candidates=self._per_stage("num_candidates", self.num_candidates),
            temperatures=temperatures,
            max_new_tokens=self._per_stage("max_new_tokens", longest),
            sampling=Sampling(max(temperatures), self.top_k, self.top_p),
            scorer=self.scorer,
            shrinks=self.max_new_tokens is None,
        )

    def _per_stage(self, name: str, value: _Value | tuple[_Value, ...]) -> tuple[_Value, ...]:
        """Return one value for each stage."""
        values = value if isinstance(value, tuple) else (value,) * len(self.stages)
        if len(values) != len(self.stages):
            raise UserError(
                f"{name} has {len(values)} values for {len(self.stages)} stages: give one value, or one for each stage"
            )
        return values
