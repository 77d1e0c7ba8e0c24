"""The model as judge of its own candidates, in knockout rounds, inside the compiled search.

A stage's candidates are drawn into a random bracket, and all pairs of a round are judged before the next.
Written reasons are drawn side by side, in sub-batches of half as many rows as there are candidates: a row
holds two of them, so the rows take the room that the candidates' own had. A verdict's token needs only
reading, which gains nothing from more rows: its sub-batches are a pair, so that none is filled up. Where the
number of candidates is odd, one goes through to the next round, and is drawn first there. (Upstream puts the
winner back among the rest and draws again.)
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llava_cot_jax.model.cache import Layers, Memory, Prefix, empty
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.layers import Weights
from llava_cot_jax.search.decode import TAG, Limits, View, Written, read, write
from llava_cot_jax.search.pieces import Pieces, join
from llava_cot_jax.search.sampling import Sampling
from llava_cot_jax.search.strategies import Judge
from llava_cot_jax.search.tables import JudgeTables

PAIR, CHECK = 0, 1
"""The kinds of prompts, in the order of ``prompts.KINDS``."""

BRACKET, REASON, CHECKING = 1, 2, 3
"""What a stage's key is folded with, for what it draws; the candidates take 0."""

JUDGED, CHECKED, SCORED = range(3)
"""What decided a match: the verdicts; a check that one candidate alone failed; or, where the verdicts
left it open or could not be read, the mean log-probability."""

DECISIONS = ("judged", "checked", "scored")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """What was asked of the judge, row by row; the checks of a stage come first.

    Attributes:
        first: int32 [questions, rows], the candidate shown as response 1, or the one that is checked.
        second: likewise, the other one; of a check, of no meaning.
        tokens: int32 [questions, rows], of the row's own part of the prompt.
        vote: float32 [questions, rows], from 1 (response 1, or correct) to -1; 0 is unreadable.
        outside: float32 [questions, rows], of a token verdict, the probability of anything but the two.
        reason: what was written, [questions, rows]; of a token verdict, nothing.
    """

    first: jax.Array
    second: jax.Array
    tokens: jax.Array
    vote: jax.Array
    outside: jax.Array
    reason: Written


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Matches:
    """What came of each pair, in the order of the rounds: [questions, matches].

    Attributes:
        first: int32, a candidate.
        second: int32, the other one.
        margin: float32, from 1 (``first``) to -1 (``second``): the mean vote of the orders, or the check's.
        decision: int32, one of JUDGED, CHECKED, SCORED.
        winner: int32, a candidate.
    """

    first: jax.Array
    second: jax.Array
    margin: jax.Array
    decision: jax.Array
    winner: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Judgement:
    """All that the judge said about a stage.

    Attributes:
        winner: int32 [questions].
        rows: what was asked, in a fixed room; ``asked`` of them count.
        matches: likewise; one fewer than there are candidates count.
        asked: int32 [questions], rows.
        fronts: int32 [questions, kinds], tokens of the prompts' fronts; 0 where none was read.
    """

    winner: jax.Array
    rows: Rows
    matches: Matches
    asked: jax.Array
    fronts: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Case:
    """What a stage's judge has before it.

    Attributes:
        stage: int32, which one.
        texts: [questions, candidates], the candidates with their tags.
        scores: float32 [questions, candidates], mean log-probabilities.
        count: int32, how many of the candidates are there.
        leads: [kinds, questions], what stands before a prompt.
        question: [questions].
        earlier: [stages, questions], what won the stages before.
        keys: [questions], the stage's random keys.
    """

    stage: jax.Array
    texts: Pieces
    scores: jax.Array
    count: jax.Array
    leads: Pieces
    question: Pieces
    earlier: Pieces
    keys: jax.Array


class Round(NamedTuple):
    """Where the knockout stands between rounds."""

    checking: jax.Array  # bool, whether the checks are next
    bracket: jax.Array  # int32 [questions, candidates], of which the first ``alive`` are still in
    alive: jax.Array  # int32
    played: jax.Array  # int32, matches
    asked: jax.Array  # int32, rows
    front: Layers
    front_length: jax.Array  # int32 [questions]
    read_for: jax.Array  # int32, the kind of prompt that ``front`` is of; -1 before there is one
    fronts: jax.Array
    own: Layers
    rows: Rows
    matches: Matches


def decide(
    params: Weights,
    config: MllamaConfig,
    judge: Judge,
    case: Case,
    tables: JudgeTables,
    view: View,
    sampling: Sampling,
    chunk: int,
) -> Judgement:
    """Judge the candidates of a stage until one is left.

    Args:
        params: the model's, unrolled.
        config: the model's.
        judge: how.
        case: what there is to judge.
        tables: the prompts, and how verdicts are read.
        view: what the prompts see of the images.
        sampling: top_k and top_p of written reasons.
        chunk: tokens of a question's rows that are read at a time.
    """
    questions, candidates = case.texts.length.shape
    orders = judge.orders
    side = -(-candidates // 2) if judge.verdict == "rationale" else judge.orders  # rows of a sub-batch
    pairs = candidates // 2  # of the first round
    written = max(judge.reason_tokens, judge.check_tokens) if judge.verdict == "rationale" else 1
    dtype = params["language_model"]["model"]["norm"]["weight"].dtype

    shown = [case.earlier[i] for i in range(case.earlier.length.shape[0])]
    front_room = sum(p.capacity for p in (case.leads, tables.intro, case.question, tables.middle, tables.label))
    front_room += sum(piece.capacity for piece in shown[:-1])
    row_room = 2 * case.texts.capacity + tables.between.capacity + tables.ending.capacity
    row_chunk = max(1, chunk // side)

    def front_of(kind: jax.Array) -> Pieces:
        """[questions]"""
        at = (kind, case.stage)
        earlier = [piece.where(tables.shows[kind, case.stage, i]) for i, piece in enumerate(shown[:-1])]
        fixed = (tables.intro[at], case.question, tables.middle[at], *earlier, tables.label[at])
        return join((case.leads[kind], *fixed), front_room)

    def ask(batch: jax.Array, kind: jax.Array, wanted: jax.Array, now: Round) -> Round:
        """One sub-batch of the ``wanted`` rows of a round."""
        row = batch * side + jnp.arange(side)  # [side]
        match, turned = row // orders, row % orders == 1
        left, right = (now.bracket[:, jnp.clip(2 * match + i, 0, candidates - 1)] for i in (0, 1))
        pair = kind == PAIR
        checked = jnp.clip(row, 0, candidates - 1)
        first = jnp.where(pair, jnp.where(turned, right, left), checked)  # [questions, side]
        second = jnp.where(pair, jnp.where(turned, left, right), 0)
        live = jnp.broadcast_to(row < wanted, first.shape)

        at = (kind, case.stage)
        texts = join(
            (_pick(case.texts, first), tables.between[at], _pick(case.texts, second).where(pair), tables.ending[at]),
            row_room,
        ).where(live)
        flat = Pieces(texts.tokens.reshape(-1, row_room), texts.length.reshape(-1))
        nothing = jnp.zeros_like(flat.length)
        memory = Memory(now.own, nothing, Prefix(now.front, now.front_length), view.images)
        own, scores = read(params, config, flat, memory, view, chunk=row_chunk, blind=~pair)
        said = scores[:, tables.verdicts]  # [questions * side, 2]
        vote = jnp.tanh((said[:, 0] - said[:, 1]) / 2)  # the difference of the two's shares of their sum
        outside = 1 - jnp.exp(said - jax.nn.logsumexp(scores, axis=-1, keepdims=True)).sum(axis=-1)
        reason = _nothing_written(len(vote), written)
        if judge.verdict == "rationale":
            keys = jax.vmap(lambda key: jax.random.fold_in(key, jnp.where(pair, REASON, CHECKING)))(case.keys)
            limits = Limits(
                reader=tables.readers[kind],
                budget=jnp.where(pair, judge.reason_tokens, judge.check_tokens),
                temperature=jnp.float32(judge.temperature),
                keys=jax.vmap(_fold_each)(keys, first, second).reshape(-1),
                used=live.reshape(-1),
            )
            drawn = replace(sampling, temperature=judge.temperature)
            begun = Memory(own, flat.length, memory.prefix, view.images)
            own, reason = write(
                params, config, scores, begun, view, limits, capacity=written, sampling=drawn, blind=~pair
            )
            reading = reason.state - tables.readers.shape[1]  # 0 or 1
            vote = jnp.where(reason.ended == TAG, 1.0 - 2.0 * reading, 0.0)
            outside = jnp.zeros_like(vote)

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            new = new.reshape(questions, side, *old.shape[2:])
            return jax.lax.dynamic_update_slice_in_dim(old, new, now.asked + batch * side, axis=1)

        rows = Rows(first, second, texts.length, vote, outside, reason)
        return now._replace(own=own, rows=jax.tree.map(put, now.rows, rows))

    def settle(now: Round) -> Round:
        """The matches of a round whose rows have been asked: the winners go on."""
        votes = jax.lax.dynamic_slice_in_dim(now.rows.vote, now.asked, pairs * orders, axis=1)
        votes = votes.reshape(questions, pairs, orders) * jnp.array([1.0, -1.0][:orders])
        left, right = now.bracket[:, 0 : 2 * pairs : 2], now.bracket[:, 1 : 2 * pairs : 2]  # [questions, pairs]
        failed = (now.rows.vote[:, :candidates] < 0) & tables.checked[case.stage]
        left_failed, right_failed = (jnp.take_along_axis(failed, x, axis=1) for x in (left, right))
        checked = left_failed != right_failed
        margin = jnp.where(checked, jnp.where(left_failed, -1.0, 1.0), votes.mean(axis=-1))
        left_score, right_score = (jnp.take_along_axis(case.scores, x, axis=1) for x in (left, right))
        better = (left_score > right_score) | ((left_score == right_score) & (left < right))
        winner = jnp.where((margin > 0) | ((margin == 0) & better), left, right)
        decision = jnp.where(checked, CHECKED, jnp.where(margin == 0, SCORED, JUDGED))
        new = Matches(left, right, margin, decision, winner)

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new, now.played, axis=1)

        # Who had no opponent is drawn first in the next round.
        here, bye = now.alive // 2, now.alive % 2
        place = jnp.arange(candidates)
        passed = jnp.take_along_axis(now.bracket, jnp.broadcast_to(now.alive - 1, (questions, 1)), axis=1)
        bracket = jnp.where((place == 0) & (bye == 1), passed, winner[:, jnp.clip(place - bye, 0, pairs - 1)])
        matches = jax.tree.map(put, now.matches, new)
        return now._replace(bracket=bracket, alive=here + bye, played=now.played + here, matches=matches)

    def play(now: Round) -> Round:
        """One round: the checks, or all pairs of those still in."""
        kind = jnp.where(now.checking, CHECK, PAIR)
        needed = now.read_for != kind
        front = front_of(kind).where(needed)
        memory = Memory(now.front, jnp.zeros(questions, jnp.int32), None, view.images)
        layers, _ = read(params, config, front, memory, view, chunk=chunk, blind=kind == CHECK)
        now = now._replace(
            front=layers,
            front_length=jnp.where(needed, front.length, now.front_length),
            fronts=now.fronts.at[:, kind].add(front.length),
            read_for=kind,
        )
        wanted = jnp.where(now.checking, case.count, now.alive // 2 * orders)
        batches = -(-wanted // side)
        now = jax.lax.fori_loop(0, batches, lambda batch, now: ask(batch, kind, wanted, now), now)
        settled = settle(now)
        small = ("bracket", "alive", "played", "matches")
        kept = jax.tree.map(
            lambda old, new: jnp.where(kind == CHECK, old, new),
            {name: getattr(now, name) for name in small},
            {name: getattr(settled, name) for name in small},
        )
        return now._replace(**kept, asked=now.asked + wanted, checking=jnp.bool_(False))

    # All checks and verdicts, and what a last sub-batch writes, or a last round looks at, beyond them.
    room = candidates + (candidates - 1) * orders + max(side, pairs * orders)
    zeros = jnp.zeros((questions, room), jnp.int32)
    reasons = jax.tree.map(lambda x: jnp.zeros((questions, room, *x.shape[1:]), x.dtype), _nothing_written(1, written))
    votes = jnp.zeros((questions, room), jnp.float32)
    none = jnp.zeros((questions, candidates - 1 + pairs), jnp.int32)
    start = Round(
        checking=tables.checked[case.stage],
        bracket=_bracket(case.keys, case.count, candidates),
        alive=case.count,
        played=jnp.int32(0),
        asked=jnp.int32(0),
        front=empty(config.text, questions, front_room + chunk, dtype),
        front_length=jnp.zeros(questions, jnp.int32),
        read_for=jnp.int32(-1),
        fronts=jnp.zeros((questions, 2), jnp.int32),
        own=empty(config.text, questions * side, row_room + row_chunk + written, dtype),
        rows=Rows(zeros, zeros, zeros, votes, votes, reasons),
        matches=Matches(none, none, none.astype(jnp.float32), none, none),
    )
    end = jax.lax.while_loop(lambda now: now.alive > 1, play, start)
    asked = jnp.broadcast_to(end.asked, questions)
    return Judgement(end.bracket[:, 0], end.rows, end.matches, asked, end.fronts)


def _bracket(keys: jax.Array, count: jax.Array, candidates: int) -> jax.Array:
    """A random order of the ``count`` candidates that are there, before the others: int32 [questions, candidates]."""
    keys = jax.vmap(lambda key: jax.random.fold_in(key, BRACKET))(keys)
    each = jax.vmap(_fold_each, (0, None))(keys, jnp.arange(candidates))
    lots = jax.vmap(jax.vmap(jax.random.uniform))(each)
    return jnp.argsort(jnp.where(jnp.arange(candidates) < count, lots, jnp.inf), axis=-1).astype(jnp.int32)


def _fold_each(key: jax.Array, *numbers: jax.Array) -> jax.Array:
    """``key`` folded with each of ``numbers`` [n] in turn: keys [n]."""
    keys = jnp.broadcast_to(key, numbers[0].shape)
    for number in numbers:
        keys = jax.vmap(jax.random.fold_in)(keys, number)
    return keys


def _pick(pieces: Pieces, index: jax.Array) -> Pieces:
    """Rows ``index`` int32 [questions, n] of pieces [questions, rows]."""
    tokens = jnp.take_along_axis(pieces.tokens, index[..., None], axis=1)
    return Pieces(tokens, jnp.take_along_axis(pieces.length, index, axis=1))


def _nothing_written(rows: int, capacity: int) -> Written:
    zeros = jnp.zeros(rows, jnp.int32)
    return Written(jnp.zeros((rows, capacity), jnp.int32), zeros, zeros, zeros, jnp.zeros(rows, jnp.float32))
