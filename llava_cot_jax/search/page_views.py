"""Values that a page shows of a search: its stages, candidates, matches, verdicts and costs."""

import math
from typing import Any

from llava_cot_jax.search import wording
from llava_cot_jax.search.answer_change import answer_change, first_conclusion
from llava_cot_jax.search.page_drawing import tree_view
from llava_cot_jax.search.trace import CandidateTrace, MatchTrace, StageTrace, Trace, VerdictTrace
from llava_cot_jax.stage_format import StageFormat

LONG_TEXT_CHARACTERS = 500
"""Length of a text, in characters, above which it scrolls unless it is the winner's."""


def search_view(trace: Trace) -> dict[str, Any]:
    """Return what a page shows of a search."""
    chooses = any(len(stage.candidates) > 1 for stage in trace.stages)
    change = answer_change(trace) if chooses else ""
    return {
        "change": change,
        "first_conclusion": first_conclusion(trace) if change == "changed" else "",
        "stages": [_stage_view(place, trace) for place in range(len(trace.stages))],
        "tree": tree_view(trace) if chooses else None,
        "seed": trace.seed,
        "strategy": trace.strategy,
        "seconds": trace.seconds,
        "costs": _costs_view(trace),
        "tokens": sum(trace.tokens.values()),
        "flops": sum(trace.flops.values()),
        "total_seconds": sum(trace.seconds.values()),
    }


def _stage_view(place: int, trace: Trace) -> dict[str, Any]:
    stage = trace.stages[place]
    standings = wording.standings(trace, place) if len(stage.candidates) > 1 else [""]
    checks = {check.first: _verdict_view(check) for check in stage.checks}
    candidates = [
        _candidate_view(i, one, stage, standings[i], checks.get(i), trace.format)
        for i, one in enumerate(stage.candidates)
    ]
    rounds = wording.rounds_of(stage)
    return {
        "title": wording.stage_title(stage),
        "chosen": wording.how_chosen(stage, trace.strategy),
        "candidates": candidates,
        "winner": candidates[stage.winner],
        "rounds": [
            {"name": _round_name(i, len(rounds)), "matches": [_match_view(m) for m in matches], "through": through}
            for i, (matches, through) in enumerate(rounds)
        ],
    }


def _candidate_view(
    i: int,
    candidate: CandidateTrace,
    stage: StageTrace,
    standing: str,
    check: dict[str, Any] | None,
    format: StageFormat,
) -> dict[str, Any]:
    return {
        "number": i + 1,
        "standing": standing,
        "won": standing == "winner",
        "origin": wording.origin(candidate),
        "parts": wording.split_tags(candidate.text, format),
        "long": len(candidate.text) > LONG_TEXT_CHARACTERS,
        "added": candidate.added,
        "mean": _minus(wording.log_prob(candidate.mean_log_prob)),
        "score": wording.score(candidate),
        "score_percent": percent(candidate.score or 0.0) if wording.score(candidate) else "",
        "own_score": wording.own_score(candidate, stage),
        "same_as": next((j + 1 for j in range(i) if stage.candidates[j].text == candidate.text), None),
        "percent": percent(math.exp(min(candidate.mean_log_prob, 0.0))),
        "tokens": wording.counted(candidate.tokens, "token"),
        "ended": wording.ENDINGS.get(candidate.ended, candidate.ended),
        "cut": candidate.ended == "max_new_tokens",
        "check": check,
    }


def _match_view(match: MatchTrace) -> dict[str, Any]:
    return {
        "first": match.first + 1,
        "second": match.second + 1,
        "winner": match.winner + 1,
        "side": "right" if match.margin > 0 else "left",
        "length": percent(abs(match.margin)) / 2,
        "decided": wording.DECIDED_BY.get(match.decision, match.decision),
        "result": _minus(wording.match_result(match).replace("->", "\N{RIGHTWARDS ARROW}")),
        "verdicts": [_verdict_view(verdict) for verdict in match.verdicts],
    }


def _verdict_view(verdict: VerdictTrace) -> dict[str, Any]:
    return {
        "line": _minus(wording.verdict_result(verdict)),
        "neither": wording.neither_share(verdict),
        "weak": verdict.other_probability is not None
        and verdict.other_probability > 0.5,  # mostly on neither candidate
        "reason": verdict.reason,
    }


def _round_name(i: int, count: int) -> str:
    return "Final" if i == count - 1 else f"Round {i + 1}"


def _costs_view(trace: Trace) -> list[dict[str, Any]]:
    """Return tokens and FLOPs of each part of a search, and its share of the FLOPs in percent."""
    total = max(sum(trace.flops.values()), 1)
    return [
        {
            "part": part,
            "tokens": trace.tokens.get(part),
            "flops": trace.flops.get(part, 0),
            "percent": percent(trace.flops.get(part, 0) / total),
        }
        for part in dict.fromkeys((*trace.flops, *trace.tokens))
        if trace.flops.get(part) or trace.tokens.get(part)
    ]


def _minus(text: str) -> str:
    """Return ``text`` with minus signs in place of hyphens, as they are as wide as digits."""
    return text.replace("-", "\N{MINUS SIGN}")


def percent(fraction: float) -> float:
    """Return a fraction as a percentage from 0 to 100, and 0 for one that is not finite."""
    return round(100 * min(max(fraction, 0.0), 1.0), 1) if math.isfinite(fraction) else 0.0
