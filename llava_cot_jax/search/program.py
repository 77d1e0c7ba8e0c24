"""The whole search as one compiled program: from images and prompts to the candidates that won each stage."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llava_cot_jax.inference.decoding import (
    TAG,
    UNUSED,
    Decoder,
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
from llava_cot_jax.search.judge import JudgeInputs, StageJudgement, run_tournament
from llava_cot_jax.search.strategies import LogProbability, SearchSpec
from llava_cot_jax.search.tables import BLANK_LINE, JudgeTables, StageTables

CANDIDATE = 0
"""What a stage's key is folded with for the candidates; ``judge`` takes the numbers after it."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SearchInputs:
    """A batch of questions.

    Attributes:
        inputs: by the names of ``Mllama``'s arguments, padded on the right.
        lengths: int32 [questions], tokens of each prompt.
        seeds: uint32 [questions].
        question: the judge is told, [questions].
        leads: what stands before the judge's prompts, [kinds, questions].
    """

    inputs: Mapping[str, jax.Array]
    lengths: jax.Array
    seeds: jax.Array
    question: RaggedTokens
    chat_headers: RaggedTokens


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StageResult:
    """What came of a stage; of a whole search, each with a leading axis of stages.

    Attributes:
        candidates: [questions, candidates].
        winner: int32 [questions].
        judgement: None where no judge was asked.
        read: int32 [questions], tokens read before the stage: the prompt, or what won the stage before.
    """

    candidates: Samples
    winner: jax.Array
    judgement: StageJudgement | None
    read: jax.Array


@functools.partial(jax.jit, static_argnames=("config", "plan", "chunk", "mesh"))
def search(
    params: Params,
    request: SearchInputs,
    stages: StageTables,
    judging: JudgeTables | None,
    *,
    config: MllamaConfig,
    spec: SearchSpec,
    chunk: int,
    mesh: Mesh | None,
) -> StageResult:
    """Search for the answers of a batch of questions.

    The vision tower runs once and a prompt is read once a question. The stages are one loop; each reads what
    won the one before into the prefix, and draws candidates and asks the judge over it without copying it.

    Args:
        params: the model's, unrolled.
        request: the questions.
        stages: tables of the plan's stages.
        judging: tables of the judge; None where the plan has none.
        config: the model's.
        plan: what the strategy comes to.
        chunk: tokens of a question that are read at a time.
        mesh: where the model lives.
    """
    with use_mesh(mesh):
        images = encode_images(params, config, request.inputs, request.lengths)
        decoder = Decoder(params, config, _only_with_images(images), prefill_chunk=chunk)
        return _all_stages(decoder, request, stages, judging, spec)


def _only_with_images(images: ImageContext | None) -> ImageContext | None:
    """Close the attention gates of questions without an image, whatever their neighbours have."""
    if images is None:
        return None
    has_image = images.mlp_gate.any(axis=1, keepdims=True)
    return replace(images, attention_gate=images.attention_gate & has_image)


def _all_stages(
    decoder: Decoder, request: SearchInputs, stages: StageTables, judging: JudgeTables | None, spec: SearchSpec
) -> StageResult:
    questions, count = len(request.lengths), len(spec.max_new_tokens)
    prompt = RaggedTokens(request.inputs["input_ids"], request.lengths)
    capacity, closing, opening = max(spec.max_new_tokens), stages.closings.capacity, stages.openings.capacity
    unread_room = max(prompt.capacity, capacity + closing) + opening
    text_room = opening + capacity + closing
    prefix_room = prompt.capacity + sum(spec.max_new_tokens[:-1]) + (count - 1) * (closing + opening) + opening
    keys = jax.vmap(jax.random.key)(request.seeds)

    def stage(
        carry: tuple[CacheLayers, jax.Array, RaggedTokens, RaggedTokens], number: jax.Array
    ) -> tuple[tuple[CacheLayers, jax.Array, RaggedTokens, RaggedTokens], StageResult]:
        prefix, length, unread, earlier = carry
        prefix, logits = prefill(decoder, unread, KVCache(prefix, length))
        length = length + unread.lengths
        stage_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
        _, candidates = sample_candidates(
            decoder,
            spec,
            logits,
            Prefix(prefix, length),
            decoder.init_cache(questions * max(spec.num_candidates), capacity),
            stages.stop_tables[number],
            stage_keys,
            number,
        )
        candidates = jax.tree.map(lambda x: x.reshape(questions, -1, *x.shape[1:]), candidates)

        closings = stages.closings[number][candidates.state]  # [questions, candidates]
        texts = concat((stages.openings[number, BLANK_LINE], candidates.text, closings), text_room)
        likelihood = candidates.log_prob / jnp.maximum(candidates.num_sampled, 1)
        likelihood = jnp.where(candidates.ended == UNUSED, -jnp.inf, likelihood)
        used = jnp.array(spec.num_candidates)[number]
        case = JudgeInputs(number, texts, likelihood, used, request.chat_headers, request.question, earlier, stage_keys)
        winner, judgement = _choose(decoder, spec, case, judging)

        won = jax.tree.map(lambda x: x[jnp.arange(questions), winner], (candidates, closings, texts))
        following = stages.openings[jnp.minimum(number + 1, count - 1)][_tail(won[0], stages.accept)]
        unread_next = concat((won[0].text, won[1], following), unread_room)
        earlier = jax.tree.map(lambda old, new: old.at[number].set(new), earlier, won[2])
        return (prefix, length, unread_next, earlier), StageResult(candidates, winner, judgement, unread.lengths)

    begun = concat((prompt, stages.openings[0, BLANK_LINE]), unread_room)
    nothing = RaggedTokens(
        jnp.zeros((count, questions, text_room), jnp.int32), jnp.zeros((count, questions), jnp.int32)
    )
    zeros = jnp.zeros(questions, jnp.int32)
    start = (decoder.init_cache(questions, prefix_room + decoder.prefill_chunk), zeros, begun, nothing)
    return jax.lax.scan(stage, start, jnp.arange(count))[1]


def _choose(
    decoder: Decoder, spec: SearchSpec, case: JudgeInputs, judging: JudgeTables | None
) -> tuple[jax.Array, StageJudgement | None]:
    """The candidate that wins a stage, int32 [questions], and what the judge said, where the plan has one."""
    if judging is not None and spec.judge is not None:
        judgement = run_tournament(decoder, spec.judge, case, judging, spec.sampling)
        return judgement.winner, judgement
    if isinstance(spec.scorer, LogProbability):
        return jnp.argmax(case.scores, axis=-1).astype(jnp.int32), None
    return jnp.zeros(len(case.keys), jnp.int32), None


def sample_candidates(
    decoder: Decoder,
    spec: SearchSpec,
    logits: jax.Array,
    prefix: Prefix,
    suffix: CacheLayers,
    stop_table: jax.Array,
    keys: jax.Array,
    number: jax.Array,
) -> tuple[CacheLayers, Samples]:
    """Draw the candidates of a stage.

    Args:
        decoder: Model and images.
        plan: what the strategy comes to.
        logits: Logits after the prefix, float32 [questions, vocab].
        prefix: Tokens that the candidates of a question share.
        suffix: Room for the candidates, [questions * candidates].
        stop_table: Stop table of the stage's closing tag, uint8 [states, vocab].
        keys: [questions], the stage's random keys.
        number: int32, the stage.

    Returns:
        The candidates' own keys and values, and what was drawn, [questions * candidates].
    """
    questions, most = len(keys), max(spec.num_candidates)
    of_candidates = jax.vmap(jax.random.fold_in, (0, None))(keys, CANDIDATE)
    each = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(of_candidates, jnp.arange(most))
    used = jnp.arange(most) < jnp.array(spec.num_candidates)[number]
    stop = StopConditions(
        stop_table=stop_table,
        max_new_tokens=jnp.array(spec.max_new_tokens)[number],
        temperature=jnp.array(spec.temperatures, jnp.float32)[number],
        keys=each.reshape(-1),
        used=jnp.tile(used, questions),
    )
    cache = KVCache(suffix, jnp.zeros(questions * most, jnp.int32), prefix)
    logits = jnp.repeat(logits, most, axis=0)
    return sample(decoder, logits, cache, stop, capacity=max(spec.max_new_tokens), sampling=spec.sampling)


def _tail(written: Samples, accept: int) -> jax.Array:
    """How many line breaks a stage ends in, once it is closed: int32 [questions]."""
    return jnp.where(written.ended == TAG, written.state - accept, BLANK_LINE)
