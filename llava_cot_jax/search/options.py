"""The arguments by which a command is told how to search, and the strategy that they come to."""

import dataclasses
from typing import Any

from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.settings import Sampling
from llava_cot_jax.search.strategies import (
    BestOfN,
    Greedy,
    Judge,
    LogProbability,
    MajorityVote,
    Sample,
    StageBeam,
    Strategy,
)

STRATEGIES: dict[str, type[Any]] = {
    "greedy": Greedy,
    "sample": Sample,
    "majority_vote": MajorityVote,
    "best_of_n": BestOfN,
    "stage_beam": StageBeam,
}

SEARCHING = ("candidates", "budget", "judge")
"""Those that are of a search alone."""

_NAMES = (*SEARCHING, "temperature", "top_k", "top_p")


def add_arguments(parser: Any) -> None:
    """Give a parser of ``jsonargparse`` the arguments that ``chosen`` reads."""
    add = parser.add_argument
    add(
        "--temperature",
        type=float | tuple[float, ...] | None,
        default=None,
        help="0 takes the likeliest token; default: 0, and in a search 0.6, as LLaVA-CoT samples",
    )
    add("--top_k", type=int | None, default=None, help="sample among so many of the likeliest tokens; in a search 50")
    add(
        "--top_p",
        type=float | None,
        default=None,
        help="sample among the likeliest of this probability; in a search 0.9",
    )
    add("--search", choices=list(STRATEGIES), help="search for the answer; stage_beam is LLaVA-CoT's method")
    add(
        "--candidates",
        type=int | tuple[int, ...] | None,
        default=None,
        help="of a search; like --temperature and --budget, of stage_beam one number or a list of one for each stage",
    )
    add(
        "--budget",
        type=int | tuple[int, ...] | None,
        default=None,
        help="of a search: the longest answer in tokens, or the longest stage; default: max_new_tokens of the "
        "checkpoint's generation_config.json where it has one, else 2048 for an answer and 1024 for a stage",
    )
    add(
        "--judge",
        choices=["token", "rationale", "log_probability"],
        help="what chooses among candidates: the model by the probability of its verdict (default) or by a written "
        "reason, or the candidates' own mean log-probability",
    )


def chosen(options: Any) -> Strategy | Sampling:
    """What ``--search`` and the arguments that go with it come to; without it, how tokens are drawn.

    Raises:
        UserError: an argument out of range, or one that has no meaning with the others.
    """
    given = {name: options[name] for name in _NAMES if options[name] is not None}
    if options.search is None:
        if searching := given.keys() & set(SEARCHING):
            raise UserError(f"--{min(searching)} is of a search: give --search too ({', '.join(STRATEGIES)})")
        if isinstance(options.temperature, tuple):
            raise UserError("several temperatures are those of stages: give --search stage_beam too")
        return Sampling(**given)
    made = STRATEGIES[options.search]
    if judge := given.pop("judge", None):
        given["scorer"] = LogProbability() if judge == "log_probability" else Judge(judge)
    for name, value in given.items():
        if name not in {field.name for field in dataclasses.fields(made)}:
            spoken = "judge" if name == "scorer" else name
            raise UserError(f"--{spoken} has no meaning for --search {options.search}")
        if isinstance(value, tuple) and made is not StageBeam:
            raise UserError(f"--{name} takes one value, except for --search stage_beam")
    strategy: Strategy = made(**given)
    strategy.to_spec()  # refuses what cannot be used
    return strategy
