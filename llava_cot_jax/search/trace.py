"""Trace of a search, for people to read: every candidate, every verdict, and what they cost."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import numpy as np

from llava_cot_jax.inference.completions import INCOMPLETE
from llava_cot_jax.inference.decoding import EndReason, Samples
from llava_cot_jax.processing.probe import SENTENCE, WHOLE_ANSWER
from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.search.judge import CHECK, PAIR, JudgeQueries
from llava_cot_jax.search.program import StageResult
from llava_cot_jax.search.scorers import Judge, OwnScores, Verifier
from llava_cot_jax.search.strategies import SearchSpec
from llava_cot_jax.search.tables import closing_text
from llava_cot_jax.search.tournament import Decision, Matches, StageJudgement
from llava_cot_jax.search.verifier import StageScores
from llava_cot_jax.stage_format import LLAVA_COT, StageFormat


@dataclass(frozen=True)
class CandidateTrace:
    """Candidate of a stage.

    Attributes:
        text: Text that the model wrote. The stage's opening is given to the model, and not part of it, and neither is
            the next opening, where the model wrote that. That of a sentence has whole characters: the bytes of one
            that the next sentence completes belong to the next sentence.
        ended: Why the candidate ended: "tag", its closing, or that of the whole answer; "sentence", the end of its
            sentence; "heading", the opening of a later stage in a format without closings; "turn", the end of the
            model's turn where that ends the stage; "eos", that end before the stage's; or "max_new_tokens".
        added: Closing, or the rest of it, that was added because the model did not write it.
        tokens: Number of tokens of the text.
        log_prob: Sum of the natural log-probabilities of all tokens sampled, before temperature, top_k and top_p.
        mean_log_prob: Mean of these log-probabilities.
        score: Score of the verifier, the probability of "yes" against "no", or of a function of the user's own. None
            where there is none, or where that function's is not a number, so that the candidate lost.
        other_probability: Probability that the verifier gives to anything but the two answers; None without one.
        parent: Candidate that a reasoning or a conclusion of a retracing search continues: a caption of the same round,
            or a reasoning of ``parent_round``. None elsewhere.
        parent_round: Round of the reasoning that a conclusion continues; 0 elsewhere.
    """

    text: str
    ended: str
    added: str
    tokens: int
    log_prob: float
    mean_log_prob: float
    score: float | None = None
    other_probability: float | None = None
    parent: int | None = None
    parent_round: int = 0


@dataclass(frozen=True)
class VerdictTrace:
    """Verdict of the judge on one prompt.

    Attributes:
        first: Candidate shown as response 1, or the one that is checked.
        second: Candidate shown as response 2; None in a check.
        vote: Vote, from 1 (response 1, or correct) to -1; 0 is unreadable.
        other_probability: Probability of anything but the two verdicts; None where a reason is written.
        reason: Written reason; None with a token verdict.
        readable: Whether a verdict was found.
    """

    first: int
    second: int | None
    vote: float
    other_probability: float | None
    reason: str | None
    readable: bool


@dataclass(frozen=True)
class MatchTrace:
    """Match between two candidates, of which one advanced.

    Attributes:
        first: A candidate.
        second: The other candidate.
        margin: Margin, from 1, for the first candidate, to -1.
        decision: "judged"; "checked", where one of the two alone failed its check; or "scored", where the verdicts were
            even or unreadable and the mean log-probability decided.
        winner: Candidate that advanced.
        verdicts: Verdicts, one for each order in which the pair was shown.
    """

    first: int
    second: int
    margin: float
    decision: str
    winner: int
    verdicts: list[VerdictTrace]

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "MatchTrace":
        """Return the match of which ``content`` has the attributes by name."""
        return cls(**{**content, "verdicts": [VerdictTrace(**one) for one in content["verdicts"]]})


@dataclass(frozen=True)
class StageTrace:
    """Stage of a search.

    Attributes:
        stage: Name of the stage; "whole" where answers were sampled whole, and "sentence 1" and so on where they were
            sampled sentence by sentence.
        candidates: Candidates in their order.
        checks: Check of each candidate; empty where candidates are not checked.
        matches: Matches in the order in which they were played.
        winner: Candidate that won: in a round that led to the answer, the one that did, and in another round the best.
        round: Round of a retracing search, from 1; 0 elsewhere.
        own_scorer: Name of the function of the user's own that scored the candidates; None without one.
        scorer_seconds: Seconds that this function took.
    """

    stage: str
    candidates: list[CandidateTrace]
    checks: list[VerdictTrace]
    matches: list[MatchTrace]
    winner: int
    round: int = 0
    own_scorer: str | None = None
    scorer_seconds: float = 0.0

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "StageTrace":
        """Return the stage of which ``content`` has the attributes by name."""
        candidates = [CandidateTrace(**one) for one in content["candidates"]]
        checks = [VerdictTrace(**one) for one in content["checks"]]
        matches = [MatchTrace.from_dict(one) for one in content["matches"]]
        return cls(**{**content, "candidates": candidates, "checks": checks, "matches": matches})

    def with_own_scores(self, scores: OwnScores | None) -> "StageTrace":
        """Return the stage with the scores of a function of the user's own, if there are any."""
        if scores is None:
            return self
        scored = [replace(one, score=score) for one, score in zip(self.candidates, scores.scores, strict=True)]
        return replace(self, candidates=scored, own_scorer=scores.scorer, scorer_seconds=scores.seconds)


@dataclass
class Trace:
    """Search for the answer to a question.

    Attributes:
        question: Text of the question.
        seed: Seed of the draws.
        strategy: Strategy with its settings.
        stages: Stages in their order.
        vision_encoder_calls: Number of runs of the vision tower: 1, or 0 without an image.
        tokens: Number of tokens by what they were for. Prefilled: "prompt"; "winners" of stages with what opens and
            closes these, of which a retracing search reads only the last token of each candidate that it continues;
            "judge_prefixes" and "judge_queries", the parts of the judge's prompts; and "verifier_probes", what the
            verifier reads after candidates. Sampled: "candidates" and "judge_reasons".
        flops: FLOPs by the same parts, and for the images ("vision"), by the useful count of ``model_costs``, which
            leaves out padding and unused results.
        seconds: Seconds of the batch that the question was in, by what they were spent on.
        format: Format of the stages.
    """

    question: str
    seed: int
    strategy: str
    stages: list[StageTrace]
    vision_encoder_calls: int
    tokens: dict[str, int]
    flops: dict[str, int]
    seconds: dict[str, float]
    format: StageFormat = LLAVA_COT

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], format: StageFormat = LLAVA_COT) -> "Trace":
        """Return the trace that ``to_dict`` or ``without_seconds`` was called of, from what these return.

        Args:
            content: Nested dicts and lists, which may have been JSON in between.
            format: Format of the stages, of which ``content`` has the name alone.
        """
        stages = [StageTrace.from_dict(stage) for stage in content["stages"]]
        return cls(**{**content, "stages": stages, "format": format})

    @property
    def whole_text(self) -> str | None:
        """Text of the answer where it was sampled whole, or sentence by sentence; None where it was by stages."""
        if self.stages[0].stage not in (WHOLE_ANSWER, sentence_name(0)):
            return None
        return "".join(stage.candidates[stage.winner].text for stage in self.stages)

    def parent_of(self, place: int, number: int) -> tuple[int, int] | None:
        """Return the candidate that a candidate continues: the place of its stage in ``stages``, and its number.

        It is the winner of the stage before, except in a retracing search. That of a first stage is None.
        """
        stage = self.stages[place]
        candidate = stage.candidates[number]
        if candidate.parent is None:
            before = 0 if stage.round else place - 1  # captions of every round continue the summary
            return (before, self.stages[before].winner) if place else None
        if not candidate.parent_round:
            return place - 1, candidate.parent
        rounds = [other.round for other in self.stages]
        return max(i for i, round_ in enumerate(rounds) if round_ == candidate.parent_round), candidate.parent

    @property
    def winners(self) -> list[tuple[int, int]]:
        """Candidates that led to the answer, in order: the place of the stage of each, and its number."""
        found: list[tuple[int, int]] = []
        at: tuple[int, int] | None = (len(self.stages) - 1, self.stages[-1].winner)
        while at is not None:
            found.append(at)
            at = self.parent_of(*at)
        return found[::-1]

    @property
    def path(self) -> dict[str, CandidateTrace]:
        """Candidate of each stage that led to the answer, by the stage's name."""
        return {self.stages[place].stage: self.stages[place].candidates[number] for place, number in self.winners}

    @property
    def forced_stages(self) -> dict[str, str]:
        """Stages that the search ended itself, as the winner did not: why each ended, by its name.

        The reasons are "max_new_tokens", where the stage was cut off, and "eos".
        """
        if self.whole_text is not None:
            return {}
        return {name: winner.ended for name, winner in self.path.items() if winner.ended in ("eos", "max_new_tokens")}

    def to_dict(self) -> dict[str, Any]:
        """Return the trace as nested dicts and lists, by the names of the attributes, with the name of the format."""
        return asdict(self) | {"format": self.format.name}

    def without_seconds(self) -> dict[str, Any]:
        """Return the trace as ``to_dict`` does, but for all times, so that it is the same wherever it is made."""
        stages = [asdict(replace(stage, scorer_seconds=0.0)) for stage in self.stages]
        return self.to_dict() | {"stages": stages, "seconds": {}}

    def to_json(self, indent: int | None = None) -> str:
        """Return the trace as a JSON object, which ``generate --trace`` writes a list of.

        Args:
            indent: Number of spaces of indentation; None writes a single line.
        """
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False)


def split_stages(results: StageResult, question: int) -> list[StageResult]:
    """Return the result of each stage, sentence, or stage of a round that a question has, out of a whole search's."""
    used = np.flatnonzero(results.candidates.ended[:, question, 0] != EndReason.UNUSED)
    return [jax.tree.map(lambda x: x[stage, question], results) for stage in used]  # noqa: B023


def stages_of(spec: SearchSpec, stages: Sequence[StageResult]) -> list[tuple[str, int, int, StageResult]]:
    """Return what each result of a question's search is of: its name, its index in ``spec``, its round, and itself.

    Of a retracing search there are the summary, captions and reasonings of each round in turn, and the conclusions.
    """
    found = []
    for place, stage in enumerate(stages):
        if spec.max_sentences:
            found.append((sentence_name(place), 0, 0, stage))
            continue
        number, round_ = place, 0
        if spec.rounds and place:
            is_last = place == len(stages) - 1
            number, round_ = (3, 0) if is_last else (2 - place % 2, (place + 1) // 2)
        found.append((stage_name(spec, number), number, round_, stage))
    return found


def stage_name(spec: SearchSpec, number: int) -> str:
    """Return the name of a stage in a trace by its index in ``spec``."""
    return spec.stages[number] if spec.stages else WHOLE_ANSWER


def sentence_name(number: int) -> str:
    """Return the name of a sentence in a trace."""
    return f"{SENTENCE} {number + 1}"


def trace_stages(processor: Processor, spec: SearchSpec, stages: Sequence[StageResult]) -> list[StageTrace]:
    """Return the stages of one question's search.

    Args:
        processor: Processor that decodes tokens.
        spec: Static part of the search.
        stages: Result of each stage of the question, in host arrays.
    """
    before, text_before, traces = list[int](), "", list[StageTrace]()
    for name, number, round_, stage in stages_of(spec, stages):
        traces.append(
            StageTrace(
                stage=name,
                candidates=trace_candidates(
                    processor,
                    spec,
                    number,
                    stage.candidates,
                    stage.kept,
                    stage.scores,
                    before=before,
                    text_before=text_before,
                    parent=stage.parent,
                ),
                checks=_trace_checks(processor, spec, number, stage.judgement),
                matches=_trace_matches(processor, spec, number, stage.judgement),
                winner=int(stage.winner),
                round=round_,
            )
        )
        if spec.max_sentences:
            won = stage.candidates.text[int(stage.winner)]
            before += np.asarray(won.tokens[: won.lengths]).tolist()
            text_before += traces[-1].candidates[traces[-1].winner].text
    return _lead_to_the_answer(traces, spec.num_candidates[-2]) if spec.rounds else traces


def _lead_to_the_answer(stages: list[StageTrace], per_round: int) -> list[StageTrace]:
    """Return the stages of a retracing search, whose winners are the caption and the reasoning that led to the answer.

    Args:
        stages: Stages whose winners have the highest scores. A conclusion's parent counts the reasonings of all rounds.
        per_round: Number of reasonings of a round.
    """
    *before, last = stages
    conclusions = []
    for one in last.candidates:
        assert one.parent is not None
        conclusions.append(replace(one, parent=one.parent % per_round, parent_round=one.parent // per_round + 1))
    final, traces = conclusions[last.winner], []
    winner = final.parent
    for stage in reversed(before):
        if stage.round == final.parent_round and winner is not None:
            stage = replace(stage, winner=winner)
            winner = stage.candidates[winner].parent
        traces.append(stage)
    return [*reversed(traces), replace(last, candidates=conclusions)]


def trace_candidates(
    processor: Processor,
    spec: SearchSpec,
    number: int,
    candidates: Samples,
    kept: jax.Array,
    scores: StageScores | None = None,
    *,
    before: Sequence[int] = (),
    text_before: str = "",
    parent: jax.Array | None = None,
) -> list[CandidateTrace]:
    """Return the candidates of stage ``number``, out of host arrays [candidates, ...].

    Args:
        processor: Processor that decodes tokens.
        spec: Static part of the search.
        number: Index of the stage.
        candidates: Candidates.
        kept: int32, number of tokens that are kept of each.
        scores: Scores of the verifier, if there are any.
        before: Tokens of the answer before a sentence.
        text_before: Text of these, as far as it has whole characters.
        parent: int32, what each of a retracing search continues.
    """
    scores, traces = scores if isinstance(spec.scorers[number], Verifier) else None, []
    for i in range(spec.num_candidates[number]):
        one: Samples = jax.tree.map(lambda x: x[i], candidates)  # noqa: B023
        is_closed = not spec.stages or one.ended == EndReason.TAG
        own, reason = np.asarray(one.tokens[: kept[i]]).tolist(), EndReason(int(one.ended))
        if spec.max_sentences:
            text, ended = _read_sentence(processor, spec.format, text_before, [*before, *own], reason)
        else:
            text, ended = processor.decode(own), _how_ended(spec, number, reason)
        traces.append(
            CandidateTrace(
                text=text,
                ended=ended,
                added="" if is_closed else closing_text(spec.format.stages[number], int(one.state)).rstrip("\n"),
                tokens=int(kept[i]),
                log_prob=float(one.log_prob),
                mean_log_prob=float(one.log_prob) / max(int(one.num_sampled), 1),
                score=None if scores is None else float(scores.score[i]),
                other_probability=None if scores is None else float(scores.other_probability[i]),
                parent=int(parent[i]) if parent is not None and number > 1 else None,
            )
        )
    return traces


def _read_sentence(
    processor: Processor, format: StageFormat, text_before: str, ids: Sequence[int], reason: EndReason
) -> tuple[str, str]:
    """Return the text of a sentence, and why it ended, as ``CandidateTrace`` has them.

    Args:
        processor: Processor that decodes tokens.
        format: Format of the answer.
        text_before: Text of the answer before the sentence.
        ids: Tokens of the answer up to the end of the sentence, which alone tell whole characters.
        reason: Why sampling ended.
    """
    whole = processor.decode(ids).rstrip(INCOMPLETE)
    closing = (format.stages[-1].closing or "").strip()
    goes_on = reason == EndReason.TAG and not (closing and closing in whole)
    return whole[len(text_before) :], "sentence" if goes_on else reason.name.lower()


def _how_ended(spec: SearchSpec, number: int, reason: EndReason) -> str:
    """Return why a candidate of a stage ended, as ``CandidateTrace.ended`` has it."""
    if spec.stages and spec.format.stages[number].closing is None:
        if reason == EndReason.TAG:
            return "heading"
        if reason == EndReason.EOS and spec.format.ends_turn(number):
            return "turn"
    return reason.name.lower()


def _trace_checks(
    processor: Processor, spec: SearchSpec, number: int, judgement: StageJudgement | None
) -> list[VerdictTrace]:
    """Return the check of each candidate of a stage."""
    judge = spec.judge_of(number)
    if judge is None or judgement is None:
        return []
    checks = range(num_checks(spec, number, judge, judgement))
    return [_trace_verdict(processor, judge, judgement, i, CHECK) for i in checks]


def _trace_matches(
    processor: Processor, spec: SearchSpec, number: int, judgement: StageJudgement | None
) -> list[MatchTrace]:
    """Return the matches of a stage with their verdicts."""
    judge, traces = spec.judge_of(number), []
    if judge is None or judgement is None:
        return []
    checks = num_checks(spec, number, judge, judgement)
    for i in range(spec.num_candidates[number] - 1):
        match: Matches = jax.tree.map(lambda x: x[i], judgement.matches)  # noqa: B023
        queries = range(checks + i * judge.orders, checks + (i + 1) * judge.orders)
        traces.append(
            MatchTrace(
                first=int(match.first),
                second=int(match.second),
                margin=float(match.margin),
                decision=Decision(int(match.decision)).name.lower(),
                winner=int(match.winner),
                verdicts=[_trace_verdict(processor, judge, judgement, query, PAIR) for query in queries],
            )
        )
    return traces


def _trace_verdict(processor: Processor, judge: Judge, judgement: StageJudgement, i: int, kind: int) -> VerdictTrace:
    """Return the verdict on query ``i``, which is of kind PAIR or CHECK."""
    query: JudgeQueries = jax.tree.map(lambda x: x[i], judgement.queries)
    first, second, vote = int(query.first), int(query.second) if kind == PAIR else None, float(query.vote)
    if not judge.writes_reasons:
        return VerdictTrace(first, second, vote, float(query.other_probability), None, readable=True)
    reason = processor.decode(np.asarray(query.reason.tokens[: query.reason.lengths]))
    return VerdictTrace(first, second, vote, None, reason, readable=bool(query.reason.ended == EndReason.TAG))


def num_checks(spec: SearchSpec, number: int, judge: Judge, judgement: StageJudgement) -> int:
    """Return the number of queries of a stage that were checks."""
    return int(judgement.num_queries) - (spec.num_candidates[number] - 1) * judge.orders
