"""Traces made by hand, which together hold every variant of a trace."""

import itertools
from dataclasses import replace

from llava_cot_jax.search.trace import CandidateTrace, MatchTrace, StageTrace, Trace, VerdictTrace
from llava_cot_jax.stage_format import STAGES

HOSTILE = 'if a < b && c > d: "x" <script>alert(1)</script> [bold red]not markup[/] &amp; \x1b[31mred\x00 {{ 7 * 7 }}'
"""What must reach a person as it is, but for the two control characters."""

LONG = (
    "The chart has four bars, one for each quarter; I read their heights from the axis on the left.\n"
    "Step 1: the first quarter is at 12.5 and the second at 17.0, so 12.5 < 17.0.\n"
    "Step 2: R&D takes <i>about</i> a third of each bar, the rest is sales & support.\n"
    "Step 3: the sum of the four bars is 12.5 + 17.0 + 9.5 + 21.0 = 60.0 million.\n\n"
    "Averaged over the year that is 60.0 / 4 = 15.0 million for each quarter, which lies > 12.5 and < 17.0. "
    "The third quarter is the lowest by far, and the caption of the chart says why: two plants were closed for repair."
)


def candidate(text: str, mean: float = -0.25, ended: str = "tag", added: str = "") -> CandidateTrace:
    tokens = max(len(text.split()), 1)
    return CandidateTrace(text, ended, added, tokens, mean * tokens, mean)


def token_match(first: int, second: int, margin: float, decision: str = "judged") -> MatchTrace:
    """Judged in both orders, with a liking for the first place."""
    votes = (margin + 0.2, 0.2 - margin)
    pairs = ((first, second), (second, first))
    verdicts = [VerdictTrace(*pair, vote, 0.031, None, True) for pair, vote in zip(pairs, votes, strict=True)]
    return MatchTrace(first, second, margin, decision, first if margin > 0 else second, verdicts)


def written_match(first: int, second: int, votes: tuple[float, ...], decision: str = "judged") -> MatchTrace:
    pairs = ((first, second), (second, first))
    verdicts = [
        VerdictTrace(*pair, vote, None, f"Response {1 if vote > 0 else 2} counts <all> bars. {HOSTILE}", vote != 0)
        for pair, vote in zip(pairs, votes, strict=False)
    ]
    margin = (votes[0] - votes[-1]) / 2 if len(votes) > 1 else votes[0]
    return MatchTrace(first, second, margin, decision, first if margin >= 0 else second, verdicts)


def knockout(count: int) -> tuple[list[MatchTrace], int]:
    """Token matches of ``count`` candidates, an odd one going through, and the winner."""
    alive, matches, margins = list(range(count)), [], itertools.cycle((-0.21, 0.64, 0.08, -0.93))
    while len(alive) > 1:
        pairs = [(alive[i], alive[i + 1]) for i in range(0, len(alive) - 1, 2)]
        played = [token_match(*pair, next(margins)) for pair in pairs]
        matches += played
        alive = alive[len(alive) - len(alive) % 2 :] + [match.winner for match in played]
    return matches, alive[0]


def make_trace(
    stages: list[StageTrace], strategy: str = "StageBeam(num_candidates=4)", question: str = HOSTILE
) -> Trace:
    return Trace(
        question=question,
        seed=7,
        strategy=strategy,
        stages=stages,
        vision_encoder_calls=1,
        tokens={
            "prompt": 1650,
            "winners": 210,
            "candidates": 1830,
            "judge_prefixes": 800,
            "judge_queries": 3100,
            "judge_reasons": 0,
        },
        flops={"vision": 3 * 10**12, "prompt": 27 * 10**12, "winners": 4 * 10**12, "candidates": 31 * 10**12},
        seconds={"prepare": 0.12, "search": 9.4},
    )


def token_trace(count: int = 4) -> Trace:
    """Four stages judged by the probabilities of two tokens."""
    stages = []
    for stage in STAGES:
        matches, winner = knockout(count)
        texts = [f" {stage.lower()} number {i + 1}: {LONG if i % 2 else HOSTILE} </{stage}>" for i in range(count)]
        candidates = [candidate(text, -0.05 - 0.13 * i) for i, text in enumerate(texts)]
        if stage == "CONCLUSION":
            candidates = [candidate(f" {15 + i}.0 million </CONCLUSION>", -0.02 * i) for i in range(count)]
        stages.append(StageTrace(stage, candidates, [], matches, winner))
    return make_trace(
        stages, question="How many million is the average of a quarter, if R&D < sales?\nGive one number."
    )


def rationale_trace() -> Trace:
    """Reasons are written, each reasoning is checked, and every kind of decision and ending occurs."""
    matches = [
        written_match(0, 2, (-1.0, 1.0)),
        written_match(3, 1, (0.0, 0.0), "scored"),
        written_match(2, 3, (1.0, 1.0), "checked"),
    ]
    checks = [
        VerdictTrace(i, None, vote, None, f"Step {i + 1} <is> fine. {HOSTILE}", vote != 0)
        for i, vote in enumerate((1.0, -1.0, 1.0, 0.0))
    ]
    candidates = [
        candidate(f" First. {LONG} </REASONING>", -0.11),
        candidate(f" Second. {HOSTILE}", -0.52, "max_new_tokens", "</REASONING>"),
        candidate(" Third. No way to tell. </REASONING>", -1.9),
        candidate("", -3.2, "eos", "</REASONING>"),
    ]
    reasoning = StageTrace("REASONING", candidates, checks, matches, 2)
    last = StageTrace("CONCLUSION", [candidate(" B </CONCLUSION>", -0.01)], [], [], 0)
    return make_trace([reasoning, last], "StageBeam(scorer=Judge(verdict='rationale'))")


def scored_trace() -> Trace:
    """Stages whose winner has the highest mean log-probability: no judge."""
    stages = [
        StageTrace(stage, [candidate(f"{stage} {i} </{stage}>", -0.5 + 0.1 * i) for i in range(3)], [], [], 2)
        for stage in STAGES
    ]
    return make_trace(stages, "StageBeam(scorer=LogProbability())")


def verified_trace() -> Trace:
    """Stages whose winner has the highest score of the verifier, which is sure of one stage and lost at another."""
    stages = []
    for number, stage in enumerate(STAGES):
        scores = [(0.25, 0.5), (0.875, 0.9), (0.0625, 0.004)]
        candidates = [
            replace(candidate(f"{stage} {i} </{stage}>", -0.1 * i - number), score=score, other_probability=other)
            for i, (score, other) in enumerate(scores)
        ]
        stages.append(StageTrace(stage, candidates, [], [], 1))
    return make_trace(stages, "StageBeam(scorer=Verifier())")


def retracing_trace() -> Trace:
    """Two rounds, of which both have reasonings that are concluded, and a caption and a reasoning that are not the best
    led to the answer."""

    def scored(text: str, score: float, parent: int | None = None, parent_round: int = 0) -> CandidateTrace:
        return replace(
            candidate(text, -0.4), score=score, other_probability=0.25, parent=parent, parent_round=parent_round
        )

    summary, caption, reasoning, conclusion = STAGES
    stages = [
        StageTrace(summary, [candidate(" I look. </SUMMARY>")], [], [], 0),
        StageTrace(
            caption, [scored(f"caption {i} of 1 {HOSTILE}", s) for i, s in enumerate((0.1, 0.6, 0.5))], [], [], 2, 1
        ),
        StageTrace(
            reasoning,
            [scored(f"reasoning {i} of 1", s, p) for i, (s, p) in enumerate(((0.7, 1), (0.2, 1), (0.5, 2), (0.3, 2)))],
            [],
            [],
            2,
            1,
        ),
        StageTrace(caption, [scored(f"caption {i} of 2", s) for i, s in enumerate((0.6, 0.1, 0.4))], [], [], 0, 2),
        StageTrace(
            reasoning,
            [scored(f"reasoning {i} of 2", s, p) for i, (s, p) in enumerate(((0.1, 0), (0.9, 0), (0.2, 2), (0.2, 2)))],
            [],
            [],
            1,
            2,
        ),
        StageTrace(
            conclusion,
            [scored("five", 0.2, 1, 2), scored("six", 0.5, 0, 1), scored(" four </CONCLUSION>", 0.8, 2, 1)],
            [],
            [],
            2,
        ),
    ]
    return make_trace(stages, "Retracing()")


def weighted_trace() -> Trace:
    """Whole answers, of which one with the conclusion with the highest sum of scores is kept."""
    trace = whole_trace("WeightedVote(num_candidates=3)")
    scored = [replace(c, score=0.25 * i, other_probability=0.125) for i, c in enumerate(trace.stages[0].candidates)]
    trace.stages[0] = replace(trace.stages[0], candidates=scored, winner=2)
    return trace


def whole_trace(strategy: str = "MajorityVote(num_candidates=3)", count: int = 3) -> Trace:
    """Whole answers: a majority vote, or, with one candidate, a greedy answer."""
    texts = [
        f"<SUMMARY> Plan {i}. </SUMMARY>\n\n<CAPTION> {HOSTILE} </CAPTION>\n\n<REASONING> So. </REASONING>\n\n"
        f"<CONCLUSION> {'four' if i else 'five'} </CONCLUSION>"
        for i in range(count)
    ]
    candidates = [candidate(text, -0.3 + 0.1 * i, "eos") for i, text in enumerate(texts)]
    return make_trace([StageTrace("whole", candidates, [], [], min(1, count - 1))], strategy)


def sentence_trace() -> Trace:
    """An answer that was searched for sentence by sentence, and cut."""
    texts = ("<SUMMARY> I look. ", f"{HOSTILE}. ", "</SUMMARY>\n\n<CONCLUSION> Fo")
    stages = []
    for number, text in enumerate(texts):
        ended = "sentence" if number < 2 else "max_new_tokens"
        candidates = [candidate(text, -0.2, ended), candidate("Hm. ", -0.3, "sentence")]
        stages.append(StageTrace(f"sentence {number + 1}", candidates, [], [token_match(0, 1, 0.3)], 0))
    return make_trace(stages, "SentenceBeam(num_candidates=2)")


def untagged_trace() -> Trace:
    """An answer without stages."""
    return make_trace(
        [StageTrace("whole", [candidate("Just four.", ended="max_new_tokens")], [], [], 0)], "Greedy(max_new_tokens=3)"
    )
