"""The whole search as one compiled program: from images and prompts to the candidates that won each stage."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llava_cot_jax.inference.decoding import TAG, UNUSED, Limits, View, Written, look, read, write
from llava_cot_jax.inference.ragged_tokens import Pieces, join
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.kv_cache import Layers, Memory, Prefix, empty
from llava_cot_jax.model.layers import Weights
from llava_cot_jax.model.sharding import on_mesh
from llava_cot_jax.search.judge import Case, Judgement, decide
from llava_cot_jax.search.strategies import LogProbability, Plan
from llava_cot_jax.search.tables import BLANK_LINE, JudgeTables, StageTables

CANDIDATE = 0
"""What a stage's key is folded with for the candidates; ``judge`` takes the numbers after it."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Request:
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
    question: Pieces
    leads: Pieces


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StageFindings:
    """What came of a stage; of a whole search, each with a leading axis of stages.

    Attributes:
        candidates: [questions, candidates].
        winner: int32 [questions].
        judgement: None where no judge was asked.
        read: int32 [questions], tokens read before the stage: the prompt, or what won the stage before.
    """

    candidates: Written
    winner: jax.Array
    judgement: Judgement | None
    read: jax.Array


@functools.partial(jax.jit, static_argnames=("config", "plan", "chunk", "mesh"))
def search(
    params: Weights,
    request: Request,
    stages: StageTables,
    judging: JudgeTables | None,
    *,
    config: MllamaConfig,
    plan: Plan,
    chunk: int,
    mesh: Mesh | None,
) -> StageFindings:
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
    with on_mesh(mesh):
        view = _only_with_images(look(params, config, request.inputs, request.lengths))
        return _all_stages(params, request, stages, judging, view, config, plan, chunk)


def _only_with_images(view: View) -> View:
    """A question without an image gets nothing from a cross layer, whatever its neighbours have."""
    if view.sight is None:
        return view
    some = view.sight.feeds.any(axis=1, keepdims=True)
    return replace(view, sight=replace(view.sight, attends=view.sight.attends & some))


def _all_stages(
    params: Weights,
    request: Request,
    stages: StageTables,
    judging: JudgeTables | None,
    view: View,
    config: MllamaConfig,
    plan: Plan,
    chunk: int,
) -> StageFindings:
    questions, count = len(request.lengths), len(plan.budgets)
    dtype = params["language_model"]["model"]["norm"]["weight"].dtype
    prompt = Pieces(request.inputs["input_ids"], request.lengths)
    capacity, closing, opening = max(plan.budgets), stages.closings.capacity, stages.openings.capacity
    unread_room = max(prompt.capacity, capacity + closing) + opening
    text_room = opening + capacity + closing
    prefix_room = prompt.capacity + sum(plan.budgets[:-1]) + (count - 1) * (closing + opening) + opening
    keys = jax.vmap(jax.random.key)(request.seeds)

    def stage(
        carry: tuple[Layers, jax.Array, Pieces, Pieces], number: jax.Array
    ) -> tuple[tuple[Layers, jax.Array, Pieces, Pieces], StageFindings]:
        prefix, length, unread, earlier = carry
        memory = Memory(prefix, length, None, view.images)
        prefix, scores = read(params, config, unread, memory, view, chunk=chunk)
        length = length + unread.length
        stage_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
        _, candidates = write_candidates(
            params,
            config,
            plan,
            scores,
            Prefix(prefix, length),
            empty(config.text, questions * max(plan.candidates), capacity, dtype),
            view,
            stages.readers[number],
            stage_keys,
            number,
        )
        candidates = jax.tree.map(lambda x: x.reshape(questions, -1, *x.shape[1:]), candidates)

        closings = stages.closings[number][candidates.state]  # [questions, candidates]
        texts = join((stages.openings[number, BLANK_LINE], candidates.text, closings), text_room)
        likelihood = candidates.log_probability / jnp.maximum(candidates.drawn, 1)
        likelihood = jnp.where(candidates.ended == UNUSED, -jnp.inf, likelihood)
        used = jnp.array(plan.candidates)[number]
        case = Case(number, texts, likelihood, used, request.leads, request.question, earlier, stage_keys)
        winner, judgement = _choose(params, config, plan, case, judging, view, chunk)

        won = jax.tree.map(lambda x: x[jnp.arange(questions), winner], (candidates, closings, texts))
        following = stages.openings[jnp.minimum(number + 1, count - 1)][_tail(won[0], stages.accept)]
        unread_next = join((won[0].text, won[1], following), unread_room)
        earlier = jax.tree.map(lambda old, new: old.at[number].set(new), earlier, won[2])
        return (prefix, length, unread_next, earlier), StageFindings(candidates, winner, judgement, unread.length)

    begun = join((prompt, stages.openings[0, BLANK_LINE]), unread_room)
    nothing = Pieces(jnp.zeros((count, questions, text_room), jnp.int32), jnp.zeros((count, questions), jnp.int32))
    zeros = jnp.zeros(questions, jnp.int32)
    start = (empty(config.text, questions, prefix_room + chunk, dtype), zeros, begun, nothing)
    return jax.lax.scan(stage, start, jnp.arange(count))[1]


def _choose(
    params: Weights,
    config: MllamaConfig,
    plan: Plan,
    case: Case,
    judging: JudgeTables | None,
    view: View,
    chunk: int,
) -> tuple[jax.Array, Judgement | None]:
    """The candidate that wins a stage, int32 [questions], and what the judge said, where the plan has one."""
    if judging is not None and plan.judge is not None:
        judgement = decide(params, config, plan.judge, case, judging, view, plan.sampling, chunk)
        return judgement.winner, judgement
    if isinstance(plan.scorer, LogProbability):
        return jnp.argmax(case.scores, axis=-1).astype(jnp.int32), None
    return jnp.zeros(len(case.keys), jnp.int32), None


def write_candidates(
    params: Weights,
    config: MllamaConfig,
    plan: Plan,
    scores: jax.Array,
    prefix: Prefix,
    own: Layers,
    view: View,
    reader: jax.Array,
    keys: jax.Array,
    number: jax.Array,
) -> tuple[Layers, Written]:
    """Draw the candidates of a stage.

    Args:
        params: the model's, unrolled.
        config: the model's.
        plan: what the strategy comes to.
        scores: logits after the prefix, float32 [questions, vocabulary].
        prefix: what the candidates of a question share.
        own: room for the candidates, rows questions * candidates.
        view: what they see.
        reader: uint8 [states, vocabulary], of the stage's closing tag.
        keys: [questions], the stage's random keys.
        number: int32, the stage.

    Returns:
        The candidates' own keys and values, and what was drawn, [questions * candidates].
    """
    questions, most = len(keys), max(plan.candidates)
    of_candidates = jax.vmap(jax.random.fold_in, (0, None))(keys, CANDIDATE)
    each = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(of_candidates, jnp.arange(most))
    used = jnp.arange(most) < jnp.array(plan.candidates)[number]
    limits = Limits(
        reader=reader,
        budget=jnp.array(plan.budgets)[number],
        temperature=jnp.array(plan.temperatures, jnp.float32)[number],
        keys=each.reshape(-1),
        used=jnp.tile(used, questions),
    )
    memory = Memory(own, jnp.zeros(questions * most, jnp.int32), prefix, view.images)
    return write(
        params,
        config,
        jnp.repeat(scores, most, axis=0),
        memory,
        view,
        limits,
        capacity=max(plan.budgets),
        sampling=plan.sampling,
    )


def _tail(written: Written, accept: int) -> jax.Array:
    """How many line breaks a stage ends in, once it is closed: int32 [questions]."""
    return jnp.where(written.ended == TAG, written.state - accept, BLANK_LINE)
