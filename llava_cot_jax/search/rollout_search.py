"""The search by stages in which every candidate is also continued to the end of the answer, as one compiled program.

Before the winner of a stage is chosen, each candidate is scored by the verifier, whatever chooses, and continued:

    question | candidate, joint | continuation [continuations of each candidate] | probe

The first continuation of each candidate, and each candidate of the last stage, is a whole answer, of which the verifier
is asked too. A question's draws hang on its seed, the stage, the candidate and the continuation alone.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key, UInt8, UInt32

from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.decoding import Decoder, EndReason, Samples
from llava_cot_jax.inference.ragged_tokens import RaggedTokens, concat
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.kv_cache import Segment
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.model.parameters import Params
from llava_cot_jax.model.sharding import use_mesh
from llava_cot_jax.processing.probe import WHOLE_ANSWER
from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.search.answers import Answer, tagged_text
from llava_cot_jax.search.program import (
    SearchInputs,
    SearchState,
    StageResult,
    StageSearch,
    by_question,
    encode_question_images,
    stage_keys,
)
from llava_cot_jax.search.prompts import DEFAULT_JUDGE_PROMPTS
from llava_cot_jax.search.random_keys import Draw, fold_in_each
from llava_cot_jax.search.reasoner import make_answers, run_program
from llava_cot_jax.search.request_builder import RequestBuilder, Requests
from llava_cot_jax.search.rollouts import append_joints, joint_tokens, row_capacity, sample_continuations
from llava_cot_jax.search.stage_ends import end_stage
from llava_cot_jax.search.strategies import SearchSpec, Strategy, check_continuable, whole_answers
from llava_cot_jax.search.tables import (
    ScorerTables,
    StageTables,
    VerifierTables,
    build_stage_tables,
    build_verifier_tables,
    vocabulary_of,
)
from llava_cot_jax.search.trace import split_stages
from llava_cot_jax.search.verifier import StageScores, score_candidates
from llava_cot_jax.stage_format import StageFormat
from llava_cot_jax.stages import body_of, find_stages, join_stages


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RolloutTables:
    """Tables of continuations.

    Attributes:
        stop_tables: uint8, stop table of what ends a whole answer.
        verifier: Tables of the verifier: a probe for each stage, and one for whole answers after them.
    """

    stop_tables: UInt8[Array, "1 states vocab"]
    verifier: VerifierTables


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RolloutResult(StageResult):
    """Result of a stage of each question, with the continuations of its candidates. All candidates have scores.

    Attributes:
        continuations: Continuations, [questions, candidates, continuations]; unused in the last stage.
        answer_scores: Scores of the verifier for the whole answers that the first continuation of each candidate ends;
            in the last stage, that each candidate ends.
    """

    continuations: Samples = field(kw_only=True)
    answer_scores: StageScores = field(kw_only=True)


@dataclass(frozen=True)
class WholeAnswer:
    """Answer that a continuation ends, or a candidate of the last stage.

    Attributes:
        text: Whole text with its tags.
        conclusion: Body of the conclusion that the search takes: what stands in the stage of that name as it was
            sampled, whatever an earlier stage has in its text; empty where that stage was not reached.
        is_cut: Whether the end is missing, as the length did not allow it.
    """

    text: str
    conclusion: str
    is_cut: bool


@dataclass(frozen=True)
class StageRollouts:
    """Continuations of the candidates of a stage, as texts.

    Attributes:
        before: Text of the answer before the stage: the winners with their tags.
        texts: Text of each candidate with its tags.
        answers: Whole answers that continue each candidate; the candidate's own in the last stage.
        mean_log_probs: Mean log-probability of a token of each candidate.
        scores: Score of the verifier for each candidate, and the probability that it gives to neither answer.
        answer_scores: The same for the first of the whole answers of each candidate.
        winner: Candidate that the search goes on with.
    """

    before: str
    texts: list[str]
    answers: list[list[WholeAnswer]]
    mean_log_probs: list[float]
    scores: list[tuple[float, float]]
    answer_scores: list[tuple[float, float]]
    winner: int


@dataclass(frozen=True)
class RolledOutAnswer(Answer):
    """Answer to a question, with the continuations of all candidates of its search.

    Attributes:
        rollouts: Continuations of each stage's candidates.
    """

    rollouts: list[StageRollouts] = field(default_factory=list)


def continuation_spec(spec: SearchSpec, continuations: int, opening: int) -> SearchSpec:
    """Return the search whose candidates are the continuations of the stages of ``spec``.

    A continuation has as many tokens as the stages after it may have, with the openings between these, and is sampled
    at the temperature of the stage that follows. That of the last stage, which has none, is not used.

    Args:
        spec: The search by stages.
        continuations: Number of continuations of a candidate.
        opening: Largest number of tokens that open a stage.
    """
    count = spec.num_stages
    left = [sum(spec.max_new_tokens[n:]) + opening * (count - n - 1) for n in range(1, count)]
    whole = whole_answers(spec.format, continuations, 0.0, 1, spec.sampling.top_k, spec.sampling.top_p)
    return replace(
        whole,
        num_candidates=(continuations,) * spec.num_stages,
        temperatures=(*spec.temperatures[1:], spec.temperatures[-1]),
        max_new_tokens=(*left, 1),
        sampling=spec.sampling,
        scorers=(None,) * spec.num_stages,
    )


def continuation_keys(
    seeds: UInt32[Array, " questions"], stage: Int[Array, " questions"], count: int
) -> Key[Array, " groups"]:
    """Return the random key of the continuations of each of ``count`` candidates of each question's stage."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(stage_keys(seeds, stage), Draw.CONTINUATION)
    return jax.vmap(fold_in_each, (0, None))(keys, jnp.arange(count)).reshape(-1)


class RolloutBuilder(RequestBuilder):
    """Makes the requests of a search by stages whose candidates are continued.

    Args:
        processor: Processor of the model's checkpoint.
        strategy: Strategy to search with.
        judge_prompts: YAML file with the prompts of the judge.
        default_max_new_tokens: Largest number of tokens of a stage, where the strategy sets none.

    Attributes:
        rollout_tables: Tables of the continuations.

    Raises:
        UserError: A setting of the search, or a prompt, cannot be used.
    """

    def __init__(
        self,
        processor: Processor,
        strategy: Strategy,
        judge_prompts: str | Path = DEFAULT_JUDGE_PROMPTS,
        default_max_new_tokens: int | None = None,
    ) -> None:
        super().__init__(processor, strategy, judge_prompts, default_max_new_tokens)
        check_continuable(self.spec)
        verifier = build_verifier_tables(processor, (*self.spec.stages, WHOLE_ANSWER), self._prompts)
        self.scorer_tables = replace(self.scorer_tables, verifier=verifier)  # which makes room for its probes
        whole = whole_answers(self.spec.format, 1, 0.0, 1)
        ends = build_stage_tables(processor, whole, vocabulary_of(processor)).stop_tables
        self.rollout_tables = RolloutTables(ends, verifier)


@functools.partial(jax.jit, static_argnames=("config", "spec", "prefill_chunk", "mesh", "continuations"))
def search_rollouts(
    params: Params,
    inputs: SearchInputs,
    stage_tables: StageTables,
    scorer_tables: ScorerTables,
    rollout_tables: RolloutTables,
    *,
    config: MllamaConfig,
    spec: SearchSpec,
    prefill_chunk: int,
    mesh: Mesh | None,
    continuations: int,
) -> RolloutResult:
    """Search for the answers of a batch of questions, and continue every candidate of every stage.

    The stages are one loop, so that there is one program for all of them.

    Args:
        params: Parameters of the model, in the unrolled layout.
        inputs: The questions.
        stage_tables: Tables of the stages of ``spec``.
        scorer_tables: Tables of the judge and the verifier of ``spec``.
        rollout_tables: Tables of the continuations.
        config: Configuration of the model.
        spec: Static part of the search.
        prefill_chunk: Number of tokens of each question that are prefilled at a time.
        mesh: Mesh of the model's devices; None on one device.
        continuations: Number of continuations of a candidate.
    """
    with use_mesh(mesh):
        decoder = Decoder(params, config, encode_question_images(params, config, inputs), prefill_chunk)
        stages = StageSearch(decoder, spec, inputs, stage_tables, scorer_tables)
        rollouts = RolloutSearch(stages, rollout_tables, continuations)
        start = SearchState(stages.init_prefix(), stages.init_progress())
        return jax.lax.scan(lambda state, _: rollouts.run_stage(state), start, length=spec.num_stages)[1]


@dataclass(frozen=True)
class RolloutSearch:
    """Pieces of the search that continues its candidates, for a batch of questions.

    Attributes:
        stages: Pieces of the search by stages.
        tables: Tables of the continuations.
        continuations: Number of continuations of a candidate.
    """

    stages: StageSearch
    tables: RolloutTables
    continuations: int

    @jax.named_scope("stage")
    def run_stage(self, state: SearchState) -> tuple[SearchState, RolloutResult]:
        """Sample the candidates of each question's stage, score and continue them, and choose the winner."""
        stages, progress = self.stages, state.progress
        prefix, logits = stages.extend_prefix(state.prefix, progress.pending)
        capacity = row_capacity(stages.spec, stages.tables)
        own, candidates = stages.sample(prefix, logits, progress.stage, capacity)
        scores = stages.score_all((prefix, own), candidates, progress.stage, self.tables.verifier)
        winner, judgement = stages.choose(candidates, scores, progress)
        continuations, answer_scores = self.roll_out((prefix, own), candidates, progress.stage)
        result = RolloutResult(
            candidates,
            winner,
            judgement,
            scores,
            progress.pending.lengths,
            stages.kept(candidates, progress.stage).lengths,
            continuations=continuations,
            answer_scores=answer_scores,
        )
        return SearchState(prefix, stages.advance(progress, candidates, winner)), result

    @jax.named_scope("roll_out")
    def roll_out(
        self, chain: tuple[Segment, ...], candidates: Samples, stage: Int[Array, " questions"]
    ) -> tuple[Samples, StageScores]:
        """Continue candidates to the end of the answer.

        Args:
            chain: Segments up to the candidates' own, root first, with room for ``row_capacity`` tokens of each.
            candidates: Candidates, [questions, candidates].
            stage: int32, index of each question's stage.

        Returns:
            The continuations, [questions, candidates, continuations], none after the last stage, and the scores of the
            first whole answer of each candidate, [questions, candidates].
        """
        stages, (questions, count) = self.stages, candidates.lengths.shape
        spec = continuation_spec(stages.spec, self.continuations, stages.tables.openings.capacity)
        there = candidates.ended != EndReason.UNUSED
        goes_on = there & (stage < stages.spec.num_stages - 1)[:, None]
        joined, logits = self.join(chain, candidates, stage, goes_on)
        keys = continuation_keys(stages.inputs.seeds, stage, count)
        stop_tables = jnp.repeat(self.tables.stop_tables, stages.spec.num_stages, axis=0)
        leaf, samples = sample_continuations(
            stages.decoder,
            spec,
            (*chain[:-1], joined),
            logits,
            goes_on.reshape(-1),
            stop_tables,
            keys,
            jnp.repeat(stage, count),
        )
        first = jax.tree.map(lambda x: x[:: self.continuations], (leaf, samples))
        answers = by_question(first[1], questions)
        answers = replace(answers, ended=jnp.where(there, EndReason.TAG, EndReason.UNUSED))
        none = RaggedTokens(jnp.zeros((questions, count, 1), jnp.int32), jnp.zeros((questions, count), jnp.int32))
        whole = jnp.full(questions, stages.spec.num_stages)
        scores = score_candidates(
            stages.decoder, (*chain[:-1], joined, first[0]), answers, none, whole, self.tables.verifier
        )
        shape = (questions, count, self.continuations)
        return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), samples), scores

    def join(
        self,
        chain: tuple[Segment, ...],
        candidates: Samples,
        stage: Int[Array, " questions"],
        goes_on: Array,
    ) -> tuple[Segment, Array]:
        """Append to candidates their last token, what closes the stage, and what opens the next, if there is one.

        Returns:
            The candidates' segment, and the float32 logits after it, both [questions * candidates].
        """
        tables = self.stages.tables
        kept, line_breaks = end_stage(candidates, tables, stage)
        following = jnp.minimum(stage + 1, self.stages.spec.num_stages - 1)
        opening = tables.openings[following[:, None], line_breaks].where(goes_on)
        closing = tables.closings[stage[:, None], candidates.state]
        there = candidates.ended != EndReason.UNUSED
        joints = concat((closing, opening), joint_tokens(tables)).where(there)
        cut = replace(candidates, lengths=kept.lengths)
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (cut, joints))
        return append_joints(self.stages.decoder, chain, *flat)


def roll_out_together(
    model: Mllama, builder: RequestBuilder, requests: Requests, places: Sequence[str], *, continuations: int
) -> list[Answer | UserError]:
    """Search for the answers to a batch of questions, and continue all candidates, in one compiled call.

    The arguments are those of ``search_together``, whose ``builder`` is a ``RolloutBuilder`` here.

    Args:
        model: Model in the unrolled layout.
        builder: Builder of the requests.
        requests: The questions.
        places: Words that say in an error which question it is.
        continuations: Number of continuations of a candidate.

    Returns:
        A ``RolledOutAnswer`` to each question, or what is wrong with its numbers.
    """
    assert isinstance(builder, RolloutBuilder)
    program = functools.partial(search_rollouts, rollout_tables=builder.rollout_tables, continuations=continuations)
    results, seconds = run_program(program, model, builder, requests)
    answers = make_answers(model, builder, requests, places, results, seconds)
    return [
        answer if isinstance(answer, UserError) else _rolled_out(builder.processor, answer, split_stages(results, i))
        for i, answer in enumerate(answers)
    ]


def _rolled_out(processor: Processor, answer: Answer, stages: Sequence[StageResult]) -> RolledOutAnswer:
    """Return an answer with the continuations in the results of its stages, in host arrays."""
    format, rollouts = answer.trace.format, list[StageRollouts]()
    won, concluded = list[str](), ""
    for number, (trace, result) in enumerate(zip(answer.trace.stages, stages, strict=True)):
        assert isinstance(result, RolloutResult) and result.scores is not None
        texts = [tagged_text(format, trace.stage, candidate) for candidate in trace.candidates]
        bodies = [concluded] * len(texts)
        if trace.stage == format.conclusion:
            bodies = [body_of(each.text + each.added, format[trace.stage]) for each in trace.candidates]
        if number + 1 < len(stages):
            opening, answers = format.stages[number + 1].opening or "", list[list[WholeAnswer]]()
            for i, (text, body) in enumerate(zip(texts, bodies, strict=True)):
                continuations = [
                    ((opening + processor.decode(ids)).strip(), is_cut)
                    for ids, is_cut in _ends_of(jax.tree.map(lambda x: x[i], result.continuations))  # noqa: B023
                ]
                answers.append(
                    [
                        WholeAnswer(join_stages([*won, text, end]), body or _concluded(end, format), is_cut)
                        for end, is_cut in continuations
                    ]
                )
        else:
            answers = [
                [WholeAnswer(join_stages([*won, text]), body, candidate.ended == "max_new_tokens")]
                for text, body, candidate in zip(texts, bodies, trace.candidates, strict=True)
            ]
        rollouts.append(
            StageRollouts(
                before=join_stages(won),
                texts=texts,
                answers=answers,
                mean_log_probs=[candidate.mean_log_prob for candidate in trace.candidates],
                scores=_scores_of(result.scores, len(texts)),
                answer_scores=_scores_of(result.answer_scores, len(texts)),
                winner=trace.winner,
            )
        )
        won.append(texts[trace.winner])
        concluded = bodies[trace.winner]
    return RolledOutAnswer(answer.text, answer.stages, answer.conclusion, answer.trace, rollouts)


def _concluded(text: str, format: StageFormat) -> str:
    """Return the body of the conclusion in the text of a continuation, which is empty where there is none."""
    return find_stages(text, format).get(format.conclusion, "")


def _ends_of(samples: Samples) -> list[tuple[list[int], bool]]:
    """Return the tokens of text of each sample, and whether they are cut, out of host arrays [samples, ...]."""
    each = zip(samples.tokens, samples.lengths, samples.ended, strict=True)
    return [(ids[:length].tolist(), bool(ended == EndReason.MAX_NEW_TOKENS)) for ids, length, ended in each]


def _scores_of(scores: StageScores, count: int) -> list[tuple[float, float]]:
    """Return the score of each of ``count`` candidates, and the probability of neither answer, out of host arrays."""
    pairs = zip(scores.score[:count].tolist(), scores.other_probability[:count].tolist(), strict=True)
    return [(float(score), float(other)) for score, other in pairs]
