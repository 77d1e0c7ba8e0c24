"""Lines of a comparison's file: what each method reached, each pair of methods, and accuracies at equal FLOPs."""

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, pairwise
from typing import Any

from llava_cot_jax.evaluation.paired import exact_test, holm_adjusted, paired_difference, questions_needed
from llava_cot_jax.evaluation.results import cluster_of, summarize

Line = dict[str, Any]
"""Line of the file, as JSON has it; its ``kind`` says which."""


@dataclass(frozen=True)
class MethodResult:
    """Scored answers of a method to questions that all methods have answered.

    Attributes:
        name: Name of the method.
        family: Name that methods share which differ in their number of candidates alone.
        rows: Scored row of each question, in one order for all methods.
        about: What else is told of the method, by name.
    """

    name: str
    family: str
    rows: Sequence[Mapping[str, Any]]
    about: Mapping[str, Any]

    @property
    def right(self) -> list[bool]:
        """Whether each question is answered right."""
        return [row["right"] for row in self.rows]

    @property
    def clusters(self) -> list[Hashable]:
        """Group of each question: its images."""
        return [cluster_of(row) for row in self.rows]

    @property
    def flops(self) -> float | None:
        """FLOPs of a question, on average over those that have an answer; None where none has one."""
        answered = [sum(row["flops"].values()) for row in self.rows if "error" not in row]
        return sum(answered) / len(answered) if answered else None


def comparison_lines(results: Sequence[MethodResult]) -> list[Line]:
    """Return the lines of methods, pairs and accuracies at equal FLOPs."""
    return [*map(_method_line, results), *pair_lines(results), *equal_flops_lines(results)]


def _method_line(result: MethodResult) -> Line:
    summary = summarize(result.rows)
    return {
        "kind": "method",
        "method": result.name,
        "family": result.family,
        **result.about,
        **summary["accuracy"]["all"],
        "tokens_per_question": summary["tokens_per_question"],
        "flops_per_question": summary["flops_per_question"],
    }


def pair_lines(results: Sequence[MethodResult]) -> list[Line]:
    """Return a line of each pair of methods: their difference, its test, and what it would take to show it."""
    lines = []
    for first, second in combinations(results, 2):
        pairs = list(zip(first.right, second.right, strict=True))
        only_first, only_second = pairs.count((True, False)), pairs.count((False, True))
        lines.append(
            {
                "kind": "pair",
                "first": first.name,
                "second": second.name,
                **asdict(paired_difference(first.right, second.right, first.clusters)),
                "only_first": only_first,
                "only_second": only_second,
                "p_value": exact_test(only_first, only_second),
                "questions_needed": questions_needed(only_first, only_second, len(pairs)),
            }
        )
    adjusted = holm_adjusted([line["p_value"] for line in lines])
    return [line | {"holm_p_value": p, "pairs": len(lines)} for line, p in zip(lines, adjusted, strict=True)]


def equal_flops_lines(results: Sequence[MethodResult]) -> list[Line]:
    """Return a line of each method and each other family of two methods or more, at the method's FLOPs.

    The accuracy of a family is interpolated between the two of its methods whose FLOPs are next, linearly in the
    logarithm of FLOPs. So is the score of each question, from which the standard error of the difference is estimated
    as of any pair. Nothing is said of FLOPs below or above those of all methods of the family.
    """
    families: dict[str, list[MethodResult]] = {}
    for result in results:
        if result.flops is not None:
            families.setdefault(result.family, []).append(result)
    return [
        _equal_flops_line(result, family, sorted(members, key=lambda each: each.flops or 0.0))
        for result in results
        for family, members in families.items()
        if result.flops is not None and family != result.family and len(members) > 1
    ]


def _equal_flops_line(result: MethodResult, family: str, members: Sequence[MethodResult]) -> Line:
    line: Line = {"kind": "equal_flops", "method": result.name, "family": family, "flops": result.flops}
    scores = _interpolated(result.flops or 0.0, members)
    if scores is None:
        none = ("between", "accuracy", "difference", "standard_error", "interval")
        return {**line, **dict.fromkeys(none)}
    between, share = scores
    pairs = zip(*(member.right for member in between), strict=True)
    family_scores = [(1 - share) * below + share * above for below, above in pairs]
    found = paired_difference([float(x) for x in result.right], family_scores, result.clusters)
    return {
        **line,
        "between": [member.name for member in between],
        "accuracy": math.fsum(family_scores) / len(family_scores),
        "difference": found.difference,
        "standard_error": found.standard_error,
        "interval": found.interval,
    }


def _interpolated(
    flops: float, members: Sequence[MethodResult]
) -> tuple[tuple[MethodResult, MethodResult], float] | None:
    """Return the two methods of a family between which FLOPs lie, and how far they are from the first to the second."""
    for below, above in pairwise(members):
        low, high = below.flops or 0.0, above.flops or 0.0
        if low <= flops <= high:
            share = math.log(flops / low) / math.log(high / low) if high > low else 0.0
            return (below, above), share
    return None


def lines_of(lines: Sequence[Line], kind: str) -> Iterator[Line]:
    """Yield the lines of one kind."""
    return (line for line in lines if line["kind"] == kind)


def what_was_asked(about: Line) -> str:
    """Return the questions, the checkpoint and the seed of a comparison in words, from its line of the kind about."""
    run, count = about["run"], about["questions"]
    return f"{count:,} questions of {about['benchmark']}: checkpoint {run['checkpoint']}, seed {run['seed']}"
