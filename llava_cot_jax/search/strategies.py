"""Strategies by which an answer is searched for: settings of one mechanism that samples, scores and keeps candidates.

``StageBeam`` searches stage by stage (LLaVA-CoT, arXiv 2411.10440v3, section 3.2). The other strategies sample whole
answers, which is the same search with a single stage that has no tags.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from llava_cot_jax.checks import check_bool, check_int, check_number, check_text, shown
from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.settings import DEFAULT_MAX_NEW_TOKENS, Sampling
from llava_cot_jax.rounding import ceil_div
from llava_cot_jax.search.scorers import OwnScorer, ScorerFunction, check_own_scorer
from llava_cot_jax.stages import STAGES

DEFAULT_STAGE_TOKENS = 1024
"""Largest number of tokens of a candidate of a stage where no length is given."""

_Value = TypeVar("_Value")


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
            raise UserError(f'verdict is {shown(self.verdict)}; it must be "token" or "rationale"')
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


Scorer = Judge | LogProbability
"""Scorers that the compiled search knows."""

AnyScorer = Scorer | ScorerFunction
"""Scorers that a strategy takes: the search's, and functions of a user's own, which are called between its stages."""


def _check_scorer(scorer: Any) -> Scorer | OwnScorer:
    """Return a strategy's scorer as the search takes it.

    Raises:
        UserError: It is none.
    """
    if isinstance(scorer, Scorer | OwnScorer):
        return scorer
    if isinstance(scorer, type) and issubclass(scorer, Scorer):
        raise UserError(f"scorer is {shown(scorer)}; give an object of it: {scorer.__name__}()")
    if callable(scorer):
        return check_own_scorer(scorer)
    raise UserError(
        f"scorer is {shown(scorer)}; it must be Judge(), LogProbability() or a function of (images, question, stage, "
        "texts) that returns a score for each text"
    )


@dataclass(frozen=True)
class SearchSpec:
    """Static part of a compiled search, which a strategy determines.

    Attributes:
        stages: Tags of the stages in order; empty where whole answers are sampled.
        num_candidates: Number of candidates of each stage.
        temperatures: Temperature of each stage.
        max_new_tokens: Largest number of tokens of a candidate of each stage.
        sampling: top_k and top_p; its temperature is the highest of the stages.
        scorers: Scorer that chooses among the candidates of each stage; None keeps the first.
        shrinks: Whether ``max_new_tokens`` is a default, which shrinks to what a model's context leaves.

    Raises:
        UserError: A setting is out of range.
    """

    stages: tuple[str, ...]
    num_candidates: tuple[int, ...]
    temperatures: tuple[float, ...]
    max_new_tokens: tuple[int, ...]
    sampling: Sampling
    scorers: tuple[Scorer | OwnScorer | None, ...]
    shrinks: bool = False

    def __post_init__(self) -> None:
        for candidates in self.num_candidates:
            check_int("num_candidates", candidates)
        for tokens in self.max_new_tokens:
            check_int("max_new_tokens", tokens)
        for temperature in self.temperatures:
            Sampling(temperature)
        if len([scorer for scorer in self.distinct_scorers if isinstance(scorer, Judge)]) > 1:
            raise UserError("scorer has two different judges: give one Judge for all stages that have one")

    @property
    def num_stages(self) -> int:
        """Number of stages, 1 where whole answers are sampled."""
        return len(self.num_candidates)

    @property
    def distinct_scorers(self) -> tuple[Scorer | OwnScorer, ...]:
        """The scorers, each once."""
        return tuple(dict.fromkeys(scorer for scorer in self.scorers if scorer is not None))

    @property
    def judge(self) -> Judge | None:
        """The scorer that is a judge, where one of its stages has candidates to choose between."""
        judges = (scorer for scorer in map(self.judge_of, range(self.num_stages)) if scorer is not None)
        return next(judges, None)

    @property
    def calls_host(self) -> bool:
        """Whether a function of the user's own chooses in a stage, so that the host drives the search."""
        return any(self.own_scorer_of(stage) for stage in range(self.num_stages))

    def own_scorer_of(self, stage: int) -> OwnScorer | None:
        """Return the scorer of a stage, where it is of the user's own and has candidates to choose between."""
        scorer = self.scorers[stage]
        return scorer if isinstance(scorer, OwnScorer) and self.num_candidates[stage] > 1 else None

    def judge_of(self, stage: int) -> Judge | None:
        """Return the scorer of a stage, where it is a judge and has candidates to choose between."""
        scorer = self.scorers[stage]
        return scorer if isinstance(scorer, Judge) and self.num_candidates[stage] > 1 else None


class Strategy(Protocol):
    """Way to search for an answer, as ``Reasoner`` takes it."""

    def to_spec(self) -> SearchSpec:
        """Return the static part of the compiled search."""


def check_strategy(strategy: Any) -> None:
    """Check that ``strategy`` is a strategy.

    Raises:
        UserError: It is something else, such as the name or the class of a strategy.
    """
    if isinstance(strategy, type) and hasattr(strategy, "to_spec"):
        raise UserError(f"search is {shown(strategy)}; give an object of it: {strategy.__name__}()")
    if not callable(getattr(strategy, "to_spec", None)):
        raise UserError(f"search is {shown(strategy)}; it must be a strategy, such as StageBeam() or Greedy()")


def _whole_answers(
    num_candidates: int,
    temperature: float,
    max_new_tokens: int | None,
    top_k: int | None = None,
    top_p: float = 1.0,
    scorer: Scorer | OwnScorer | None = None,
) -> SearchSpec:
    """Return a search that samples whole answers."""
    sampling = Sampling(temperature, top_k, top_p)
    longest = DEFAULT_MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens
    return SearchSpec((), (num_candidates,), (temperature,), (longest,), sampling, (scorer,), max_new_tokens is None)


@dataclass(frozen=True)
class Greedy:
    """Strategy of one answer made of the likeliest tokens.

    Attributes:
        max_new_tokens: Largest number of tokens of the answer; by default 2048, or what the context leaves.

    Raises:
        UserError: A setting is not of its type, or out of range.
    """

    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        self.to_spec()  # refuses wrong settings now

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

    Raises:
        UserError: A setting is not of its type, or out of range.
    """

    temperature: float = 0.6
    max_new_tokens: int | None = None
    top_k: int | None = 50
    top_p: float = 0.9

    def __post_init__(self) -> None:
        self.to_spec()  # refuses wrong settings now

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

    Raises:
        UserError: A setting is not of its type, or out of range.
    """

    num_candidates: int = 8
    temperature: float = 0.6
    max_new_tokens: int | None = None
    top_k: int | None = 50
    top_p: float = 0.9

    def __post_init__(self) -> None:
        self.to_spec()  # refuses wrong settings now

    def to_spec(self) -> SearchSpec:
        """Return the static part of the compiled search."""
        return _whole_answers(self.num_candidates, self.temperature, self.max_new_tokens, self.top_k, self.top_p)


@dataclass(frozen=True)
class BestOfN:
    """Strategy of sampled answers, of which the scorer chooses one.

    Attributes:
        num_candidates: Number of answers.
        scorer: Scorer that chooses: ``Judge``, ``LogProbability``, or a function as ``ScorerFunction`` describes it.
        temperature: Temperature of sampling.
        max_new_tokens: Largest number of tokens of an answer; by default 2048, or what the context leaves.
        top_k: Number of likeliest tokens that are sampled from; None is all.
        top_p: Probability up to which the likeliest tokens are sampled from.

    Raises:
        UserError: A setting is not of its type, or out of range.
    """

    num_candidates: int = 8
    scorer: AnyScorer = Judge()
    temperature: float = 0.6
    max_new_tokens: int | None = None
    top_k: int | None = 50
    top_p: float = 0.9

    def __post_init__(self) -> None:
        self.to_spec()  # refuses wrong settings now

    def to_spec(self) -> SearchSpec:
        """Return the static part of the compiled search."""
        scorer = _check_scorer(self.scorer)
        return _whole_answers(
            self.num_candidates, self.temperature, self.max_new_tokens, self.top_k, self.top_p, scorer
        )


@dataclass(frozen=True)
class StageBeam:
    """Strategy of stage-level beam search: of the candidates for each stage, the scorer chooses which one to continue.

    ``num_candidates``, ``scorer``, ``temperature`` and ``max_new_tokens`` take one value for all stages, or a tuple
    with one for each stage in order; ``scorer`` also takes a mapping from each stage to its scorer.

    Attributes:
        num_candidates: Number of candidates of a stage.
        scorer: Scorer that chooses: ``Judge``, ``LogProbability``, or a function as ``ScorerFunction`` describes it.
            The judges of different stages must be equal.
        temperature: Temperature of sampling.
        max_new_tokens: Largest number of tokens of a candidate; by default 1024, or what the context leaves for each
            stage.
        top_k: Number of likeliest tokens that are sampled from; None is all.
        top_p: Probability up to which the likeliest tokens are sampled from.
        stages: Tags of the stages in order.

    Raises:
        UserError: A setting is not of its type or out of range, there are no stages, a stage is given twice, or a tuple
            does not have one value for each stage.
    """

    num_candidates: int | tuple[int, ...] = 4
    scorer: AnyScorer | tuple[AnyScorer, ...] | Mapping[str, AnyScorer] = Judge()
    temperature: float | tuple[float, ...] = 0.6
    max_new_tokens: int | tuple[int, ...] | None = None
    top_k: int | None = 50
    top_p: float = 0.9
    stages: tuple[str, ...] = STAGES

    def __post_init__(self) -> None:
        self.to_spec()  # refuses wrong settings now

    def to_spec(self) -> SearchSpec:
        """Return the static part of the compiled search."""
        if not isinstance(self.stages, tuple):
            raise UserError(f"stages is {shown(self.stages)}; it must be a tuple of tags")
        for stage in self.stages:
            check_text("a stage", stage)
        if not self.stages or not all(self.stages) or len(set(self.stages)) < len(self.stages):
            raise UserError(f"stages must be different tags, at least one; got {self.stages}")
        temperatures = self._per_stage("temperature", self.temperature)
        for temperature in temperatures:
            check_number("temperature", temperature)
        longest = DEFAULT_STAGE_TOKENS if self.max_new_tokens is None else self.max_new_tokens
        return SearchSpec(
            stages=self.stages,
            num_candidates=self._per_stage("num_candidates", self.num_candidates),
            temperatures=temperatures,
            max_new_tokens=self._per_stage("max_new_tokens", longest),
            sampling=Sampling(max(temperatures), self.top_k, self.top_p),
            scorers=tuple(map(_check_scorer, self._per_stage("scorer", self._scorers_in_order()))),
            shrinks=self.max_new_tokens is None,
        )

    def _scorers_in_order(self) -> AnyScorer | tuple[AnyScorer, ...]:
        """Return the scorer, or where there is a mapping, the scorers in the order of the stages."""
        if not isinstance(self.scorer, Mapping):
            return self.scorer
        if set(self.scorer) != set(self.stages):
            raise UserError(
                f"scorer is for {', '.join(map(str, self.scorer)) or 'no stage'}; it must have one scorer for each of "
                f"{', '.join(self.stages)}"
            )
        return tuple(self.scorer[stage] for stage in self.stages)

    def _per_stage(self, name: str, value: _Value | tuple[_Value, ...]) -> tuple[_Value, ...]:
        """Return one value for each stage."""
        if isinstance(value, list):
            raise UserError(f"{name} is {shown(value)}; give one value, or a tuple with one for each stage")
        values = value if isinstance(value, tuple) else (value,) * len(self.stages)
        if len(values) != len(self.stages):
            raise UserError(
                f"{name} has {len(values)} values for {len(self.stages)} stages: give one value, or one for each stage"
            )
        return values
