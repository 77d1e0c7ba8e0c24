"""Methods that are compared, by their names, and the runs that answer for several of them."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from jsonargparse import Namespace

from llava_cot_jax.checks import shown
from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.settings import Sampling
from llava_cot_jax.search.options import JUDGES, SEARCH_OPTIONS, STRATEGIES, strategy_or_sampling
from llava_cot_jax.search.scorers import Judge, LogProbability, Scorer, Verifier
from llava_cot_jax.search.strategies import BestOfN, MajorityVote, Sample, Strategy, WeightedVote

_SHARED = {"judge": "scorer"}
"""Names of settings of strategies, where those of their options differ."""

ORACLE = "oracle"
"""Scorer of ``best_of_n`` that knows the right answer, which separates what the candidates hold from who chooses."""

_NESTED = (Sample, MajorityVote, WeightedVote, BestOfN)
"""Strategies of whole answers, of which fewer are the first ones of more."""


@dataclass(frozen=True)
class Method:
    """Way to answer that is compared with others.

    Attributes:
        name: Name with the number of candidates and the scorer, where the method has them.
        family: Name without the number of candidates, which methods that differ in it alone share.
        num_candidates: Number of candidates; None where a method takes none, or one for each stage.
        strategy: Strategy to search with.
        is_oracle: Whether a right candidate is chosen where there is one, whatever the strategy's scorer says.
    """

    name: str
    family: str
    num_candidates: int | None
    strategy: Strategy
    is_oracle: bool = False

    @classmethod
    def read(cls, text: str, options: Any) -> Self:
        """Return the method that ``NAME[:N][/SCORER]`` stands for.

        Args:
            text: Name of a strategy, optionally with the number of candidates and the scorer.
            options: Options of the command, of which those of the search count where the method has such a setting.

        Raises:
            UserError: There is no such method, or a setting cannot be used.
        """
        named, slash, judge = text.strip().partition("/")
        search, colon, count = named.partition(":")
        if search not in STRATEGIES:
            nearest = difflib.get_close_matches(search, STRATEGIES, 1, 0)[0]
            raise UserError(
                f"--compare has {shown(text)}, but there is no such method (did you mean {nearest}?): give "
                f"{', '.join(STRATEGIES)}, each as NAME, NAME:N or NAME:N/SCORER"
            )
        taken = {field.name for field in dataclasses.fields(STRATEGIES[search])}
        given = {name: options[name] for name in SEARCH_OPTIONS if _SHARED.get(name, name) in taken}
        try:
            if colon:
                given["num_candidates"] = _number(search, count, "num_candidates" in taken)
            if is_oracle := judge == ORACLE and STRATEGIES[search] is BestOfN:
                given["judge"] = "log_probability"
            elif slash:
                given["judge"] = _judge(search, judge, "scorer" in taken)
            elif STRATEGIES[search] is WeightedVote and options.judge is not None:
                given["judge"] = None  # it takes one scorer alone, which --judge does not name for it
            strategy = strategy_or_sampling(
                Namespace({**dict.fromkeys(SEARCH_OPTIONS), **given, "search": search, "format": options.format})
            )
        except UserError as fault:
            raise UserError(f"--compare has {text.strip()}: {fault}") from None
        assert not isinstance(strategy, Sampling)  # which is what stands for no search
        return cls(*_names(search, strategy, ORACLE if is_oracle else None), strategy, is_oracle)

    @property
    def is_nested(self) -> bool:
        """Whether the method chooses among whole answers without a judge, so that it can be derived from more."""
        if not isinstance(self.strategy, _NESTED) or self.strategy.to_spec().stages:
            return False
        return not isinstance(self.strategy, BestOfN) or isinstance(self.strategy.scorer, Verifier | LogProbability)

    @property
    def has_verifier(self) -> bool:
        """Whether a verifier scores the candidates."""
        return self.strategy.to_spec().has_verifier

    @property
    def folder(self) -> str:
        """Name of the folder of a run of this method."""
        return self.name.replace(":", "-").replace("/", "-")


def _number(search: str, count: str, is_taken: bool) -> int:
    """Return the number of candidates that a method names."""
    if not is_taken:
        raise UserError(f"{search} takes no number of candidates")
    if not count.isdecimal():
        raise UserError(f"the number of candidates is {shown(count)}; it must be a whole number")
    return int(count)


def _judge(search: str, judge: str, is_taken: bool) -> str:
    """Return the name of the scorer that a method names."""
    if not is_taken:
        raise UserError(f"{search} takes no scorer")
    if judge not in JUDGES:
        more = f", or {ORACLE} of best_of_n" if judge == ORACLE else ""
        raise UserError(f"the scorer is {shown(judge)}; it must be one of {', '.join(JUDGES)}{more}")
    return judge


def _names(search: str, strategy: Any, scorer_name: str | None) -> tuple[str, str, int | None]:
    """Return the name of a method, that of its family, and its number of candidates.

    Args:
        search: Name of the strategy.
        strategy: The strategy.
        scorer_name: Name of its scorer, where that is not its own.
    """
    count = getattr(strategy, "num_candidates", None)
    scorer = None if isinstance(strategy, WeightedVote) else getattr(strategy, "scorer", None)
    ending = "" if scorer is None else f"/{scorer_name or _scorer_name(scorer)}"
    told = "" if count is None else ":" + "x".join(map(str, count if isinstance(count, tuple) else (count,)))
    return f"{search}{told}{ending}", f"{search}{ending}", count if isinstance(count, int) else None


def _scorer_name(scorer: Scorer) -> str:
    """Return the name of a scorer for ``--judge``."""
    if isinstance(scorer, Judge):
        return scorer.verdict
    return "verifier" if isinstance(scorer, Verifier) else "log_probability"


def read_methods(options: Any) -> list[Method]:
    """Return the methods that ``--compare`` names.

    Raises:
        UserError: There are fewer than two, one cannot be used or is given twice, or an option is for none of them.
    """
    methods: dict[str, Method] = {}
    for text in options.compare.split(","):
        method = Method.read(text, options)
        if method.name in methods:
            raise UserError(f"--compare has {method.name} twice")
        methods[method.name] = method
    if len(methods) < 2:
        raise UserError(f"--compare has one method, {options.compare}: give two or more, with commas between them")
    for name in SEARCH_OPTIONS:
        setting = _SHARED.get(name, name)
        if options[name] is not None and not any(hasattr(each.strategy, setting) for each in methods.values()):
            raise UserError(f"--{name} has no meaning for any method of --compare {options.compare}")
    return list(methods.values())


def plan_runs(methods: Sequence[Method], options: Any) -> dict[str, Method]:
    """Return the method that is run for each method, by the latter's name.

    A method that can be derived from more candidates is: all such methods share one run, of the largest number of
    candidates among them, with the scores of the verifier where one of them needs these.
    """
    nested = [method for method in methods if method.is_nested]
    runs = {method.name: method for method in methods}
    if nested:
        largest = max(method.num_candidates or 1 for method in nested)
        search = "sample" if largest == 1 else f"majority_vote:{largest}"
        if any(method.has_verifier for method in nested):
            search = f"best_of_n:{largest}/verifier"
        runs |= dict.fromkeys([method.name for method in nested], Method.read(search, options))
    return runs
