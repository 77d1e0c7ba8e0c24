"""Wording of a trace, shared by the text and the page that show it.

Texts count candidates from 1, where a trace counts from 0.
"""

import re

from llava_cot_jax.processing.probe import WHOLE_ANSWER
from llava_cot_jax.search.trace import CandidateTrace, MatchTrace, StageTrace, Trace, VerdictTrace
from llava_cot_jax.stage_format import StageFormat
from llava_cot_jax.stages import body_of, find_conclusion, normalize_answer

ENDINGS = {
    "tag": "closed its tag",
    "sentence": "ended its sentence",
    "heading": "reached the next heading",
    "turn": "ended its turn",
    "eos": "ended by the model",
    "max_new_tokens": "cut off at the token limit",
}
"""Text for how a candidate ended, by ``CandidateTrace.ended``."""

DECIDED_BY = {
    "judged": "decided by the judge",
    "checked": "decided by the checks",
    "scored": "decided by log-probability",
}
"""Text for what decided a match, by ``MatchTrace.decision``."""

_HIDDEN = [*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000)]
_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_VISIBLE = dict.fromkeys(_HIDDEN, 0xFFFD) | _PICTURES

_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def printable(text: str) -> str:
    """Return ``text`` with a visible sign for each character that controls a terminal or the direction of writing."""
    return text.translate(_VISIBLE)


def split_tags(text: str, format: StageFormat) -> list[tuple[str, bool]]:
    """Split a candidate's text into pieces, each with whether it opens or closes a stage."""
    marks = {printable(mark.strip()) for stage in format.stages for mark in (stage.opening, stage.closing) if mark}
    longest_first = sorted(marks, key=len, reverse=True)
    text = printable(text).strip()
    parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text) if marks else [text]
    return [(part, i % 2 == 1) for i, part in enumerate(parts) if part]


def conclusion_of(trace: Trace) -> str:
    """Return the answer that a search gives: the body of its conclusion."""
    if trace.whole_text is not None:
        return find_conclusion(trace.whole_text, trace.format)
    won = trace.path[trace.format.conclusion]
    return body_of(won.text + won.added, trace.format[trace.format.conclusion])


def agrees(conclusion: str, right_answer: str) -> bool:
    """Whether two answers are the same apart from case, spacing, and punctuation at their ends."""
    return normalize_answer(conclusion) == normalize_answer(right_answer)


def stage_title(stage: StageTrace) -> str:
    """Return the name of a stage for a heading, with its round, if it has one."""
    return name_title(stage.stage) + (f", round {stage.round}" if stage.round else "")


def name_title(stage: str) -> str:
    """Return the name of a stage for a heading."""
    return "Whole answers" if stage == WHOLE_ANSWER else stage.capitalize()


def how_ended(candidate: CandidateTrace) -> str:
    """Return how a candidate ended, and the text that was added to close it."""
    ended = ENDINGS.get(candidate.ended, candidate.ended)
    return f"{ended}, {candidate.added.strip()} added" if candidate.added else ended


def length_and_end(candidate: CandidateTrace) -> str:
    """Return the number of tokens of a candidate, and how it ended, if it has."""
    return ", ".join(filter(None, (counted(candidate.tokens, "token"), how_ended(candidate))))


def candidate_facts(candidate: CandidateTrace, stage: StageTrace) -> str:
    """Return what there is to say of a candidate besides its text: its origin, scores, length and end."""
    facts = (
        origin(candidate),
        score(candidate),
        own_score(candidate, stage),
        f"mean log-probability {log_prob(candidate.mean_log_prob)} a token",
        length_and_end(candidate),
    )
    return ", ".join(filter(None, facts))


def how_chosen(stage: StageTrace, strategy: str) -> str:
    """Return how the winner of a stage was chosen.

    Args:
        stage: Trace of the stage.
        strategy: Settings of the search, as in ``Trace.strategy``.
    """
    winner, count = stage.winner + 1, len(stage.candidates)
    if count == 1:
        return "one candidate"
    if stage.matches:
        return f"{count} candidates, {winner} wins its matches"
    if stage.own_scorer:
        took = f"which took {stage.scorer_seconds:.1f} s"
        return f"{count} candidates, {winner} has the highest score of {stage.own_scorer}, {took}"
    if strategy.startswith("MajorityVote("):
        return f"{count} candidates, {winner} has the most common conclusion"
    if strategy.startswith("WeightedVote("):
        return f"{count} candidates, {winner} has the conclusion with the highest sum of scores"
    scores = [candidate.score for candidate in stage.candidates if candidate.score is not None]
    if scores and stage.candidates[stage.winner].score != max(scores):
        return f"{count} candidates, {winner} leads to the answer"  # of a round whose best one does not
    if scores:
        return f"{count} candidates, {winner} has the highest score"
    if stage.candidates[stage.winner].mean_log_prob == max(c.mean_log_prob for c in stage.candidates):
        return f"{count} candidates, {winner} has the highest mean log-probability"
    return f"{count} candidates, {winner} is kept"


def standings(trace: Trace, place: int) -> list[str]:
    """Return how each candidate of a stage stands, as one word.

    It is "winner" for the one that led to the answer, "continued" for another that was continued, and else empty.

    Args:
        trace: Trace of the search.
        place: Place of the stage in the trace.
    """
    later = range(place + 1, len(trace.stages))
    continued = {trace.parent_of(i, j) for i in later for j in range(len(trace.stages[i].candidates))}
    told = ["continued" if (place, j) in continued else "" for j in range(len(trace.stages[place].candidates))]
    return ["winner" if (place, j) in trace.winners else each for j, each in enumerate(told)]


def own_score(candidate: CandidateTrace, stage: StageTrace) -> str:
    """Return the score of a candidate by a function of the user's own, or nothing where there is none."""
    if not stage.own_scorer:
        return ""
    return "no score that is a number, so it loses" if candidate.score is None else f"score {candidate.score:.6g}"


def match_result(match: MatchTrace) -> str:
    """Return a match in one line, such as ``1 against 3 -> 3 wins, margin -0.21``."""
    pair = f"{match.first + 1} against {match.second + 1}"
    return f"{pair} -> {match.winner + 1} wins, margin {match.margin:+.2f}"


def verdict_result(verdict: VerdictTrace) -> str:
    """Return a verdict in one line: the candidates in the order shown, the judge's decision, and its vote."""
    if verdict.second is None:
        said = ("correct" if verdict.vote > 0 else "incorrect") if verdict.readable and verdict.vote else "unreadable"
        shown = f"check of {verdict.first + 1}"
    else:
        shown = f"{verdict.first + 1} shown before {verdict.second + 1}"
        said = f"for {(verdict.first if verdict.vote > 0 else verdict.second) + 1}" if verdict.vote else "undecided"
        said = said if verdict.readable else "unreadable"
    return f"{shown}: {said}, vote {verdict.vote:+.2f}"


def origin(candidate: CandidateTrace) -> str:
    """Return what a candidate of a retracing search continues; nothing elsewhere."""
    if candidate.parent is None:
        return ""
    of_round = f" of round {candidate.parent_round}" if candidate.parent_round else ""
    return f"after candidate {candidate.parent + 1}{of_round}"


def score(candidate: CandidateTrace) -> str:
    """Return the verifier's score of a candidate with the probability of anything but its two answers.

    It is nothing for a candidate without a score.
    """
    if candidate.score is None or candidate.other_probability is None:
        return ""
    return f"score {candidate.score:.3f}, {candidate.other_probability:.1%} on neither yes nor no"


def neither_share(verdict: VerdictTrace) -> str:
    """Return the probability of anything but the two verdicts, or nothing for a written verdict."""
    return "" if verdict.other_probability is None else f"{verdict.other_probability:.1%} on neither verdict"


def rounds_of(stage: StageTrace) -> list[tuple[list[MatchTrace], list[int]]]:
    """Return the rounds of a stage's tournament: the matches of each, and the candidates that advance without one."""
    rounds: list[tuple[list[MatchTrace], list[int]]] = []
    alive, played = list(range(len(stage.candidates))), 0
    while len(alive) > 1 and played < len(stage.matches):
        matches = stage.matches[played : played + len(alive) // 2]
        played += len(matches)
        playing = {one for match in matches for one in (match.first, match.second)}
        through = [one for one in alive if one not in playing]
        rounds.append((matches, through))
        alive = [match.winner for match in matches] + through
    return rounds


def log_prob(value: float) -> str:
    """Return a log-probability with three decimals, or with two digits where it is close to zero."""
    return f"{value:.3f}" if abs(value) >= 0.01 else f"{value + 0.0:.2g}"  # adding 0.0 turns -0.0 into 0.0


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, such as ``1 token`` and ``1,200 tokens``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def short_count(number: float) -> str:
    """Return a large number with three digits and an SI prefix, such as ``1.23 G``."""
    for size, prefix in _PREFIXES:
        if number >= size:
            return f"{number / size:.3g} {prefix}"
    return f"{number:.0f} "


def cost_line(trace: Trace) -> str:
    """Return the costs of a search in one line."""
    tokens, flops = sum(trace.tokens.values()), sum(trace.flops.values())
    return f"{tokens:,} tokens, {short_count(flops)}FLOPs, {sum(trace.seconds.values()):.1f} s; seed {trace.seed}"
