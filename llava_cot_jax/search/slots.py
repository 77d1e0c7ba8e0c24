"""Slots of questions that are answered side by side, each in a stage of its own: the compiled pieces that move them on.

The decoding loop is one program for all slots. It returns as soon as a slot's candidates have all ended, or after a
number of steps, so that the host can read the candidates so far. The other pieces are programs for one slot, which read
its part of the caches and write it back in place: a stage that ends in one slot costs the others nothing.

    admit -> start_stage -> decode (all slots, as often as needed) -> choose, or keep -> start_stage -> ...
"""

import functools
from dataclasses import dataclass, replace
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, UInt32

from llava_cot_jax.inference.decoding import Decoder, EndReason, OpenSamples, Samples, continue_samples, start_samples
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.image_context import ImageContext
from llava_cot_jax.model.kv_cache import CacheLayers, Segment, constrain_batch
from llava_cot_jax.model.parameters import Params
from llava_cot_jax.model.sharding import constrain, use_mesh
from llava_cot_jax.search.program import (
    SearchInputs,
    SearchProgress,
    StageResult,
    StageSearch,
    by_question,
    candidate_cache,
    candidate_stops,
    encode_question_images,
    stage_keys,
)
from llava_cot_jax.search.strategies import SearchSpec
from llava_cot_jax.search.tables import ScorerTables, StageTables

_Tree = TypeVar("_Tree")


@dataclass(frozen=True)
class SlotSettings:
    """Static part of the pieces.

    Attributes:
        config: Configuration of the model.
        spec: Static part of the search.
        prefill_chunk: Number of tokens that are prefilled at a time.
        mesh: Mesh of the model's devices; None on one device.
    """

    config: MllamaConfig
    spec: SearchSpec
    prefill_chunk: int
    mesh: Mesh | None

    @property
    def most(self) -> int:
        """Largest number of candidates of a stage."""
        return max(self.spec.num_candidates)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlotTables:
    """Tables of the search.

    Attributes:
        stages: Tables of the stages.
        scorers: Tables of the judge and the verifier.
    """

    stages: StageTables
    scorers: ScorerTables


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """Questions that are being answered.

    Attributes:
        prefix: KV cache of the prompts and of the winners that are prefilled, [slots].
        suffix: KV cache of the candidates, [slots * candidates].
        images: Images of the questions; None where no question has one.
        samples: The candidates so far, [slots * candidates].
        stage: int32, stage of each question.
        seeds: uint32, seed of each question's draws.
    """

    prefix: Segment
    suffix: CacheLayers
    images: ImageContext | None
    samples: OpenSamples
    stage: Int[Array, " slots"]
    seeds: UInt32[Array, " slots"]


_piece = functools.partial(jax.jit, static_argnames="settings")
_piece_in_place = functools.partial(jax.jit, static_argnames="settings", donate_argnames="slots")


# No number of the parameters is used, but they tell jax the devices.
@functools.partial(jax.jit, static_argnames=("settings", "num_slots"), keep_unused=True)
def init_slots(
    params: Params, question: SearchInputs, tables: SlotTables, *, settings: SlotSettings, num_slots: int
) -> Slots:
    """Return slots without a question, with room for questions of the shapes of ``question``."""
    with use_mesh(settings.mesh):
        images = jax.eval_shape(lambda: encode_question_images(params, settings.config, question))
        pieces = _pieces(params, None, question, tables, settings)
        decoder, rows = pieces.decoder, num_slots * settings.most
        zeros = jnp.zeros(rows, jnp.int32)
        capacity = pieces.lengths.candidate
        unused = jnp.full(rows, EndReason.UNUSED).astype(jnp.int32)  # a weak type would compile the pieces twice
        samples = Samples(jnp.zeros((rows, capacity), jnp.int32), zeros, unused, zeros, jnp.zeros(rows, jnp.float32))
        prefix = decoder.init_cache(num_slots, pieces.lengths.prefix + decoder.prefill_chunk)
        none = jnp.zeros(num_slots, jnp.int32)
        slots = Slots(
            prefix=Segment(prefix, none),
            suffix=decoder.init_cache(rows, capacity),
            images=jax.tree.map(lambda x: jnp.zeros((num_slots, *x.shape[1:]), x.dtype), images),
            samples=OpenSamples(samples, zeros),
            stage=none,
            seeds=none.astype(jnp.uint32),
        )
        return constrain_batch(slots)


@_piece_in_place
def admit(
    params: Params,
    slots: Slots,
    slot: Int[Array, ""],
    question: SearchInputs,
    tables: SlotTables,
    *,
    settings: SlotSettings,
) -> tuple[Slots, SearchProgress]:
    """Put a question into a slot: run the vision tower on its images. Return the slots, and the question's progress.

    The slot's caches are emptied. A number that is not finite, of a question before, would come back from where
    attention only gives it no weight.
    """
    with use_mesh(settings.mesh):
        images = encode_question_images(params, settings.config, question)
        admitted = replace(
            slots,
            prefix=_emptied(slots.prefix, slot),
            suffix=_emptied(slots.suffix, slot, settings.most),
            images=_put(slots.images, images, slot),
            seeds=slots.seeds.at[slot].set(question.seeds[0]),
        )
        return constrain_batch((admitted, _pieces(params, None, question, tables, settings).init_progress()))


@_piece_in_place
def start_stage(
    params: Params,
    slots: Slots,
    slot: Int[Array, ""],
    question: SearchInputs,
    progress: SearchProgress,
    tables: SlotTables,
    *,
    settings: SlotSettings,
) -> Slots:
    """Prefill what is pending for a slot's question, and draw the first token of its stage's candidates."""
    with use_mesh(settings.mesh):
        spec, most = settings.spec, settings.most
        pieces = _pieces(params, _take(slots.images, slot), question, tables, settings)
        prefix, logits = pieces.extend_prefix(_take(slots.prefix, slot), progress.pending)
        stop = candidate_stops(
            spec, tables.stages.stop_tables, stage_keys(question.seeds, progress.stage), progress.stage
        )
        logits = jnp.repeat(logits, most, axis=0)
        capacity = pieces.lengths.candidate
        samples = start_samples(settings.config, logits, stop, capacity=capacity, sampling=spec.sampling)
        started = replace(
            slots,
            prefix=_put(slots.prefix, prefix, slot),
            samples=_put(slots.samples, samples, slot, most),
            stage=slots.stage.at[slot].set(progress.stage[0]),
        )
        return constrain_batch(started)


@_piece_in_place
def decode(
    params: Params,
    slots: Slots,
    occupied: Bool[Array, " slots"],
    max_steps: Int[Array, ""],
    tables: SlotTables,
    *,
    settings: SlotSettings,
) -> tuple[Slots, Bool[Array, " slots"], Int[Array, ""]]:
    """Sample candidates in all slots until those of an occupied slot have all ended, or for ``max_steps`` steps.

    Returns:
        The slots, whether the candidates of each occupied slot have ended, and the number of decoding steps.
    """
    with use_mesh(settings.mesh):
        keys = stage_keys(slots.seeds, slots.stage)
        stop = candidate_stops(settings.spec, tables.stages.stop_tables, keys, slots.stage)

        # All samples that go on get a token in each step, so that they reach this length after the same one.
        longest = jnp.minimum(stop.max_new_tokens, slots.samples.samples.lengths + max_steps)

        def are_sampled(unfinished: Bool[Array, " batch"]) -> Bool[Array, " slots"]:
            return unfinished.reshape(len(occupied), -1).any(axis=1)

        def goes_on(unfinished: Bool[Array, " batch"]) -> Bool[Array, ""]:
            return occupied.any() & (are_sampled(unfinished) | ~occupied).all()

        suffix, samples = continue_samples(
            Decoder(params, settings.config, slots.images, settings.prefill_chunk),
            slots.samples,
            candidate_cache(slots.suffix, (slots.prefix,)),
            replace(stop, max_new_tokens=longest),
            sampling=settings.spec.sampling,
            goes_on=goes_on,
        )
        # A sample that goes on until the last step is drawn in each.
        steps = (samples.samples.num_sampled - slots.samples.samples.num_sampled).max()
        finished = occupied & ~are_sampled(stop.unfinished(samples.samples))
        return constrain_batch(replace(slots, suffix=suffix, samples=samples)), constrain(finished, None), steps


@_piece
def choose(
    params: Params,
    slots: Slots,
    slot: Int[Array, ""],
    question: SearchInputs,
    progress: SearchProgress,
    tables: SlotTables,
    *,
    settings: SlotSettings,
) -> tuple[StageResult, SearchProgress]:
    """Let the stage's scorer choose among a slot's candidates. Return the result, and the question's progress."""
    with use_mesh(settings.mesh):
        pieces = _pieces(params, _take(slots.images, slot), question, tables, settings)
        candidates, stage = _candidates(slots, slot, settings), progress.stage
        own = pieces.segment(_take(slots.suffix, slot, settings.most), candidates, stage)
        scores = pieces.score((_take(slots.prefix, slot), own), candidates, stage)
        winner, judgement = pieces.choose(candidates, scores, progress)
        kept = pieces.kept(candidates, stage).lengths
        result = StageResult(candidates, winner, judgement, scores, progress.pending.lengths, kept)
        return result, constrain_batch(pieces.advance(progress, candidates, winner))


@_piece
def read_candidates(
    params: Params,
    slots: Slots,
    slot: Int[Array, ""],
    question: SearchInputs,
    progress: SearchProgress,
    tables: SlotTables,
    *,
    settings: SlotSettings,
) -> tuple[Samples, Int[Array, "1 candidates"]]:
    """Return a slot's candidates, [1, candidates], and int32, the number of tokens that are kept of each."""
    candidates = _candidates(slots, slot, settings)
    pieces = _pieces(params, None, question, tables, settings)
    return candidates, pieces.kept(candidates, progress.stage).lengths


@_piece
def keep(
    params: Params,
    slots: Slots,
    slot: Int[Array, ""],
    question: SearchInputs,
    progress: SearchProgress,
    tables: SlotTables,
    winner: Int[Array, " 1"],
    *,
    settings: SlotSettings,
) -> tuple[StageResult, SearchProgress]:
    """Return what ``choose`` returns, for a winner that the host has chosen."""
    with use_mesh(settings.mesh):
        candidates = _candidates(slots, slot, settings)
        pieces = _pieces(params, None, question, tables, settings)
        kept = pieces.kept(candidates, progress.stage).lengths
        result = StageResult(candidates, winner, None, None, progress.pending.lengths, kept)
        return result, constrain_batch(pieces.advance(progress, candidates, winner))


def _pieces(
    params: Params, images: ImageContext | None, question: SearchInputs, tables: SlotTables, settings: SlotSettings
) -> StageSearch:
    """Return the pieces of the search for one question."""
    decoder = Decoder(params, settings.config, images, settings.prefill_chunk)
    return StageSearch(decoder, settings.spec, question, tables.stages, tables.scorers)


def _candidates(slots: Slots, slot: Int[Array, ""], settings: SlotSettings) -> Samples:
    return by_question(_take(slots.samples.samples, slot, settings.most), 1)


def _take(tree: _Tree, slot: Int[Array, ""], rows: int = 1) -> _Tree:
    """Return the entries of a slot, which has so many rows of each array."""
    # By an index: of a slice, the compiler would gather what all devices have, and not only the slot's rows.
    return jax.tree.map(lambda x: jnp.take(_by_slot(x, rows), slot[None], axis=0, mode="clip")[0], tree)


def _emptied(tree: _Tree, slot: Int[Array, ""], rows: int = 1) -> _Tree:
    """Return ``tree`` with zeros as the entries of a slot."""
    return _put(tree, jax.tree.map(jnp.zeros_like, _take(tree, slot, rows)), slot, rows)


def _put(tree: _Tree, entries: _Tree, slot: Int[Array, ""], rows: int = 1) -> _Tree:
    """Return ``tree`` with the entries of a slot in place."""

    def put_one(x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(_by_slot(x, rows), y[None], slot, axis=0).reshape(x.shape)

    return jax.tree.map(put_one, tree, entries)


def _by_slot(x: jax.Array, rows: int) -> jax.Array:
    """Return an array as [slots, rows, ...]."""
    return x.reshape(-1, rows, *x.shape[1:])
