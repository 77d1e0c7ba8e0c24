"""The retracing search as one compiled program, from images and prompts to the conclusions.

Its cache is a chain of segments, to which every stage adds one. What is kept of a stage is selected by rows, and the
end of each row with the opening of the next stage is appended to it. So no token is computed twice:

    prompt | summary | captions that are kept, or those of the best reasonings | the best reasonings | conclusions
    [questions]        [questions * keep]       [questions * pool]               [questions * pool]

The best reasonings of all rounds, each with its caption, are a pool of fixed size, which every round is merged into.
The rounds of all questions of a batch run side by side, and a question that needs no more of them samples nothing.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from llava_cot_jax.inference.decoding import Decoder, EndReason, Samples, sample
from llava_cot_jax.inference.ragged_tokens import concat
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.kv_cache import Segment
from llava_cot_jax.model.parameters import Params
from llava_cot_jax.model.sharding import use_mesh
from llava_cot_jax.search.program import (
    SearchInputs,
    StageResult,
    StageSearch,
    by_question,
    candidate_cache,
    candidate_stops,
    encode_question_images,
    stage_keys,
    unused_results,
)
from llava_cot_jax.search.random_keys import Draw, fold_in_each
from llava_cot_jax.search.rollouts import append_joints, joint_tokens, row_capacity
from llava_cot_jax.search.rounds import Rounds
from llava_cot_jax.search.stage_ends import end_stage
from llava_cot_jax.search.strategies import SearchSpec
from llava_cot_jax.search.tables import ScorerTables, StageTables
from llava_cot_jax.search.verifier import StageScores, rank_candidates

SUMMARY, CAPTION, REASONING, CONCLUSION = range(4)

_Tree = TypeVar("_Tree")


@functools.partial(jax.jit, static_argnames=("config", "spec", "prefill_chunk", "mesh"))
def search_retracing(
    params: Params,
    inputs: SearchInputs,
    stage_tables: StageTables,
    scorer_tables: ScorerTables,
    *,
    config: MllamaConfig,
    spec: SearchSpec,
    prefill_chunk: int,
    mesh: Mesh | None,
) -> StageResult:
    """Search for the answers of a batch of questions, going back to new captions while the reasonings are weak.

    The arguments are those of ``program.search``.

    Returns:
        The result of each stage: the summary, captions and reasonings of every round in turn, and the conclusions. The
        candidates of rounds that a question does not have are unused, and so are those beyond a stage's number.
    """
    with use_mesh(mesh):
        decoder = Decoder(params, config, encode_question_images(params, config, inputs), prefill_chunk)
        return RetracingSearch(StageSearch(decoder, spec, inputs, stage_tables, scorer_tables)).run()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Branch:
    """Candidates of a stage with the end of the chain that they are cached in.

    Attributes:
        own: Keys and values of what is kept of the candidates, but for the last token of each,
            [questions * candidates].
        candidates: Candidates, [questions, candidates].
        scores: Scores of the verifier; None for a summary.
        parent: int32, the candidate before that each continues.
    """

    own: Segment
    candidates: Samples
    scores: StageScores | None
    parent: Int[Array, "questions candidates"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pool:
    """The best reasonings of all rounds so far, best first.

    Attributes:
        score: float32, their scores; -inf where there is none yet.
        number: int32, number of each, counted over the reasonings of all rounds.
        candidates: The reasonings, [questions, pool].
        captions: Keys and values of the caption before each, with the opening of the reasoning, [questions * pool].
        reasonings: Keys and values of the reasonings, [questions * pool].
    """

    score: Float[Array, "questions pool"]
    number: Int[Array, "questions pool"]
    candidates: Samples
    captions: Segment
    reasonings: Segment


@dataclass(frozen=True)
class RetracingSearch:
    """Pieces of the retracing search, for a batch of questions.

    Attributes:
        stages: Pieces of the search by stages that it shares.
    """

    stages: StageSearch

    @property
    def spec(self) -> SearchSpec:
        """Static part of the search."""
        return self.stages.spec

    @property
    def rounds(self) -> Rounds:
        """Static part of the rounds."""
        assert self.spec.rounds is not None
        return self.spec.rounds

    @property
    def num_questions(self) -> int:
        """Number of questions."""
        return self.stages.num_questions

    @property
    def row_capacity(self) -> int:
        """Number of tokens that the cache of a candidate has room for."""
        return row_capacity(self.spec, self.stages.tables)

    def run(self) -> StageResult:
        """Search for the answers."""
        opened = self.stages.opened_prompts()
        prompt, logits = self.stages.extend_prefix(self.stages.init_prefix(opened.capacity), opened)
        asked = jnp.ones(self.num_questions, bool)
        summary = self.branch((prompt,), logits, SUMMARY, 1, jnp.int32(0), asked)
        first = jnp.zeros((self.num_questions, 1), jnp.int32)
        root, logits, num_joint = self.extend((prompt,), summary, first, SUMMARY)
        chain = (prompt, root)

        def retrace(number: jax.Array, pool: Pool, goes_on: jax.Array) -> tuple[Pool, StageResult]:
            return self.retrace(chain, logits, number, pool, goes_on)

        pool = self.empty_pool()
        shapes = jax.eval_shape(retrace, jnp.int32(0), pool, asked)[1]
        results = unused_results(self.rounds.most, shapes)

        Carry = tuple[Int[Array, ""], Pool, StageResult]
        threshold = self.stages.scorer_tables.threshold
        assert threshold is not None

        def goes_on(pool: Pool) -> Bool[Array, " questions"]:
            return ~(pool.score[:, 1] > threshold)

        def unfinished(carry: Carry) -> jax.Array:
            number, pool, _ = carry
            return (number < self.rounds.most) & goes_on(pool).any()

        def body(carry: Carry) -> Carry:
            number, pool, results = carry
            pool, result = retrace(number, pool, goes_on(pool))
            return number + 1, pool, jax.tree.map(lambda old, new: old.at[number].set(new), results, result)

        _, pool, results = jax.lax.while_loop(unfinished, body, (jnp.int32(0), pool, results))
        concluded = self.conclude(chain, pool)
        rounds = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)  # captions and reasonings in turn
        rounds = replace(rounds, num_prefilled=rounds.num_prefilled.at[0].add(num_joint))
        parts = [_stack([self.result(summary, SUMMARY, opened.lengths)]), rounds, _stack([concluded])]
        return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)

    @jax.named_scope("branch")
    def branch(
        self,
        chain: tuple[Segment, ...],
        logits: Float[Array, "groups vocab"],
        stage: int,
        count: int,
        number: Int[Array, ""],
        used: Bool[Array, " questions"],
    ) -> Branch:
        """Sample ``count`` candidates of a stage after each row of the chain's end, and score them.

        Args:
            chain: Segments that the candidates share, root first.
            logits: float32 logits after the chain.
            stage: Index of the stage.
            count: Number of candidates of a row.
            number: int32, number of the round.
            used: Whether to sample the candidates of a question at all.
        """
        stages, groups = self.stages, len(logits)
        per_question = groups // self.num_questions
        spec = replace(self.spec, num_candidates=(count,) * self.spec.num_stages)
        keys = stage_keys(stages.inputs.seeds, jnp.full(self.num_questions, stage))
        keys = jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, Draw.ROUND), number))(keys)
        each = jax.vmap(fold_in_each, (0, None))(keys, jnp.arange(per_question)).reshape(-1)
        stop = candidate_stops(spec, stages.tables.stop_tables, each, jnp.full(groups, stage))
        suffix = stages.decoder.init_cache(groups * count, self.row_capacity)
        layers, samples = sample(
            stages.decoder,
            jnp.repeat(logits, count, axis=0),
            candidate_cache(suffix, chain),
            replace(stop, used=jnp.repeat(used, per_question * count)),
            capacity=stages.lengths.candidate,
            sampling=spec.sampling,
        )
        candidates, at = by_question(samples, self.num_questions), jnp.full(self.num_questions, stage)
        own = stages.segment(layers, candidates, at)
        scores = None if stage == SUMMARY else stages.score((*chain, own), candidates, at)
        parent = jnp.broadcast_to(jnp.arange(per_question * count) // count, candidates.lengths.shape)
        return Branch(own, candidates, scores, parent)

    @jax.named_scope("extend")
    def extend(
        self, chain: tuple[Segment, ...], branch: Branch, chosen: Int[Array, "questions chosen"], stage: int
    ) -> tuple[Segment, Float[Array, "rows vocab"], Int[Array, " questions"]]:
        """Append what is between two stages to some candidates.

        Args:
            chain: Segments before the candidates.
            branch: Candidates of the stage.
            chosen: int32, the candidates to continue.
            stage: Index of the stage.

        Returns:
            The segment of these candidates, logits after it, and the number of tokens that were read for a question.
        """
        tables, at = self.stages.tables, jnp.full(self.num_questions, stage)
        kept, line_breaks = end_stage(branch.candidates, tables, at)
        cut = replace(branch.candidates, lengths=kept.lengths)
        pieces = (tables.closings[stage, cut.state], tables.openings[stage + 1, line_breaks])
        joints = concat(pieces, joint_tokens(tables)).where(cut.ended != EndReason.UNUSED)
        rows = _take_rows(branch.own, chosen)
        continued, joints = _flatten(_take((cut, joints), chosen))
        segment, logits = append_joints(self.stages.decoder, (*chain, rows), continued, joints)
        num_read = (segment.lengths - rows.lengths).reshape(chosen.shape).sum(axis=1)
        return segment, logits, num_read

    def retrace(
        self, chain: tuple[Segment, ...], logits: jax.Array, number: jax.Array, pool: Pool, used: jax.Array
    ) -> tuple[Pool, StageResult]:
        """Write the captions and the reasonings of a round. Return the pool with them, and both results, stacked."""
        count = self.spec.num_candidates
        captions = self.branch(chain, logits, CAPTION, count[CAPTION], number, used)
        kept = rank(captions)[:, : self.rounds.keep]
        segment, after, num_joint = self.extend(chain, captions, kept, CAPTION)
        each = count[REASONING] // self.rounds.keep
        reasonings = self.branch((*chain, segment), after, REASONING, each, number, used)
        new = self.pool_of(segment, reasonings, number, used)
        told = replace(reasonings, parent=jnp.take_along_axis(kept, reasonings.parent, axis=1))
        nothing = jnp.zeros_like(num_joint)
        both = [self.result(captions, CAPTION, nothing), self.result(told, REASONING, num_joint)]
        return self.merge(pool, new), _stack(both)

    def conclude(self, chain: tuple[Segment, ...], pool: Pool) -> StageResult:
        """Write a conclusion after each of the best reasonings."""
        count = self.spec.num_candidates[CONCLUSION]
        chosen = jnp.broadcast_to(jnp.arange(count), (self.num_questions, count))
        captions = _take_rows(pool.captions, chosen)
        best = Branch(pool.reasonings, pool.candidates, None, pool.number)
        segment, logits, num_joint = self.extend((*chain, captions), best, chosen, REASONING)
        asked = jnp.ones(self.num_questions, bool)
        branch = self.branch((*chain, captions, segment), logits, CONCLUSION, 1, jnp.int32(0), asked)
        return self.result(replace(branch, parent=pool.number[:, :count]), CONCLUSION, num_joint)

    def empty_pool(self) -> Pool:
        """Return a pool without a reasoning."""
        shape = (self.num_questions, self.rounds.pool)
        zeros, rows = jnp.zeros(shape, jnp.int32), self.num_questions * self.rounds.pool
        room = self.stages.decoder.init_cache(rows, self.row_capacity)
        none = Segment(room, jnp.zeros(rows, jnp.int32))
        tokens = jnp.zeros((*shape, self.stages.lengths.candidate), jnp.int32)
        unused = jnp.full(shape, EndReason.UNUSED, jnp.int32)
        samples = Samples(tokens, zeros, unused, zeros, jnp.zeros(shape, jnp.float32))
        return Pool(jnp.full(shape, -jnp.inf), zeros, samples, none, none)

    def pool_of(self, captions: Segment, reasonings: Branch, number: jax.Array, used: jax.Array) -> Pool:
        """Return a pool of the reasonings of a round."""
        assert reasonings.scores is not None
        count = reasonings.parent.shape[1]
        return Pool(
            score=jnp.where(used[:, None], reasonings.scores.score, -jnp.inf),
            number=jnp.broadcast_to(number * count + jnp.arange(count), reasonings.parent.shape),
            candidates=reasonings.candidates,
            captions=_take_rows(captions, reasonings.parent),
            reasonings=reasonings.own,
        )

    def merge(self, old: Pool, new: Pool) -> Pool:
        """Return the pool of the best reasonings of two, of equal ones the older."""
        by_rows = functools.partial(_by_rows, questions=self.num_questions)
        both = [
            replace(pool, captions=by_rows(pool.captions), reasonings=by_rows(pool.reasonings)) for pool in (old, new)
        ]
        joined: Pool = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *both)
        best = rank_candidates(joined.score, joined.candidates.mean_log_prob)[:, : self.rounds.pool]
        taken: Pool = _take(joined, best)
        return replace(taken, captions=_flatten(taken.captions), reasonings=_flatten(taken.reasonings))

    def result(self, branch: Branch, stage: int, num_prefilled: Int[Array, " questions"]) -> StageResult:
        """Return the result of a stage, with room for as many candidates as any stage has."""
        kept = self.stages.kept(branch.candidates, jnp.full(self.num_questions, stage)).lengths
        zeros = jnp.zeros_like(branch.candidates.log_prob)
        scores = StageScores(zeros, zeros, jnp.zeros_like(kept)) if branch.scores is None else branch.scores
        most = max(self.spec.num_candidates)

        def widen(tree: Any) -> Any:
            return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, most - x.shape[1]), *[(0, 0)] * (x.ndim - 2))), tree)

        candidates: Samples = widen(branch.candidates)
        is_there = jnp.arange(most) < kept.shape[1]
        candidates = replace(candidates, ended=jnp.where(is_there, candidates.ended, EndReason.UNUSED))
        winner = rank(branch)[:, 0] if branch.scores is not None else jnp.zeros(self.num_questions, jnp.int32)
        return StageResult(candidates, winner, None, widen(scores), num_prefilled, widen(kept), widen(branch.parent))


def rank(branch: Branch) -> Int[Array, "questions candidates"]:
    """Return the candidates of a stage, best first, int32."""
    assert branch.scores is not None
    return rank_candidates(branch.scores.score, branch.candidates.mean_log_prob)


def _take(tree: _Tree, chosen: Int[Array, "questions chosen"]) -> _Tree:
    """Return those rows of arrays [questions, rows, ...] that are chosen for each question."""
    return jax.tree.map(lambda x: jax.vmap(lambda rows, i: rows[i])(x, chosen), tree)


def _take_rows(segment: Segment, chosen: Int[Array, "questions chosen"]) -> Segment:
    """Return those rows of a segment that are chosen for each question."""
    return _flatten(_take(_by_rows(segment, len(chosen)), chosen))


def _by_rows(tree: _Tree, questions: int) -> _Tree:
    """Return arrays [questions * rows, ...] as [questions, rows, ...]."""
    return jax.tree.map(lambda x: x.reshape(questions, -1, *x.shape[1:]), tree)


def _flatten(tree: _Tree) -> _Tree:
    """Return arrays [questions, rows, ...] as [questions * rows, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def _stack(results: list[StageResult]) -> StageResult:
    """Return results with a leading axis."""
    return jax.tree.map(lambda *x: jnp.stack(x), *results)
