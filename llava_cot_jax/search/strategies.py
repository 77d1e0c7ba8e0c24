"""Strategies by which an answer is searched for: settings of one mechanism that samples, scores and keeps candidates.

``StageBeam`` searches stage by stage (LLaVA-CoT, arXiv 2411.10440v3, section 3.2). The other strategies here sample
whole answers, which is the same search with a single stage that is neither opened nor closed. ``SentenceBeam`` and
``Retracing`` have modules of their own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from llava_cot_jax.checks import check_instance, check_int, check_number, check_text, shown
from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.settings import DEFAULT_MAX_NEW_TOKENS, Sampling
from llava_cot_jax.search.rounds import Rounds
from llava_cot_jax.search.scorers import AnyScorer, Judge, OwnScorer, Scorer, Verifier, check_scorer
from llava_cot_jax.stage_format import LLAVA_COT, StageFormat

DEFAULT_STAGE_TOKENS = 1024
"""Largest number of tokens of a candidate of a stage where no length is given."""

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class SearchSpec:
    """Static part of a compiled search, which a strategy determines.

    Attributes:
        stages: Names of the stages in order; empty where answers are sampled whole, or sentence by sentence.
        num_candidates: Number of candidates of each stage, of a sentence, or of each stage of a round.
        temperatures: Temperature of each stage.
        max_new_tokens: Largest number of tokens of a candidate of each stage.
        sampling: top_k and top_p; its temperature is the highest of the stages.
        scorers: Scorer that chooses among the candidates of each stage; None keeps the first.
        shrinks: Whether ``max_new_tokens`` is a default, which shrinks to what a model's context leaves.
        format: Format of the stages, and of whole answers.
        max_sentences: Largest number of sentences of an answer that is searched for sentence by sentence; 0 elsewhere.
        max_sentence_tokens: Largest number of tokens of a sentence.
        rounds: Rounds of a retracing search; None elsewhere.

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
    format: StageFormat = LLAVA_COT
    max_sentences: int = 0
    max_sentence_tokens: int = 0
    rounds: Rounds | None = None

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
        """Number of stages, 1 where answers are sampled whole, or sentence by sentence."""
        return len(self.num_candidates)

    @property
    def candidate_tokens(self) -> int:
        """Largest number of tokens of a candidate of any stage."""
        longest = max(self.max_new_tokens)
        return min(longest, self.max_sentence_tokens) if self.max_sentences else longest

    @property
    def can_stream(self) -> bool:
        """Whether a host can drive the search from stage to stage, as it does for a stream of questions."""
        return not self.max_sentences and self.rounds is None

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

    @property
    def has_verifier(self) -> bool:
        """Whether a verifier scores the candidates of a stage, a single one too."""
        return any(isinstance(scorer, Verifier) for scorer in self.scorers)


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


def check_continuable(spec: SearchSpec) -> None:
    """Check that the candidates of a search can be continued to the end of the answer.

    Raises:
        UserError: It is none by stages, or its stages are turns of their own.
    """
    if not spec.stages or not spec.can_stream:
        raise UserError(
            "the candidates of stages are continued: search with stage_beam (--search stage_beam), or let the verifier "
            "score whole answers (--search best_of_n --judge verifier)"
        )
    if spec.format.has_turns:
        raise UserError(
            f"format {spec.format.name} asks for its stages in several turns, so that no candidate can be continued to "
            "the end of the answer: give a format of one turn, such as llava_cot"
        )


FORMAT_REMEDY = 'give a StageFormat, such as StageFormat.load("mulberry")'
"""Remedy for a format that is none."""


def whole_answers(
    format: StageFormat,
    num_candidates: int,
    temperature: float,
    max_new_tokens: int | None,
    top_k: int | None = None,
    top_p: float = 1.0,
    scorer: Scorer | OwnScorer | None = None,
) -> SearchSpec:
    """Return a search that samples whole answers. One answer in several turns is sampled turn by turn."""
    check_instance("format", format, StageFormat, FORMAT_REMEDY)
    sampling = Sampling(temperature, top_k, top_p)
    longest = DEFAULT_MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens
    stages = format.names if format.has_turns else ()
    if stages and num_candidates != 1:
        raise UserError(
            f"format {format.name} asks for its stages in several turns, so that its answers cannot be sampled whole: "
            "search with StageBeam (--search stage_beam)"
        )
    count = len(stages) or 1
    return SearchSpec(
        stages=stages,
        num_candidates=(num_candidates,) * count,
        temperatures=(temperature,) * count,
        max_new_tokens=(longest,) * count,
        sampling=sampling,
        scorers=(scorer,) * count,
        shrinks=max_new_tokens is None,
        format=format,
    )


@dataclass(frozen=True)
class Greedy:
    """Strategy of one answer made of the likeliest tokens.

    Attributes:
        max_new_tokens: Largest number of tokens of the answer; by default 2048, or what the context leaves.
        format: Format of the answer.

    Raises:
        UserError: A setting is not of its type, or out of range.
    """

    max_new_tokens: int | None = None
    format: StageFormat = field(default=LLAVA_COT, repr=False)

    def __post_init__(self) -> None:
        self.to_spec()  # refuses wrong settings now

    def to_spec(self) -> SearchSpec:
        """Return the static part of the compiled search."""
        return whole_answers(self.format, 1, 0.0, self.max_new_tokens)


@dataclass(frozen=True)
class Sample:
    """Strategy of one sampled answer, by default with LLaVA-CoT's settings.

    Attributes:
        temperature: Temperature of sampling.
        max_new_tokens: Largest number of tokens of the answer; by default 2048, or what the context leaves.
        top_k: Number of likeliest tokens that are sampled from; None is all.
        top_p: Probability up to which the likeliest tokens are sampled from.
        format: Format of the answers.

    Raises:
        UserError: A setting is not of its type, or out of range.
    """

    temperature: float = 0.6
    max_new_tokens: int | None = None
    top_k: int | None = 50
    top_p: float = 0.9
    format: StageFormat = field(default=LLAVA_COT, repr=False)

    def __post_init__(self) -> None:
        self.to_spec()  # refuses wrong settings now

    def to_spec(self) -> SearchSpec:
        """Return the static part of the compiled search."""
        return whole_answers(self.format, 1, self.temperature, self.max_new_tokens, self.top_k, self.top_p)


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
        format: Format of the answers.

    Raises:
        UserError: A setting is not of its type, or out of range.
    """

    num_candidates: int = 8
    temperature: float = 0.6
    max_new_tokens: int | None = None
    top_k: int | None = 50
    top_p: float = 0.9
    format: StageFormat = field(default=LLAVA_COT, repr=False)

    def __post_init__(self) -> None:
        self.to_spec()  # refuses wrong settings now

    def to_spec(self) -> SearchSpec:
        """Return the static part of the compiled search."""
        return whole_answers(
            self.format, self.num_candidates, self.temperature, self.max_new_tokens, self.top_k, self.top_p
        )


@dataclass(frozen=True)
class WeightedVote:
    """Strategy of sampled answers, of which one with the conclusion that has the highest sum of scores is kept.

    Conclusions are compared as in ``MajorityVote``, which is the same vote with all scores 1. Among the answers with
    the winning conclusion the highest score decides, then the highest mean log-probability of a token, as it does
    between conclusions with equal sums (Math-Shepherd, arXiv 2312.08935).

    Attributes:
        num_candidates: Number of answers.
        scorer: Scorer that gives each answer a score of its own.
        temperature: Temperature of sampling.
        max_new_tokens: Largest number of tokens of an answer; by default 2048, or what the context leaves.
        top_k: Number of likeliest tokens that are sampled from; None is all.
        top_p: Probability up to which the likeliest tokens are sampled from.
        format: Format of the answers.

    Raises:
        UserError: A setting is not of its type, or out of range.
    """

    num_candidates: int = 8
    scorer: Verifier = field(default_factory=Verifier)
    temperature: float = 0.6
    max_new_tokens: int | None = None
    top_k: int | None = 50
    top_p: float = 0.9
    format: StageFormat = field(default=LLAVA_COT, repr=False)

    def __post_init__(self) -> None:
        check_scorer(self.scorer)
        if not isinstance(self.scorer, Verifier):
            raise UserError(
                f"scorer is {shown(self.scorer)}; a weighted vote needs a score of each answer's own: give Verifier(), "
                "which is --judge verifier"
            )
        self.to_spec()  # refuses wrong settings now

    def to_spec(self) -> SearchSpec:
        """Return the static part of the compiled search."""
        return whole_answers(
            self.format,
            self.num_candidates,
            self.temperature,
            self.max_new_tokens,
            self.top_k,
            self.top_p,
            self.scorer,
        )


@dataclass(frozen=True)
class BestOfN:
    """Strategy of sampled answers, of which the scorer chooses one.

    Attributes:
        num_candidates: Number of answers.
        scorer: Scorer that chooses: ``Judge``, ``Verifier``, ``LogProbability``, or a function as ``ScorerFunction``
            describes it.
        temperature: Temperature of sampling.
        max_new_tokens: Largest number of tokens of an answer; by default 2048, or what the context leaves.
        top_k: Number of likeliest tokens that are sampled from; None is all.
        top_p: Probability up to which the likeliest tokens are sampled from.
        format: Format of the answers.

    Raises:
        UserError: A setting is not of its type, or out of range.
    """

    num_candidates: int = 8
    scorer: AnyScorer = field(default_factory=Judge)
    temperature: float = 0.6
    max_new_tokens: int | None = None
    top_k: int | None = 50
    top_p: float = 0.9
    format: StageFormat = field(default=LLAVA_COT, repr=False)

    def __post_init__(self) -> None:
        self.to_spec()  # refuses wrong settings now

    def to_spec(self) -> SearchSpec:
        """Return the static part of the compiled search."""
        return whole_answers(
            self.format,
            self.num_candidates,
            self.temperature,
            self.max_new_tokens,
            self.top_k,
            self.top_p,
            check_scorer(self.scorer),
        )


@dataclass(frozen=True)
class StageBeam:
    """Strategy of stage-level beam search: of the candidates for each stage, the scorer chooses which one to continue.

    ``num_candidates``, ``scorer``, ``temperature`` and ``max_new_tokens`` take one value for all stages, or a tuple
    with one for each stage in order; ``scorer`` also takes a mapping from each stage to its scorer.

    Attributes:
        num_candidates: Number of candidates of a stage.
        scorer: Scorer that chooses: ``Judge``, ``Verifier``, ``LogProbability``, or a function as ``ScorerFunction``
            describes it. The judges of different stages must be equal.
        temperature: Temperature of sampling.
        max_new_tokens: Largest number of tokens of a candidate; by default 1024, or what the context leaves for each
            stage.
        top_k: Number of likeliest tokens that are sampled from; None is all.
        top_p: Probability up to which the likeliest tokens are sampled from.
        stages: Names of the stages in order. Without a format, each is enclosed in ``<NAME>`` and ``</NAME>``.
        format: Format of the stages, by default that of LLaVA-CoT.

    Raises:
        UserError: A setting is not of its type or out of range, there are no stages, a stage is given twice, stages are
            given that are not those of the format, or a tuple does not have one value for each stage.
    """

    num_candidates: int | tuple[int, ...] = 4
    scorer: AnyScorer | tuple[AnyScorer, ...] | Mapping[str, AnyScorer] = field(default_factory=Judge)
    temperature: float | tuple[float, ...] = 0.6
    max_new_tokens: int | tuple[int, ...] | None = None
    top_k: int | None = 50
    top_p: float = 0.9
    stages: tuple[str, ...] | None = None
    format: StageFormat = field(default=LLAVA_COT, repr=False)

    def __post_init__(self) -> None:
        self._settle_stages()
        self.to_spec()  # refuses wrong settings now

    def _settle_stages(self) -> None:
        """Let the format and the names of the stages agree."""
        check_instance("format", self.format, StageFormat, FORMAT_REMEDY)
        if self.stages is None:
            object.__setattr__(self, "stages", self.format.names)
        elif not isinstance(self.stages, tuple):
            raise UserError(f"stages is {shown(self.stages)}; it must be a tuple of tags")
        elif self.stages != self.format.names:
            if self.format != LLAVA_COT:
                raise UserError(f"stages is {self.stages}, but the format {self.format.name} has {self.format.names}")
            for stage in self.stages:
                check_text("a stage", stage)
            object.__setattr__(self, "format", StageFormat.tagged(self.stages))

    def to_spec(self) -> SearchSpec:
        """Return the static part of the compiled search."""
        temperatures = self._per_stage("temperature", self.temperature)
        for temperature in temperatures:
            check_number("temperature", temperature)
        longest = DEFAULT_STAGE_TOKENS if self.max_new_tokens is None else self.max_new_tokens
        return SearchSpec(
            stages=self.format.names,
            num_candidates=self._per_stage("num_candidates", self.num_candidates),
            temperatures=temperatures,
            max_new_tokens=self._per_stage("max_new_tokens", longest),
            sampling=Sampling(max(temperatures), self.top_k, self.top_p),
            scorers=tuple(map(check_scorer, self._per_stage("scorer", self._scorers_in_order()))),
            shrinks=self.max_new_tokens is None,
            format=self.format,
        )

    def _scorers_in_order(self) -> AnyScorer | tuple[AnyScorer, ...]:
        """Return the scorer, or where there is a mapping, the scorers in the order of the stages."""
        if not isinstance(self.scorer, Mapping):
            return self.scorer
        stages = self.format.names
        if set(self.scorer) != set(stages):
            raise UserError(
                f"scorer is for {', '.join(map(str, self.scorer)) or 'no stage'}; it must have one scorer for each of "
                f"{', '.join(stages)}"
            )
        return tuple(self.scorer[stage] for stage in stages)

    def _per_stage(self, name: str, value: _Value | tuple[_Value, ...]) -> tuple[_Value, ...]:
        """Return one value for each stage."""
        if isinstance(value, list):
            raise UserError(f"{name} is {shown(value)}; give one value, or a tuple with one for each stage")
        count = len(self.format.stages)
        values = value if isinstance(value, tuple) else (value,) * count
        if len(values) != count:
            raise UserError(
                f"{name} has {len(values)} values for {count} stages: give one value, or one for each stage"
            )
        return values
