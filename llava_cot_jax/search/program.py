"""The whole search as one compiled program: from images and prompts to the candidates that won each stage."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, UInt8, UInt32

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
from llava_cot_jax.model.kv_cache import CacheLayers, KVCache, Prefix
from llava_cot_jax.model.parameters import Params
from llava_cot_jax.model.sharding import use_mesh
from llava_cot_jax.search.judge import JudgeInputs, StageJudge
from llava_cot_jax.search.lengths import SearchLengths
from llava_cot_jax.search.random_keys import Draw
from llava_cot_jax.search.stage_ends import end_stage
from llava_cot_jax.search.strategies import LogProbability, SearchSpec
from llava_cot_jax.search.tables import BLANK_LINE, JudgeTables, StageTables
from llava_cot_jax.search.tournament import StageJudgement, run_tournament


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
    """Result of a stage. That of a whole search has a leading axis of stages in each array.

    Attributes:
        candidates: Candidates, [questions, candidates].
        winner: int32, the candidate that won.
        judgement: Outcome of the judge's tournament; None where there was no judge.
        num_prefilled: int32, number of tokens prefilled before the stage: the prompt or the last winner, and tags.
        kept: int32, number of tokens that are kept of each candidate: those before the opening of the next stage.
    """

    candidates: Samples
    winner: Int[Array, " questions"]
    judgement: StageJudgement | None
    num_prefilled: Int[Array, " questions"]
    kept: Int[Array, "questions candidates"]


@functools.partial(jax.jit, static_argnames=("config", "spec", "prefill_chunk", "mesh"))
def search(
    params: Params,
    inputs: SearchInputs,
    stage_tables: StageTables,
    judge_tables: JudgeTables | None,
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
        judge_tables: Tables of the judge of ``spec``; None where it has none.
        config: Configuration of the model.
        spec: Static part of the search.
        prefill_chunk: Number of tokens of each question that are prefilled at a time.
        mesh: Mesh of the model's devices; None on one device.
    """
    with use_mesh(mesh):
        images = encode_images(params, config, inputs.model_inputs, inputs.lengths)
        decoder = Decoder(params, config, _close_gates_without_images(images), prefill_chunk)
        keys = jax.vmap(jax.random.key)(inputs.seeds)
        stage_search = _StageSearch(decoder, spec, inputs, stage_tables, judge_tables, keys)
        return jax.lax.scan(stage_search.run_stage, stage_search.init_state(), jnp.arange(spec.num_stages))[1]


def _close_gates_without_images(images: ImageContext | None) -> ImageContext | None:
    """Return the images with the attention gates of questions without an image closed, whatever their neighbours have.

    So a question's answer does not depend on the batch that it is in.
    """
    if images is None:
        return None
    has_image = images.mlp_gate.any(axis=1, keepdims=True)
    return replace(images, attention_gate=images.attention_gate & has_image)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SearchState:
    """State of a search between stages.

    Attributes:
        prefix: KV cache of the prompts and of the winners that are prefilled.
        pending: Tokens to prefill before the next stage, [questions].
        winners: Winner of each stage with its tags, [stages, questions]; empty where the stage is still to come.
    """

    prefix: Prefix
    pending: RaggedTokens
    winners: RaggedTokens


@dataclass(frozen=True)
class _StageSearch:
    """Search for one stage after another.

    Attributes:
        decoder: Model and images.
        spec: Static part of the search.
        inputs: The questions.
        tables: Tables of the stages.
        judge_tables: Tables of the judge; None where there is none.
        keys: Random key of each question.
    """

    decoder: Decoder
    spec: SearchSpec
    inputs: SearchInputs
    tables: StageTables
    judge_tables: JudgeTables | None
    keys: Key[Array, " questions"]

    @property
    def num_questions(self) -> int:
        """Number of questions."""
        return len(self.inputs.lengths)

    @property
    def lengths(self) -> SearchLengths:
        """Lengths that the arrays have room for."""
        return SearchLengths.of(self.spec, self.tables, self.inputs.model_inputs["input_ids"].shape[1])

    def init_state(self) -> SearchState:
        """Return the state before the first stage, with the prompts still to prefill."""
        decoder, lengths, questions = self.decoder, self.lengths, self.num_questions
        prompt = RaggedTokens(self.inputs.model_inputs["input_ids"], self.inputs.lengths)
        pending = concat((prompt, self.tables.openings[0, BLANK_LINE]), lengths.pending)
        shape = (self.spec.num_stages, questions)
        winners = RaggedTokens(jnp.zeros((*shape, lengths.text), jnp.int32), jnp.zeros(shape, jnp.int32))
        prefix = decoder.init_cache(questions, lengths.prefix + decoder.prefill_chunk)
        return SearchState(Prefix(prefix, jnp.zeros(questions, jnp.int32)), pending, winners)

    @jax.named_scope("stage")
    def run_stage(self, state: SearchState, stage: Int[Array, ""]) -> tuple[SearchState, StageResult]:
        """Sample the candidates of a stage and choose the winner."""
        prefix, logits = self._extend_prefix(state)
        keys = jax.vmap(jax.random.fold_in, (0, None))(self.keys, stage)
        candidates = self._sample(prefix, logits, keys, stage)
        kept, line_breaks = end_stage(candidates, self.tables, stage)
        closings = self.tables.closings[stage][candidates.state]  # [questions, candidates]
        label = self.tables.openings[stage, BLANK_LINE] if self.tables.labels is None else self.tables.labels[stage]
        texts = concat((label, kept, closings), self.lengths.text)
        winner, judgement = self._choose(candidates, texts, state.winners, keys, stage)

        won, won_breaks, won_closing, won_text = jax.tree.map(
            lambda x: x[jnp.arange(self.num_questions), winner], (kept, line_breaks, closings, texts)
        )
        next_stage = jnp.minimum(stage + 1, self.spec.num_stages - 1)
        next_opening = self.tables.openings[next_stage][won_breaks]
        pending = concat((won, won_closing, next_opening), self.lengths.pending)
        winners = jax.tree.map(lambda old, new: old.at[stage].set(new), state.winners, won_text)
        result = StageResult(candidates, winner, judgement, state.pending.lengths, kept.lengths)
        return SearchState(prefix, pending, winners), result

    @jax.named_scope("extend_prefix")
    def _extend_prefix(self, state: SearchState) -> tuple[Prefix, Float[Array, "questions vocab"]]:
        """Prefill the pending tokens. Return the longer prefix, and the logits after it."""
        before = KVCache(state.prefix.layers, state.prefix.lengths)
        layers, logits = prefill(self.decoder, state.pending, before)
        return Prefix(layers, state.prefix.lengths + state.pending.lengths), logits

    def _sample(
        self,
        prefix: Prefix,
        logits: Float[Array, "questions vocab"],
        keys: Key[Array, " questions"],
        stage: Int[Array, ""],
    ) -> Samples:
        """Sample the candidates of a stage, [questions, candidates]."""
        num_sequences = self.num_questions * max(self.spec.num_candidates)
        suffix = self.decoder.init_cache(num_sequences, self.lengths.candidate)
        stop_table = self.tables.stop_tables[stage]
        _, samples = sample_candidates(self.decoder, self.spec, logits, prefix, suffix, stop_table, keys, stage)
        return jax.tree.map(lambda x: x.reshape(self.num_questions, -1, *x.shape[1:]), samples)

    def _choose(
        self,
        candidates: Samples,
        texts: RaggedTokens,
        earlier: RaggedTokens,
        keys: Key[Array, " questions"],
        stage: Int[Array, ""],
    ) -> tuple[Int[Array, " questions"], StageJudgement | None]:
        """Return the candidate that wins a stage, int32, and the outcome of the judge's tournament, if there is one."""
        mean_log_prob = candidates.log_prob / jnp.maximum(candidates.num_sampled, 1)
        mean_log_prob = jnp.where(candidates.ended == EndReason.UNUSED, -jnp.inf, mean_log_prob)
        if self.judge_tables is not None and self.spec.judge is not None:
            num_candidates = jnp.array(self.spec.num_candidates)[stage]
            headers, question = self.inputs.chat_headers, self.inputs.question
            inputs = JudgeInputs(stage, texts, mean_log_prob, num_candidates, headers, question, earlier, keys)
            judge = StageJudge(self.decoder, self.spec.judge, inputs, self.judge_tables, self.spec.sampling)
            judgement = run_tournament(judge)
            return judgement.winner, judgement
        if isinstance(self.spec.scorer, LogProbability):
            return jnp.argmax(mean_log_prob, axis=-1).astype(jnp.int32), None
        return jnp.zeros(self.num_questions, jnp.int32), None


@jax.named_scope("candidates")
def sample_candidates(
    decoder: Decoder,
    spec: SearchSpec,
    logits: Float[Array, "questions vocab"],
    prefix: Prefix,
    suffix: CacheLayers,
    stop_table: UInt8[Array, "states vocab"],
    keys: Key[Array, " questions"],
    stage: Int[Array, ""],
) -> tuple[CacheLayers, Samples]:
    """Sample the candidates of a stage, those of a question side by side.

    Args:
        decoder: Model and images.
        spec: Static part of the search.
        logits: float32 logits after the prefix.
        prefix: Tokens that the candidates of a question share.
        suffix: Room for the candidates' keys and values, [questions * candidates].
        stop_table: Stop table of the stage's closing tag.
        keys: Random keys of the stage.
        stage: int32, index of the stage.

    Returns:
        The candidates' keys and values, and the candidates, [questions * candidates].
    """
    questions, most = len(keys), max(spec.num_candidates)
    candidate_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, Draw.CANDIDATE)
    each = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(candidate_keys, jnp.arange(most))
    used = jnp.arange(most) < jnp.array(spec.num_candidates)[stage]
    stop = StopConditions(
        stop_table=stop_table,
        max_new_tokens=jnp.array(spec.max_new_tokens)[stage],
        temperature=jnp.array(spec.temperatures, jnp.float32)[stage],
        keys=each.reshape(-1),
        used=jnp.tile(used, questions),
    )
    cache = KVCache(suffix, jnp.zeros(questions * most, jnp.int32), prefix)
    logits = jnp.repeat(logits, most, axis=0)
    return sample(decoder, logits, cache, stop, capacity=max(spec.max_new_tokens), sampling=spec.sampling)
