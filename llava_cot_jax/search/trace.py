"""What happened in a search, as a person can read it: every candidate, every verdict, and what they cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from llava_cot_jax.costs import model_costs
from llava_cot_jax.inference.decoding import ENDS, TAG, UNUSED, Samples
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.search.judge import CHECK, DECISIONS, PAIR, StageJudgement, Matches, JudgeQueries
from llava_cot_jax.search.program import StageResult
from llava_cot_jax.search.prompts import WHOLE_ANSWER
from llava_cot_jax.search.strategies import Judge, SearchSpec
from llava_cot_jax.search.tables import closing_text


@dataclass(frozen=True)
class CandidateTrace:
    """A candidate of a stage.

    Attributes:
        text: what the model wrote; a stage's opening tag is given and not part of it.
        ended: "tag", "eos" or "budget".
        added: the closing tag, or the rest of it, that was put in place of what was not written; "" where it was.
        tokens: of the text.
        log_probability: of all that was drawn, natural, before temperature, top_k and top_p.
        mean_log_probability: the same for each token drawn.
    """

    text: str
    ended: str
    added: str
    tokens: int
    log_prob: float
    mean_log_prob: float


@dataclass(frozen=True)
class VerdictTrace:
    """What one row of the judge's came to.

    Attributes:
        first: the candidate shown as response 1; of a check, the one that is checked.
        second: the one shown as response 2; None in a check.
        vote: from 1 (response 1, or correct) to -1; 0 is unreadable.
        outside: of a token verdict, the probability of anything but the two verdicts; else None.
        reason: what was written; None for a token verdict.
        readable: whether a verdict was found.
    """

    first: int
    second: int | None
    vote: float
    other_probability: float | None
    reason: str | None
    readable: bool


@dataclass(frozen=True)
class MatchTrace:
    """A pair of candidates, of which one went on.

    Attributes:
        first: a candidate.
        second: the other one.
        margin: from 1, for the first, to -1.
        decision: "judged"; "checked", where only one of them failed its check; or "scored", where the verdicts
            were even or unreadable and the mean log-probability decided.
        winner: the one that went on.
        verdicts: one, or one for each order.
    """

    first: int
    second: int
    margin: float
    decision: str
    winner: int
    verdicts: list[VerdictTrace]


@dataclass(frozen=True)
class StageTrace:
    """A stage.

    Attributes:
        stage: its tag; "whole" where answers were written whole.
        candidates: in their order.
        checks: of each candidate, where the stage's are checked.
        matches: in the order they were played.
        winner: the candidate that won.
    """

    stage: str
    candidates: list[CandidateTrace]
    checks: list[VerdictTrace]
    matches: list[MatchTrace]
    winner: int


@dataclass
class Trace:
    """A search.

    Attributes:
        question: what was asked.
        seed: of the draws.
        strategy: its settings.
        stages: in their order.
        tower_runs: of the vision tower: one, or none without an image.
        tokens: by what they were: read of the prompt, of the winners of stages, of the fronts and rows of
            the judge's prompts; drawn for candidates, and for written reasons.
        flops: of the model's products, by the same parts, and for the images: ``model_costs``'s useful count,
            in which fill and what was computed for nothing are left out.
        seconds: of the batch that the question was in.
    """

    question: str
    seed: int
    strategy: str
    stages: list[StageTrace]
    vision_encoder_calls: int
    tokens: dict[str, int]
    flops: dict[str, int]
    seconds: dict[str, float]


def trace_stage(processor: Processor, spec: SearchSpec, number: int, found: StageResult) -> StageTrace:
    """Stage ``number`` of one question, from host arrays without the leading axes of stages and questions."""
    stage = spec.stages[number] if spec.stages else WHOLE_ANSWER
    written, judgement = found.candidates, found.judgement
    candidates = []
    for i in range(spec.num_candidates[number]):
        one: Samples = jax.tree.map(lambda x: x[i], written)  # noqa: B023
        ended = ENDS[int(one.ended)]
        candidates.append(
            CandidateTrace(
                text=processor.decode(np.asarray(one.tokens[: one.lengths])),
                ended=ended,
                added=closing_text(stage, int(one.state)).rstrip("\n") if spec.stages and ended != "tag" else "",
                tokens=int(one.lengths),
                log_prob=float(one.log_prob),
                mean_log_prob=float(one.log_prob) / max(int(one.num_sampled), 1),
            )
        )
    checks: list[VerdictTrace] = []
    matches: list[MatchTrace] = []
    if judgement is not None and spec.judge is not None:
        orders, checked = spec.judge.orders, _checks(judgement, spec, number)
        verdicts = [_trace_verdict(processor, spec.judge, judgement, i, checked) for i in range(int(judgement.asked))]
        checks = verdicts[:checked]
        for i in range(spec.num_candidates[number] - 1):
            match: Matches = jax.tree.map(lambda x: x[i], judgement.matches)  # noqa: B023
            judged = verdicts[checked + i * orders : checked + (i + 1) * orders]
            decision = DECISIONS[int(match.decision)]
            first, second, winner = (int(x) for x in (match.first, match.second, match.winner))
            matches.append(MatchTrace(first, second, float(match.margin), decision, winner, judged))
    return StageTrace(stage, candidates, checks, matches, int(found.winner))


def _checks(judgement: StageJudgement, spec: SearchSpec, number: int) -> int:
    """How many of the rows asked were checks."""
    assert spec.judge is not None
    return int(judgement.asked) - (spec.num_candidates[number] - 1) * spec.judge.orders


def _trace_verdict(processor: Processor, judge: Judge, judgement: StageJudgement, i: int, checks: int) -> VerdictTrace:
    row: JudgeQueries = jax.tree.map(lambda x: x[i], judgement.rows)
    first, second, vote = int(row.first), None if i < checks else int(row.second), float(row.vote)
    if judge.verdict == "token":
        return VerdictTrace(first, second, vote, float(row.other_probability), None, True)
    reason = processor.decode(np.asarray(row.reason.tokens[: row.reason.lengths]))
    return VerdictTrace(first, second, vote, None, reason, bool(row.reason.ended == TAG))


class DecodingRun(NamedTuple):
    """JudgeQueries that were written side by side.

    Attributes:
        rows: how many.
        steps: of the loop, of which each reads the weights once.
        prefix: tokens before the rows, which they share.
        own: tokens of each row before what is written, on average.
        text_only: whether they see no image.
    """

    rows: int
    steps: int
    prefix: int
    own: int
    text_only: bool


class SearchCosts:
    """Tokens and FLOPs of the search for one question's answer, by what they were spent on.

    Args:
        config: the model's.
        spec: of the search.
        found: host arrays [stages, ...] of one question.
        images: of the question.

    Attributes:
        tokens: as in ``Trace``.
        flops: likewise.
        batches: what was written, as if no row had to wait for another of its stage and kind.
    """

    def __init__(self, config: MllamaConfig, spec: SearchSpec, found: StageResult, images: int) -> None:
        self._config = config
        self._seen = images * config.vision.image_tokens
        parts = ("prompt", "winners", "candidates", "judge fronts", "judge rows", "reasons")
        self.tokens = dict.fromkeys(parts, 0)
        vision = sum(model_costs.vision_flops(config, images).values()) if images else 0
        self.flops = {"vision": vision, **dict.fromkeys(parts, 0)}
        self.batches: list[DecodingRun] = []
        length = 0
        for number in range(len(spec.max_new_tokens)):
            here: StageResult = jax.tree.map(lambda x: x[number], found)  # noqa: B023
            self._read("winners" if number else "prompt", int(here.read), length)
            length += int(here.read)
            drawn = here.candidates.num_sampled[here.candidates.ended != UNUSED].tolist()
            self._write("candidates", drawn, length, [0] * len(drawn))
            if here.judgement is not None and spec.judge is not None:
                self._judge(spec.judge, here.judgement, _checks(here.judgement, spec, number))

    def _judge(self, judge: Judge, judgement: StageJudgement, checks: int) -> None:
        rows: JudgeQueries = jax.tree.map(lambda x: x[: int(judgement.asked)], judgement.rows)
        for kind, part in ((CHECK, slice(checks)), (PAIR, slice(checks, None))):
            front, text_only = int(judgement.fronts[kind]), kind == CHECK
            self._read("judge fronts", front, 0, text_only)
            own = rows.tokens[part].tolist()
            for tokens in own:
                self._read("judge rows", tokens, front, text_only)
            if judge.verdict == "rationale":
                self._write("reasons", rows.reason.num_sampled[part].tolist(), front, own, text_only)

    def _read(self, part: str, tokens: int, before: int, text_only: bool = False) -> None:
        """``tokens`` were read at once after ``before`` others, the last one scored."""
        self._spend(part, tokens, tokens, before, min(tokens, 1), text_only)

    def _write(self, part: str, drawn: Sequence[int], prefix: int, own: Sequence[int], text_only: bool = False) -> None:
        """JudgeQueries of ``drawn`` tokens were drawn, each after the prefix and its ``own``.

        The first token of a row is drawn from what was read; the last is not read.
        """
        for tokens, before in zip(drawn, own, strict=True):
            self._spend(part, tokens, tokens - 1, prefix + before, tokens - 1, text_only)
        if drawn:
            self.batches.append(DecodingRun(len(drawn), max(drawn) - 1, prefix, sum(own) // len(own), text_only))

    def _spend(self, part: str, tokens: int, read: int, before: int, scored: int, text_only: bool) -> None:
        self.tokens[part] += tokens
        seen = 0 if text_only else self._seen
        work = model_costs.text_flops(self._config, read, seen, prefix=before, scored=scored)
        self.flops[part] += sum(work.values())
