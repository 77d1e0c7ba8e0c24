"""The search in pieces, and the whole of it as one compiled program, from images and prompts to each stage's winner.

A stage of a question takes five pieces. ``StageSearch`` has them, for a batch of questions:

    extend_prefix  prefill what is pending: the prompt, or the last winner, and the opening of the stage
    sample         sample the stage's candidates over the prefix, which is not copied
    score          score the candidates by the verifier, over their own cache, which is not copied either
    choose         let the scorer of the stage choose a candidate
    advance        note the winner, which is pending now, and go to the next stage

Every question has a stage of its own (``SearchProgress.stage``), and the tables of openings, closings, temperatures,
lengths and prompts are gathered by it, so that a batch may hold questions of different stages. What a question draws
hangs on its seed and its stage alone. ``search`` runs the pieces in a loop inside one program, with all questions in
the same stage. A host can compile the same pieces on their own, and drive them from one stage to the next; ``sample``
is then ``start_samples`` and, as often as is wished, ``continue_samples``. The searches by sentences and by rounds are
programs of their own that take some of the pieces.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, UInt8, UInt32

from llava_cot_jax.inference.decoding import (
    Decoder,
    EndReason,
    Samples,
    StopConditions,
    encode_images,
    prefill,
    sample,
)
from llava_cot_jax.inference.ragged_tokens import RaggedTokens, concat
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.image_context import ImageContext
from llava_cot_jax.model.kv_cache import CacheLayers, KVCache, Segment
from llava_cot_jax.model.parameters import Params
from llava_cot_jax.model.sharding import use_mesh
from llava_cot_jax.search.judge import JudgeInputs, StageJudge
from llava_cot_jax.search.lengths import SearchLengths
from llava_cot_jax.search.random_keys import Draw, fold_in_each
from llava_cot_jax.search.scorers import Judge, LogProbability, Verifier
from llava_cot_jax.search.stage_ends import end_stage
from llava_cot_jax.search.strategies import SearchSpec
from llava_cot_jax.search.tables import BLANK_LINE, ScorerTables, StageTables, VerifierTables
from llava_cot_jax.search.tournament import StageJudgement, run_tournament
from llava_cot_jax.search.verifier import StageScores, rank_candidates, score_candidates

ACCELERATOR_CHUNK, CPU_CHUNK = 256, 64
"""Number of tokens of each question that are prefilled at a time, on an accelerator and on a CPU."""


def default_prefill_chunk(mesh: Mesh | None) -> int:
    """Return the number of tokens to prefill at a time: enough to hide the reading of the weights on an accelerator."""
    device = mesh.devices.flat[0] if mesh else jax.devices()[0]
    return CPU_CHUNK if device.platform == "cpu" else ACCELERATOR_CHUNK


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SearchInputs:
    """Batch of questions, as the compiled search takes it.

    Attributes:
        model_inputs: Arrays by the names of the arguments of ``Mllama``, padded on the right.
        lengths: int32, number of tokens of each prompt.
        seeds: uint32, seed of each question's draws.
        question: Text of each question as the judge is told it, [questions].
        chat_headers: Beginning of the judge's prompts, [kinds, questions].
    """

    model_inputs: Mapping[str, jax.Array]
    lengths: Int[Array, " questions"]
    seeds: UInt32[Array, " questions"]
    question: RaggedTokens
    chat_headers: RaggedTokens


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StageResult:
    """Result of a stage of each question. That of a whole search has a leading axis of stages in each array.

    Attributes:
        candidates: Candidates, [questions, candidates].
        winner: int32, the candidate that won.
        judgement: Outcome of the judge's tournament; None where no stage has a judge.
        scores: Scores of the verifier; None where no stage has a verifier.
        num_prefilled: int32, number of tokens prefilled before the stage: the prompt or the last winner, and what
            closes a stage and opens the next. In a retracing search, where no winner is read again, it is the prompt,
            or the last token of each candidate that is continued, and what closes and opens.
        kept: int32, number of tokens that are kept of each candidate: those before the opening of the next stage.
        parent: int32, the candidate of the stage before that each candidate continues, in a retracing search, where it
            is not the winner; for a conclusion it counts the reasonings of all rounds.
    """

    candidates: Samples
    winner: Int[Array, " questions"]
    judgement: StageJudgement | None
    scores: StageScores | None
    num_prefilled: Int[Array, " questions"]
    kept: Int[Array, "questions candidates"]
    parent: Int[Array, "questions candidates"] | None = None


def unused_results(count: int, like: StageResult) -> StageResult:
    """Return ``count`` results without candidates, of the shapes of ``like``, with a leading axis."""
    none = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), like)
    unused = jnp.full_like(none.candidates.ended, EndReason.UNUSED)
    return replace(none, candidates=replace(none.candidates, ended=unused))


@functools.partial(jax.jit, static_argnames=("config", "spec", "prefill_chunk", "mesh"))
def search(
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
    """Search for the answers of a batch of questions.

    The vision tower runs once, and a prompt is prefilled once. The stages are one loop. Each appends the winner of the
    stage before to the prefix, and samples and judges its candidates over the prefix without copying it.

    Args:
        params: Parameters of the model, in the unrolled layout.
        inputs: The questions.
        stage_tables: Tables of the stages of ``spec``.
        scorer_tables: Tables of the judge and the verifier of ``spec``.
        config: Configuration of the model.
        spec: Static part of the search.
        prefill_chunk: Number of tokens of each question that are prefilled at a time.
        mesh: Mesh of the model's devices; None on one device.
    """
    with use_mesh(mesh):
        decoder = Decoder(params, config, encode_question_images(params, config, inputs), prefill_chunk)
        stage_search = StageSearch(decoder, spec, inputs, stage_tables, scorer_tables)
        start = SearchState(stage_search.init_prefix(), stage_search.init_progress())
        return jax.lax.scan(lambda state, _: stage_search.run_stage(state), start, length=spec.num_stages)[1]


def encode_question_images(params: Params, config: MllamaConfig, inputs: SearchInputs) -> ImageContext | None:
    """Run the vision tower on the images of questions; None where there are none."""
    return encode_images(params, config, inputs.model_inputs, inputs.lengths)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SearchProgress:
    """How far the search of each question is, apart from its KV cache.

    Attributes:
        stage: int32, index of the stage that is to be sampled; the number of stages once there is an answer.
        pending: Tokens to prefill before that stage, [questions].
        winners: Winner of each stage as the judge is shown it, [questions, stages]; empty where the stage is still to
            come.
    """

    stage: Int[Array, " questions"]
    pending: RaggedTokens
    winners: RaggedTokens


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SearchState:
    """State of the search of each question between stages.

    Attributes:
        prefix: KV cache of the prompts and of the winners that are prefilled.
        progress: Stages of the questions, and what is pending.
    """

    prefix: Segment
    progress: SearchProgress


@dataclass(frozen=True)
class StageSearch:
    """Pieces of the search, each for the present stage of every question of a batch.

    Attributes:
        decoder: Model and images.
        spec: Static part of the search.
        inputs: The questions.
        tables: Tables of the stages.
        scorer_tables: Tables of the judge and the verifier.
    """

    decoder: Decoder
    spec: SearchSpec
    inputs: SearchInputs
    tables: StageTables
    scorer_tables: ScorerTables

    @property
    def num_questions(self) -> int:
        """Number of questions."""
        return len(self.inputs.lengths)

    @property
    def lengths(self) -> SearchLengths:
        """Lengths that the arrays have room for."""
        return SearchLengths.of(self.spec, self.tables, self.inputs.model_inputs["input_ids"].shape[1])

    def init_progress(self) -> SearchProgress:
        """Return the progress before the first stage, with the prompts pending."""
        questions = self.num_questions
        shape = (questions, self.spec.num_stages)
        winners = RaggedTokens(jnp.zeros((*shape, self.lengths.text), jnp.int32), jnp.zeros(shape, jnp.int32))
        return SearchProgress(jnp.zeros(questions, jnp.int32), self.opened_prompts(), winners)

    def opened_prompts(self) -> RaggedTokens:
        """Return the prompts with the opening of the first stage, if it has one, [questions]."""
        prompt = RaggedTokens(self.inputs.model_inputs["input_ids"], self.inputs.lengths)
        return concat((prompt, self.tables.openings[0, BLANK_LINE]), self.lengths.pending)

    def init_prefix(self, tokens: int | None = None) -> Segment:
        """Return an empty KV cache with room for ``tokens`` tokens; by default, for the prompts and the winners."""
        capacity = self.lengths.prefix if tokens is None else tokens
        layers = self.decoder.init_cache(self.num_questions, capacity + self.decoder.prefill_chunk)
        return Segment(layers, jnp.zeros(self.num_questions, jnp.int32))

    @jax.named_scope("stage")
    def run_stage(self, state: SearchState) -> tuple[SearchState, StageResult]:
        """Sample the candidates of each question's stage, and choose the winner."""
        progress = state.progress
        prefix, logits = self.extend_prefix(state.prefix, progress.pending)
        own, candidates = self.sample(prefix, logits, progress.stage)
        scores = self.score((prefix, own), candidates, progress.stage)
        winner, judgement = self.choose(candidates, scores, progress)
        kept = self.kept(candidates, progress.stage).lengths
        result = StageResult(candidates, winner, judgement, scores, progress.pending.lengths, kept)
        return SearchState(prefix, self.advance(progress, candidates, winner)), result

    @jax.named_scope("extend_prefix")
    def extend_prefix(self, prefix: Segment, pending: RaggedTokens) -> tuple[Segment, Float[Array, "questions vocab"]]:
        """Prefill the pending tokens. Return the longer prefix, and the logits after it."""
        return extend_chain(self.decoder, (prefix,), pending)

    def sample(
        self,
        prefix: Segment,
        logits: Float[Array, "questions vocab"],
        stage: Int[Array, " questions"],
        capacity: int | None = None,
    ) -> tuple[Segment, Samples]:
        """Sample the candidates of a stage, [questions, candidates]. Return them after the segment that caches them.

        The segment has room for ``capacity`` tokens of each candidate; by default, for those that are sampled.
        """
        room = self.lengths.candidate if capacity is None else capacity
        suffix = self.decoder.init_cache(self.num_questions * max(self.spec.num_candidates), room)
        keys, tables = stage_keys(self.inputs.seeds, stage), self.tables.stop_tables
        layers, samples = sample_candidates(self.decoder, self.spec, logits, (prefix,), suffix, tables, keys, stage)
        candidates = by_question(samples, self.num_questions)
        return self.segment(layers, candidates, stage), candidates

    def segment(self, layers: CacheLayers, candidates: Samples, stage: Int[Array, " questions"]) -> Segment:
        """Return the segment of the cache that holds what is kept of candidates, but for the last token of each."""
        return Segment(layers, self.cut(candidates, stage).num_cached.reshape(-1))

    def kept(self, candidates: Samples, stage: Int[Array, " questions"]) -> RaggedTokens:
        """Return the tokens that are kept of candidates: those before the opening of the next stage."""
        return end_stage(candidates, self.tables, stage)[0]

    def cut(self, candidates: Samples, stage: Int[Array, " questions"]) -> Samples:
        """Return candidates that have no more tokens than are kept of them."""
        return replace(candidates, lengths=self.kept(candidates, stage).lengths)

    def score(
        self, chain: tuple[Segment, ...], candidates: Samples, stage: Int[Array, " questions"]
    ) -> StageScores | None:
        """Return the verifier's scores of the candidates; None where no stage has a verifier.

        A question whose stage has another scorer takes no work, and has the scores 0.

        Args:
            chain: Segments up to the candidates' own, root first.
            candidates: Candidates, [questions, candidates].
            stage: int32, index of each question's stage.
        """
        tables = self.scorer_tables.verifier
        if tables is None:
            return None
        is_its_stage = jnp.array([isinstance(scorer, Verifier) for scorer in self.spec.scorers])[stage]
        scored = replace(candidates, ended=jnp.where(is_its_stage[:, None], candidates.ended, EndReason.UNUSED))
        return self.score_all(chain, scored, stage, tables)

    def score_all(
        self,
        chain: tuple[Segment, ...],
        candidates: Samples,
        stage: Int[Array, " questions"],
        tables: VerifierTables,
    ) -> StageScores:
        """Return the verifier's scores of the candidates of any stage; the other arguments are those of ``score``."""
        closings = self.tables.closings[stage[:, None], candidates.state]
        return score_candidates(self.decoder, chain, self.cut(candidates, stage), closings, stage, tables)

    def choose(
        self, candidates: Samples, scores: StageScores | None, progress: SearchProgress
    ) -> tuple[Int[Array, " questions"], StageJudgement | None]:
        """Return the candidate that wins a stage, int32, and the outcome of the judge's tournament, if there is one.

        Every scorer runs once, for the questions whose stage is its own. Without a scorer the first candidate wins.
        """
        stage, mean_log_prob = progress.stage, candidates.mean_log_prob
        winner, judgement = jnp.zeros(self.num_questions, jnp.int32), None
        for scorer in self.spec.distinct_scorers:
            is_its_stage = jnp.array([each == scorer for each in self.spec.scorers])[stage]
            if scorer == self.spec.judge:
                judgement = self._judge(scorer, candidates, mean_log_prob, is_its_stage, progress)
                chosen = judgement.winner
            elif isinstance(scorer, Verifier):
                assert scores is not None
                chosen = rank_candidates(scores.score, mean_log_prob)[:, 0]
            elif isinstance(scorer, LogProbability):
                chosen = jnp.argmax(mean_log_prob, axis=-1).astype(jnp.int32)
            else:  # a judge that has nothing to choose between, or a function, which the host calls
                continue
            winner = jnp.where(is_its_stage, chosen, winner)
        return winner, judgement

    def _judge(
        self,
        judge: Judge,
        candidates: Samples,
        mean_log_prob: Float[Array, "questions candidates"],
        is_judged: Bool[Array, " questions"],
        progress: SearchProgress,
    ) -> StageJudgement:
        """Let the judge choose a candidate of the questions that are judged; that of another question is the first."""
        tables = self.scorer_tables.judge
        assert tables is not None
        inputs = JudgeInputs(
            stage=progress.stage,
            texts=self.texts(candidates, progress.stage),
            mean_log_prob=mean_log_prob,
            num_candidates=jnp.where(is_judged, jnp.array(self.spec.num_candidates)[progress.stage], 1),
            chat_headers=self.inputs.chat_headers,
            question=self.inputs.question,
            earlier=progress.winners[:, :-1],
            keys=stage_keys(self.inputs.seeds, progress.stage),
        )
        return run_tournament(StageJudge(self.decoder, judge, inputs, tables, self.spec.sampling))

    def advance(
        self, progress: SearchProgress, candidates: Samples, winner: Int[Array, " questions"]
    ) -> SearchProgress:
        """Return the progress after a stage whose winner is chosen: the winner and the next opening are pending."""
        stage, tables = progress.stage, self.tables
        question = jnp.arange(self.num_questions)
        kept, line_breaks = end_stage(candidates, tables, stage)
        closings = tables.closings[stage[:, None], candidates.state]
        each = (kept, line_breaks, closings, self.texts(candidates, stage))
        won, won_breaks, won_closing, won_text = jax.tree.map(lambda x: x[question, winner], each)
        opening = tables.openings[jnp.minimum(stage + 1, self.spec.num_stages - 1), won_breaks]
        pending = concat((won, won_closing, opening), self.lengths.pending)
        winners = jax.tree.map(lambda old, new: old.at[question, stage].set(new), progress.winners, won_text)
        return SearchProgress(stage + 1, pending, winners)

    def texts(self, candidates: Samples, stage: Int[Array, " questions"]) -> RaggedTokens:
        """Return candidates as the judge is shown them, with opening and closing, [questions, candidates]."""
        tables, at = self.tables, stage[:, None]
        labels = tables.openings[at, BLANK_LINE] if tables.labels is None else tables.labels[at]
        closings = tables.closings[at, candidates.state]
        return concat((labels, self.kept(candidates, stage), closings), self.lengths.text)


def extend_chain(
    decoder: Decoder, chain: Sequence[Segment], tokens: RaggedTokens
) -> tuple[Segment, Float[Array, "rows vocab"]]:
    """Prefill tokens after each row of the last segment of a chain, over the segments before it.

    Args:
        decoder: Model and images.
        chain: Segments, root first. The last needs room for a chunk more than there are tokens.
        tokens: Tokens to append, [rows].

    Returns:
        The last segment with these tokens, and the float32 logits after it.
    """
    *shared, last = chain
    layers, logits = prefill(decoder, tokens, KVCache(last.layers, last.lengths, tuple(shared)))
    return Segment(layers, last.lengths + tokens.lengths), logits


def stage_keys(seeds: UInt32[Array, " questions"], stage: Int[Array, " questions"]) -> Key[Array, " questions"]:
    """Return the random key of each question's stage."""
    return jax.vmap(lambda seed, stage: jax.random.fold_in(jax.random.key(seed), stage))(seeds, stage)


def by_question(samples: Samples, questions: int) -> Samples:
    """Return samples of sequences as [questions, candidates]."""
    return jax.tree.map(lambda x: x.reshape(questions, -1, *x.shape[1:]), samples)


@jax.named_scope("candidates")
def sample_candidates(
    decoder: Decoder,
    spec: SearchSpec,
    logits: Float[Array, "groups vocab"],
    chain: tuple[Segment, ...],
    suffix: CacheLayers,
    stop_tables: UInt8[Array, "stages states vocab"],
    keys: Key[Array, " groups"],
    stage: Int[Array, " groups"],
) -> tuple[CacheLayers, Samples]:
    """Sample the candidates of a stage, those of a group side by side.

    A group is a row of the last segment: a question, or a candidate whose continuations are sampled.

    Args:
        decoder: Model and images.
        spec: Static part of the search.
        logits: float32 logits after the chain.
        chain: Segments that the candidates of a group share, root first.
        suffix: Room for the candidates' keys and values, [groups * candidates].
        stop_tables: uint8, stop table of what ends each stage.
        keys: Random keys of the stage.
        stage: int32, index of each group's stage.

    Returns:
        The candidates' keys and values, and the candidates, [groups * candidates].
    """
    stop = candidate_stops(spec, stop_tables, keys, stage)
    cache = candidate_cache(suffix, chain)
    logits = jnp.repeat(logits, max(spec.num_candidates), axis=0)
    return sample(decoder, logits, cache, stop, capacity=max(spec.max_new_tokens), sampling=spec.sampling)


def candidate_cache(suffix: CacheLayers, chain: tuple[Segment, ...]) -> KVCache:
    """Return the KV cache of candidates without a token."""
    batch = jax.tree.leaves(suffix)[0].shape[0]
    return KVCache(suffix, jnp.zeros(batch, jnp.int32), chain)


def candidate_stops(
    spec: SearchSpec,
    stop_tables: UInt8[Array, "stages states vocab"],
    keys: Key[Array, " groups"],
    stage: Int[Array, " groups"],
) -> StopConditions:
    """Return when the candidates of each group's stage end, and what they are drawn with.

    The arguments are those of ``sample_candidates``.
    """
    most = max(spec.num_candidates)
    candidate_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, Draw.CANDIDATE)
    each = jax.vmap(fold_in_each, (0, None))(candidate_keys, jnp.arange(most))
    used = jnp.arange(most) < jnp.array(spec.num_candidates)[stage][:, None]
    return StopConditions(
        stop_tables=stop_tables,
        table=jnp.repeat(stage, most),
        max_new_tokens=jnp.repeat(jnp.array(spec.max_new_tokens)[stage], most),
        temperature=jnp.repeat(jnp.array(spec.temperatures, jnp.float32)[stage], most),
        keys=each.reshape(-1),
        used=used.reshape(-1),
    )
