"""Options by which a command is told how to search, and the strategy that they stand for."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.settings import Sampling
from llava_cot_jax.search.retracing import Retracing, read_threshold
from llava_cot_jax.search.scorers import Judge, LogProbability, Scorer, Verifier
from llava_cot_jax.search.sentence_beam import SentenceBeam
from llava_cot_jax.search.strategies import BestOfN, Greedy, MajorityVote, Sample, StageBeam, Strategy, WeightedVote
from llava_cot_jax.stage_format import LLAVA_COT, StageFormat

STRATEGIES: dict[str, type[Any]] = {
    "greedy": Greedy,
    "sample": Sample,
    "majority_vote": MajorityVote,
    "weighted_vote": WeightedVote,
    "best_of_n": BestOfN,
    "sentence_beam": SentenceBeam,
    "stage_beam": StageBeam,
    "retracing": Retracing,
}
"""Strategies by their names for ``--search``."""

JUDGES = ("token", "rationale", "verifier", "log_probability")
"""Scorers by their names for ``--judge``."""

_NEED_SEARCH = ("num_candidates", "judge", "max_sentences", "max_sentence_tokens", "threshold", "max_rounds")
"""Options that have no meaning without ``--search``."""

_SAMPLING = ("temperature", "top_k", "top_p")
"""Options of sampling."""

_LENGTH = "max_new_tokens"
"""Option of the longest answer, which a command without a search reads itself."""

SEARCH_OPTIONS = (*_NEED_SEARCH, *_SAMPLING, _LENGTH)
"""Options that are settings of strategies."""


def add_arguments(parser: Any) -> None:
    """Add the options that ``strategy_or_sampling`` reads to a parser of ``jsonargparse``."""
    add = parser.add_argument
    add("--search", choices=list(STRATEGIES), help="Strategy to search with. stage_beam is LLaVA-CoT's method.")
    add(
        "--format",
        type=str,
        default=LLAVA_COT.name,
        help="Format of the stages of an answer: a name (llava_cot, which is Sherlock's too, llava_cot_sentences, "
        "llamav_o1 or mulberry), or a YAML file like those in llava_cot_jax/stage_formats.",
    )
    add(
        "--num_candidates",
        type=int | tuple[int, ...] | None,
        default=None,
        help="Number of candidates of a search. With stage_beam, --num_candidates, --temperature and --max_new_tokens "
        "take one value, or a list with one value for each stage. By default, 4 with stage_beam, 2 with "
        "sentence_beam, and otherwise 8. retracing takes none.",
    )
    add(
        "--judge",
        choices=list(JUDGES),
        help="Scorer that chooses among candidates: the model as judge of pairs, by the probability of its verdict "
        "(token) or by a written reason (rationale); the model as verifier, by the probability of yes when it is asked "
        "whether a candidate is right (verifier); or the candidates' mean log-probability. By default, verifier with "
        "weighted_vote, which takes no other, and otherwise token. retracing has the verifier, and takes none.",
    )
    add(
        "--max_new_tokens",
        type=int | tuple[int, ...] | None,
        default=None,
        help="Largest number of tokens of an answer; with stage_beam or retracing, of a stage. By default, 2048 for an "
        "answer and 1024 for a stage, or what the model's context leaves if that is less; generate takes "
        "max_new_tokens of the checkpoint's generation_config.json in their place if it has one.",
    )
    add(
        "--max_sentences",
        type=int | None,
        default=None,
        help="Largest number of sentences of an answer of sentence_beam. By default, 64.",
    )
    add(
        "--max_sentence_tokens",
        type=int | None,
        default=None,
        help="Largest number of tokens of a sentence of sentence_beam. A longer one is cut, and the next one goes on. "
        "By default, 128.",
    )
    add(
        "--threshold",
        type=str | None,
        default=None,
        help="Score from 0 to 1 above which the second-best reasoning of retracing must be, so that no more captions "
        "are written; or the JSON file that holds it, which --threshold_to has written. By default, 0.5.",
    )
    add(
        "--max_rounds",
        type=int | None,
        default=None,
        help="Largest number of rounds of captions and reasonings of retracing. By default, 5.",
    )
    add(
        "--temperature",
        type=float | tuple[float, ...] | None,
        default=None,
        help="Temperature of sampling; 0 takes the likeliest token. By default, 0.6 in a search, as in LLaVA-CoT, "
        "and 0 without one.",
    )
    add(
        "--top_k",
        type=int | None,
        default=None,
        help="Number of likeliest tokens that are sampled from. By default, 50 in a search, and all without one.",
    )
    add(
        "--top_p",
        type=float | None,
        default=None,
        help="Probability up to which the likeliest tokens are sampled from. By default, 0.9 in a search, and 1 "
        "without one.",
    )


def strategy_or_sampling(options: Any) -> Strategy | Sampling:
    """Return the strategy that the options stand for, or, without ``--search``, how tokens are sampled.

    Raises:
        UserError: An option is out of range, or has no meaning with the others.
    """
    given = {name: options[name] for name in SEARCH_OPTIONS if options[name] is not None}
    format = StageFormat.load(options.format)
    if options.search is None:
        return _sampling(given, format)
    strategy_type = STRATEGIES[options.search]
    accepted = {field.name for field in dataclasses.fields(strategy_type)}
    settings: dict[str, Any] = {"format": format}
    for option, value in given.items():
        name = "scorer" if option == "judge" else option
        if name not in accepted:
            raise UserError(f"--{option} has no meaning for --search {options.search}")
        if isinstance(value, tuple) and strategy_type is not StageBeam:
            raise UserError(f"--{option} takes one value, except for --search stage_beam")
        settings[name] = _READ[option](value) if option in _READ else value
    return strategy_type(**settings)


def check_verifier_adapter(options: Any, searches: Iterable[Strategy | Sampling]) -> None:
    """Check that one of the searches of a command asks the verifier, if the options give it an adapter.

    Raises:
        UserError: None does, so that the adapter would do nothing.
    """
    if options.verifier_adapter is None:
        return
    if not any(not isinstance(search, Sampling) and search.to_spec().has_verifier for search in searches):
        raise UserError(
            "--verifier_adapter is for the verifier, which no search here asks: give --judge verifier with a --search "
            "that takes it, such as stage_beam, or leave out the adapter"
        )


def strategy_of(method: Strategy | Sampling, max_new_tokens: int | None, format: StageFormat) -> Strategy:
    """Return the search, or, without one, the strategy that samples as is asked for.

    Args:
        method: What ``strategy_or_sampling`` returned.
        max_new_tokens: Largest number of tokens of an answer.
        format: Format of the stages.
    """
    if not isinstance(method, Sampling):
        return method
    if method.temperature == 0:
        return Greedy(max_new_tokens, format=format)
    return Sample(method.temperature, max_new_tokens, method.top_k, method.top_p, format=format)


def _sampling(given: dict[str, Any], format: StageFormat) -> Sampling:
    """Return how tokens are sampled without a search, from the options that are given."""
    if format.has_turns:
        raise UserError(f"--format {format.name} asks for its stages in several turns: give --search too, as in greedy")
    for name in _NEED_SEARCH:
        if name in given:
            raise UserError(f"--{name} needs a search: give --search too ({', '.join(STRATEGIES)})")
    for name, value in given.items():
        if isinstance(value, tuple):
            raise UserError(f"--{name} takes one value for each stage only in a search: give --search stage_beam too")
    return Sampling(**{name: given[name] for name in _SAMPLING if name in given})


def _scorer(judge: Any) -> Scorer:
    """Return the scorer that ``--judge`` names."""
    if judge == "verifier":
        return Verifier()
    return LogProbability() if judge == "log_probability" else Judge(judge)


_READ = {"judge": _scorer, "threshold": read_threshold}
"""Functions that make settings of the values of options."""
