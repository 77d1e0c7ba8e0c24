"""The search sentence by sentence as one compiled program, from images and prompts to the winner of each sentence.

A sentence takes the pieces that a stage takes: prefill what is pending, the prompt or the last winner; sample
candidates over the prefix until each has ended its sentence or the answer; score them; choose one. The stop table reads
whole answers: it goes on with a sentence in the state in which the winner of the last one has left it.

The sentences of all questions of a batch are sampled side by side, up to the largest number of sentences, and no longer
than until every answer has ended. What a question draws hangs on its seed and the number of the sentence alone.
"""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int

from llava_cot_jax.inference.decoding import Decoder, EndReason, Samples, StopConditions, sample
from llava_cot_jax.inference.ragged_tokens import RaggedTokens, concat
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.kv_cache import Segment
from llava_cot_jax.model.parameters import Params
from llava_cot_jax.model.sharding import use_mesh
from llava_cot_jax.search.judge import JudgeInputs, StageJudge
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
from llava_cot_jax.search.scorers import Judge, Verifier
from llava_cot_jax.search.strategies import SearchSpec
from llava_cot_jax.search.tables import ScorerTables, StageTables
from llava_cot_jax.search.tournament import StageJudgement, run_tournament
from llava_cot_jax.search.verifier import StageScores, rank_candidates, score_candidates


@functools.partial(jax.jit, static_argnames=("config", "spec", "prefill_chunk", "mesh"))
def search_sentences(
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
    """Search for the answers of a batch of questions sentence by sentence.

    The arguments are those of ``program.search``.

    Returns:
        The result of each sentence, with a leading axis of ``spec.max_sentences``. The candidates of sentences that an
        answer does not have are unused.
    """
    with use_mesh(mesh):
        decoder = Decoder(params, config, encode_question_images(params, config, inputs), prefill_chunk)
        return SentenceSearch(StageSearch(decoder, spec, inputs, stage_tables, scorer_tables)).run()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SentenceState:
    """State of the search between sentences.

    Attributes:
        number: int32, number of sentences that are written.
        prefix: KV cache of the prompts and of the winners that are prefilled.
        pending: Tokens to prefill before the next sentence, [questions]: the prompt or the last winner.
        answer: Tokens of the answers so far, [questions].
        stop_state: int32, state of the stop table after each answer so far.
        done: Whether an answer has ended.
    """

    number: Int[Array, ""]
    prefix: Segment
    pending: RaggedTokens
    answer: RaggedTokens
    stop_state: Int[Array, " questions"]
    done: Bool[Array, " questions"]


@dataclass(frozen=True)
class SentenceSearch:
    """Pieces of the search, each for the next sentence of every question of a batch.

    Attributes:
        stages: Pieces of the search by stages that it shares. Its tables are those of the sentences; of its scorers'
            tables, the first is of a first sentence, and the second of a later one.
    """

    stages: StageSearch

    @property
    def spec(self) -> SearchSpec:
        """Static part of the search."""
        return self.stages.spec

    @property
    def longest_answer(self) -> int:
        """Largest number of tokens of an answer."""
        return self.spec.max_new_tokens[0]

    def run(self) -> StageResult:
        """Search until every answer has ended, or has as many sentences as it may have."""
        start = self.init_state()
        shapes = jax.eval_shape(self.write_sentence, start)[1]
        results = unused_results(self.spec.max_sentences, shapes)

        def goes_on(carry: tuple[SentenceState, StageResult]) -> jax.Array:
            state, _ = carry
            return (state.number < self.spec.max_sentences) & ~state.done.all()

        def write(carry: tuple[SentenceState, StageResult]) -> tuple[SentenceState, StageResult]:
            state, results = carry
            after, result = self.write_sentence(state)
            return after, jax.tree.map(lambda old, new: old.at[state.number].set(new), results, result)

        return jax.lax.while_loop(goes_on, write, (start, results))[1]

    def init_state(self) -> SentenceState:
        """Return the state before the first sentence, with the prompts pending."""
        zeros = jnp.zeros(self.stages.num_questions, jnp.int32)
        return SentenceState(
            number=jnp.int32(0),
            prefix=self.stages.init_prefix(),
            pending=self.stages.opened_prompts(),
            answer=RaggedTokens(jnp.zeros((self.stages.num_questions, self.longest_answer), jnp.int32), zeros),
            stop_state=zeros,
            done=zeros > 0,
        )

    @jax.named_scope("sentence")
    def write_sentence(self, state: SentenceState) -> tuple[SentenceState, StageResult]:
        """Sample the candidates of each question's next sentence, and choose the winner."""
        prefix, logits = self.stages.extend_prefix(state.prefix, state.pending)
        own, candidates = self.sample(prefix, logits, state)
        scores = self.score((prefix, own), candidates, state)
        winner, judgement = self.choose(candidates, scores, state)
        result = StageResult(candidates, winner, judgement, scores, state.pending.lengths, candidates.lengths)
        return self.advance(replace(state, prefix=prefix), candidates, winner), result

    @jax.named_scope("candidates")
    def sample(self, prefix: Segment, logits: jax.Array, state: SentenceState) -> tuple[Segment, Samples]:
        """Sample the candidates of a sentence, [questions, candidates], and return the segment that caches them."""
        spec, lengths = self.spec, self.stages.lengths
        suffix = self.stages.decoder.init_cache(self.stages.num_questions * spec.num_candidates[0], lengths.candidate)
        samples = sample(
            self.stages.decoder,
            jnp.repeat(logits, spec.num_candidates[0], axis=0),
            candidate_cache(suffix, (prefix,)),
            self.stops(state),
            capacity=lengths.candidate,
            sampling=spec.sampling,
        )
        layers, candidates = samples[0], by_question(samples[1], self.stages.num_questions)
        return Segment(layers, candidates.num_cached.reshape(-1)), candidates

    def stops(self, state: SentenceState) -> StopConditions:
        """Return when the candidates of a sentence end, and what they are drawn with."""
        each = functools.partial(jnp.repeat, repeats=self.spec.num_candidates[0])
        left = jnp.minimum(self.longest_answer - state.answer.lengths, self.stages.lengths.candidate)
        stops = candidate_stops(self.spec, self.stages.tables.stop_tables, self.keys(state), jnp.zeros_like(left))
        return replace(stops, max_new_tokens=each(left), used=each(~state.done), state=each(state.stop_state))

    def keys(self, state: SentenceState) -> jax.Array:
        """Return the random key of each question's sentence."""
        return stage_keys(self.stages.inputs.seeds, jnp.broadcast_to(state.number, self.stages.num_questions))

    def scored_stage(self, state: SentenceState) -> Int[Array, " questions"]:
        """Return the index of the sentence in the tables of the scorers: 0 for a first one, 1 for a later one."""
        return jnp.broadcast_to(jnp.minimum(state.number, 1), self.stages.num_questions)

    def score(self, chain: tuple[Segment, ...], candidates: Samples, state: SentenceState) -> StageScores | None:
        """Return the verifier's scores of the candidates; None where another scorer chooses."""
        tables = self.stages.scorer_tables.verifier
        if tables is None:
            return None
        nothing = self.stages.tables.closings[jnp.zeros_like(candidates.lengths), 0]
        return score_candidates(self.stages.decoder, chain, candidates, nothing, self.scored_stage(state), tables)

    def choose(
        self, candidates: Samples, scores: StageScores | None, state: SentenceState
    ) -> tuple[Int[Array, " questions"], StageJudgement | None]:
        """Return the candidate that wins, int32, and the outcome of the judge's tournament, if there is one."""
        (scorer,), mean_log_prob = self.spec.scorers, candidates.mean_log_prob
        if isinstance(scorer, Verifier):
            assert scores is not None
            return rank_candidates(scores.score, mean_log_prob)[:, 0], None
        if not isinstance(scorer, Judge) or self.stages.scorer_tables.judge is None:
            return jnp.argmax(mean_log_prob, axis=-1).astype(jnp.int32), None
        inputs = JudgeInputs(
            stage=self.scored_stage(state),
            texts=candidates.text,
            mean_log_prob=mean_log_prob,
            num_candidates=jnp.where(state.done, 1, self.spec.num_candidates[0]),
            chat_headers=self.stages.inputs.chat_headers,
            question=self.stages.inputs.question,
            earlier=state.answer[:, None],
            keys=self.keys(state),
        )
        judge = StageJudge(self.stages.decoder, scorer, inputs, self.stages.scorer_tables.judge, self.spec.sampling)
        judgement = run_tournament(judge)
        return judgement.winner, judgement

    def advance(self, state: SentenceState, candidates: Samples, winner: Int[Array, " questions"]) -> SentenceState:
        """Return the state after a sentence whose winner is chosen, which is pending now."""
        won: Samples = jax.tree.map(lambda x: x[jnp.arange(self.stages.num_questions), winner], candidates)
        answer = concat((state.answer, won.text), self.longest_answer)
        num_states = self.stages.tables.num_states
        closed = won.state == 2 * num_states  # the last accepting state of ``sentence_automaton``
        done = state.done | closed | (won.ended == EndReason.EOS) | (answer.lengths >= self.longest_answer)
        return SentenceState(
            number=state.number + 1,
            prefix=state.prefix,
            pending=concat((won.text.where(~done),), self.stages.lengths.pending),
            answer=answer,
            stop_state=jnp.where(won.state >= num_states, won.state - num_states, won.state),
            done=done,
        )
