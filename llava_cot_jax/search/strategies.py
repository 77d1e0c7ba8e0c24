"""How an answer is searched for: settings of one mechanism, in which candidates are written, scored and kept.

``StageBeam`` searches stage by stage (LLaVA-CoT, arXiv 2411.10440, section 3.2). The others write whole
answers, which is the same search with one stage that nothing opens.
"""

from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.settings import Sampling
from llava_cot_jax.stages import STAGES

T = TypeVar("T")


@dataclass(frozen=True)
class Judge:
    """The model itself chooses between two candidates, seeing the image.

    Attributes:
        verdict: "token" compares the probabilities of "1" and "2" after a fixed beginning of a verdict;
            "rationale" lets the model write a reason and a verdict, and checks each reasoning without the image first.
        both_orders: ask with either candidate as response 1, which cancels a liking for the first place.
        reason_tokens: the longest reason with its verdict, in tokens.
        check_tokens: the longest check of a reasoning, in tokens.
        temperature: of the reasons.

    Raises:
        UserError: a setting out of range.
    """

    verdict: Literal["token", "rationale"] = "token"
    both_orders: bool = True
    reason_tokens: int = 128
    check_tokens: int = 64
    temperature: float = 0.6

    def __post_init__(self) -> None:
        if self.verdict not in ("token", "rationale"):
            raise UserError(f'a verdict is "token" or "rationale", not {self.verdict!r}')
        for name in ("reason_tokens", "check_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        Sampling(self.temperature)

    @property
    def orders(self) -> int:
        """How often a pair is judged."""
        return 2 if self.both_orders else 1


@dataclass(frozen=True)
class LogProbability:
    """The candidate with the highest mean log-probability of a token is kept."""


Scorer = Judge | LogProbability


@dataclass(frozen=True)
class Plan:
    """What a strategy comes to: the static part of the compiled search.

    Attributes:
        stages: the tags of the stages in order; none for whole answers.
        candidates: of each stage.
        temperatures: likewise.
        budgets: likewise, the most tokens of a candidate.
        sampling: top_k and top_p; its temperature is the highest of the stages.
        scorer: what chooses among candidates; None keeps the first.

    Raises:
        UserError: a setting out of range.
    """

    stages: tuple[str, ...]
    candidates: tuple[int, ...]
    temperatures: tuple[float, ...]
    budgets: tuple[int, ...]
    sampling: Sampling
    scorer: Scorer | None

    def __post_init__(self) -> None:
        for name, values in (("candidates", self.candidates), ("budget", self.budgets)):
            if min(values) < 1:
                raise UserError(f"{name} must be at least 1, got {min(values)}")
        for temperature in self.temperatures:
            Sampling(temperature)

    @property
    def judge(self) -> Judge | None:
        """The scorer, where it is a judge that has anything to choose between."""
        return self.scorer if isinstance(self.scorer, Judge) and max(self.candidates) > 1 else None


class Strategy(Protocol):
    """What ``Reasoner`` searches by."""

    def plan(self) -> Plan:
        """The strategy as the search takes it."""


def _whole(
    candidates: int, temperature: float, budget: int, top_k: int | None, top_p: float, scorer: Scorer | None
) -> Plan:
    return Plan((), (candidates,), (temperature,), (budget,), Sampling(temperature, top_k, top_p), scorer)


@dataclass(frozen=True)
class Greedy:
    """One answer of the likeliest tokens.

    Attributes:
        budget: the most tokens of an answer.
    """

    budget: int = 2048

    def plan(self) -> Plan:
        return _whole(1, 0.0, self.budget, None, 1.0, None)


@dataclass(frozen=True)
class Sample:
    """One sampled answer; defaults as upstream's.

    Attributes:
        temperature: of the draws.
        budget: the most tokens of an answer.
        top_k: as for ``Sampling``.
        top_p: likewise.
    """

    temperature: float = 0.6
    budget: int = 2048
    top_k: int | None = 50
    top_p: float = 0.9

    def plan(self) -> Plan:
        return _whole(1, self.temperature, self.budget, self.top_k, self.top_p, None)


@dataclass(frozen=True)
class MajorityVote:
    """Sampled answers, of which one with the commonest conclusion is kept: the likeliest of those, per token.

    Conclusions are compared without case, punctuation at their ends, and spacing; of two that are equally
    common the one with the likelier answer counts (Wang et al., arXiv 2203.11171).

    Attributes:
        candidates: how many answers.
        temperature, budget, top_k, top_p: as for ``Sample``.
    """

    candidates: int = 8
    temperature: float = 0.6
    budget: int = 2048
    top_k: int | None = 50
    top_p: float = 0.9

    def plan(self) -> Plan:
        return _whole(self.candidates, self.temperature, self.budget, self.top_k, self.top_p, None)


@dataclass(frozen=True)
class BestOfN:
    """Sampled answers, of which the scorer chooses one.

    Attributes:
        candidates: how many answers.
        scorer: what chooses.
        temperature, budget, top_k, top_p: as for ``Sample``.
    """

    candidates: int = 8
    scorer: Scorer = Judge()
    temperature: float = 0.6
    budget: int = 2048
    top_k: int | None = 50
    top_p: float = 0.9

    def plan(self) -> Plan:
        return _whole(self.candidates, self.temperature, self.budget, self.top_k, self.top_p, self.scorer)


@dataclass(frozen=True)
class StageBeam:
    """Stage-level beam search: candidates for each stage, of which the scorer chooses the one to go on from.

    A value for all stages, or a tuple of one for each, in order.

    Attributes:
        candidates: of each stage.
        scorer: what chooses.
        temperature: of each stage's draws.
        budget: the most tokens of a candidate of each stage.
        top_k: as for ``Sampling``.
        top_p: likewise.
        stages: their tags in order.
    """

    candidates: int | tuple[int, ...] = 4
    scorer: Scorer = Judge()
    temperature: float | tuple[float, ...] = 0.6
    budget: int | tuple[int, ...] = 1024
    top_k: int | None = 50
    top_p: float = 0.9
    stages: tuple[str, ...] = STAGES

    def plan(self) -> Plan:
        """The strategy as the search takes it.

        Raises:
            UserError: no stages, one twice, or not one value for each.
        """
        if not self.stages or not all(self.stages) or len(set(self.stages)) < len(self.stages):
            raise UserError(f"stages must be different tags, at least one; got {self.stages}")
        temperatures = self._each("temperature", self.temperature)
        return Plan(
            stages=tuple(self.stages),
            candidates=self._each("candidates", self.candidates),
            temperatures=temperatures,
            budgets=self._each("budget", self.budget),
            sampling=Sampling(max(temperatures), self.top_k, self.top_p),
            scorer=self.scorer,
        )

    def _each(self, name: str, value: T | tuple[T, ...]) -> tuple[T, ...]:
        values = value if isinstance(value, tuple) else (value,) * len(self.stages)
        if len(values) != len(self.stages):
            raise UserError(f"{name} has {len(values)} values for {len(self.stages)} stages: give one, or one for each")
        return values
