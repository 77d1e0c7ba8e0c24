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

from llava_cot_jax.inference.decoding import TAG, Decoder, Samples, StopConditions, prefill, sample
from llava_cot_jax.inference.ragged_tokens import RaggedTokens, concat
from llava_cot_jax.inference.settings import Sampling
from llava_cot_jax.model.kv_cache import CacheLayers, KVCache, Prefix
from llava_cot_jax.search.strategies import Judge
from llava_cot_jax.search.tables import JudgeTables

PAIR, CHECK = 0, 1
"""The kinds of prompts, in the order of ``prompts.PROMPT_KINDS``."""

BRACKET, REASON, CHECKING = 1, 2, 3
"""What a stage's key is folded with, for what it draws; the candidates take 0."""

JUDGED, CHECKED, SCORED = range(3)
"""What decided a match: the verdicts; a check that one candidate alone failed; or, where the verdicts
left it open or could not be read, the mean log-probability."""

DECISIONS = ("judged", "checked", "scored")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class JudgeQueries:
    """What was asked of the judge, row by row; the checks of a stage come first.

    Attributes:
        first: int32 [questions, rows], the candidate shown as response 1, or the one that is checked.
        second: likewise, the other one; of a check, of no meaning.
        tokens: int32 [questions, rows], of the row's own part of the prompt.
        vote: float32 [questions, rows], from 1 (response 1, or correct) to -1; 0 is unreadable.
        other_probability: float32 [questions, rows], of a token verdict, the probability of anything but the two.
        reason: what was written, [questions, rows]; of a token verdict, nothing.
    """

    first: jax.Array
    second: jax.Array
    tokens: jax.Array
    vote: jax.Array
    other_probability: jax.Array
    reason: Samples


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
class StageJudgement:
    """All that the judge said about a stage.

    Attributes:
        winner: int32 [questions].
        rows: what was asked, in a fixed room; ``asked`` of them count.
        matches: likewise; one fewer than there are candidates count.
        asked: int32 [questions], rows.
        fronts: int32 [questions, kinds], tokens of the prompts' fronts; 0 where none was read.
    """

    winner: jax.Array
    rows: JudgeQueries
    matches: Matches
    asked: jax.Array
    fronts: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class JudgeInputs:
    """What a stage's judge has before it.

    Attributes:
        stage: int32, which one.
        texts: [questions, candidates], the candidates with their tags.
        scores: float32 [questions, candidates], mean log-probabilities.
        count: int32, how many of the candidates are there.
        chat_headers: [kinds, questions], what stands before a prompt.
        question: [questions].
        earlier: [stages, questions], what won the stages before.
        keys: [questions], the stage's random keys.
    """

    stage: jax.Array
    texts: RaggedTokens
    scores: jax.Array
    count: jax.Array
    chat_headers: RaggedTokens
    question: RaggedTokens
    earlier: RaggedTokens
    keys: jax.Array


class TournamentState(NamedTuple):
    """Where the knockout stands between rounds."""

    checking: jax.Array  # bool, whether the checks are next
    bracket: jax.Array  # int32 [questions, candidates], of which the first ``alive`` are still in
    alive: jax.Array  # int32
    played: jax.Array  # int32, matches
    asked: jax.Array  # int32, rows
    front: CacheLayers
    front_length: jax.Array  # int32 [questions]
    read_for: jax.Array  # int32, the kind of prompt that ``front`` is of; -1 before there is one
    fronts: jax.Array
    own: CacheLayers
    rows: JudgeQueries
    matches: Matches


def run_tournament(
    decoder: Decoder,
    judge: Judge,
    case: JudgeInputs,
    tables: JudgeTables,
    sampling: Sampling,
) -> StageJudgement:
    """Judge the candidates of a stage until one is left.

    Args:
        decoder: Model and images.
        judge: how.
        case: what there is to judge.
        tables: the prompts, and how verdicts are read.
        sampling: top_k and top_p of written reasons.
    """
    knockout = _Knockout(decoder, judge, case, tables, sampling)
    end = jax.lax.while_loop(lambda now: now.alive > 1, knockout.play, knockout.start())
    asked = jnp.broadcast_to(end.asked, knockout.questions)
    return StageJudgement(end.bracket[:, 0], end.rows, end.matches, asked, end.fronts)


@dataclass(frozen=True)
class _Knockout:
    """The rounds of a stage; attributes as for ``run_tournament``."""

    decoder: Decoder
    judge: Judge
    case: JudgeInputs
    tables: JudgeTables
    sampling: Sampling

    @property
    def questions(self) -> int:
        return self.case.texts.lengths.shape[0]

    @property
    def candidates(self) -> int:
        return self.case.texts.lengths.shape[1]

    @property
    def pairs(self) -> int:
        """Of the first round."""
        return self.candidates // 2

    @property
    def side(self) -> int:
        """A question's rows in a sub-batch."""
        return -(-self.candidates // 2) if self.judge.verdict == "rationale" else self.judge.orders

    @property
    def row_chunk(self) -> int:
        """Tokens of a row that are read at a time."""
        return max(1, self.decoder.prefill_chunk // self.side)

    @property
    def written(self) -> int:
        """The most tokens that a row writes."""
        judge = self.judge
        return max(judge.reason_tokens, judge.check_tokens) if judge.verdict == "rationale" else 1

    @property
    def front_room(self) -> int:
        """The most tokens of a prompt's front."""
        t, earlier = self.tables, self.case.earlier
        fixed = (self.case.chat_headers, t.intro, self.case.question, t.middle, t.label)
        return sum(piece.capacity for piece in fixed) + (earlier.lengths.shape[0] - 1) * earlier.capacity

    @property
    def row_room(self) -> int:
        """The most tokens of a row's own part of a prompt."""
        return 2 * self.case.texts.capacity + self.tables.between.capacity + self.tables.ending.capacity

    def start(self) -> TournamentState:
        """Before the first round."""
        decoder, questions, candidates, orders = self.decoder, self.questions, self.candidates, self.judge.orders
        # All checks and verdicts, and what a last sub-batch writes, or a last round looks at, beyond them.
        room = candidates + (candidates - 1) * orders + max(self.side, self.pairs * orders)
        blank = _nothing_written(1, self.written)
        reasons = jax.tree.map(lambda x: jnp.zeros((questions, room, *x.shape[1:]), x.dtype), blank)
        zeros, votes = jnp.zeros((questions, room), jnp.int32), jnp.zeros((questions, room), jnp.float32)
        none = jnp.zeros((questions, candidates - 1 + self.pairs), jnp.int32)
        return TournamentState(
            checking=self.tables.checked[self.case.stage],
            bracket=_bracket(self.case.keys, self.case.count, candidates),
            alive=self.case.count,
            played=jnp.int32(0),
            asked=jnp.int32(0),
            front=decoder.init_cache(questions, self.front_room + decoder.prefill_chunk),
            front_length=jnp.zeros(questions, jnp.int32),
            read_for=jnp.int32(-1),
            fronts=jnp.zeros((questions, 2), jnp.int32),
            own=decoder.init_cache(questions * self.side, self.row_room + self.row_chunk + self.written),
            rows=JudgeQueries(zeros, zeros, zeros, votes, votes, reasons),
            matches=Matches(none, none, none.astype(jnp.float32), none, none),
        )

    def play(self, now: TournamentState) -> TournamentState:
        """One round: the checks, or all pairs of those still in."""
        kind = jnp.where(now.checking, CHECK, PAIR)
        now = self._read_front(now, kind)
        wanted = jnp.where(now.checking, self.case.count, now.alive // 2 * self.judge.orders)
        batches = -(-wanted // self.side)
        now = jax.lax.fori_loop(0, batches, lambda batch, now: self._ask(batch, kind, wanted, now), now)
        settled = self._settle(now)
        small = ("bracket", "alive", "played", "matches")
        kept = jax.tree.map(
            lambda old, new: jnp.where(kind == CHECK, old, new),
            {name: getattr(now, name) for name in small},
            {name: getattr(settled, name) for name in small},
        )
        return now._replace(**kept, asked=now.asked + wanted, checking=jnp.bool_(False))

    def _read_front(self, now: TournamentState, kind: jax.Array) -> TournamentState:
        """Read the front of the round's prompts, where the one that was read last is of another kind."""
        needed = now.read_for != kind
        front = self._front(kind).where(needed)
        cache = KVCache(now.front, jnp.zeros(self.questions, jnp.int32))
        layers, _ = prefill(self.decoder, front, cache, text_only=kind == CHECK)
        return now._replace(
            front=layers,
            front_length=jnp.where(needed, front.lengths, now.front_length),
            fronts=now.fronts.at[:, kind].add(front.lengths),
            read_for=kind,
        )

    def _front(self, kind: jax.Array) -> RaggedTokens:
        """What all prompts of a kind begin with, [questions]."""
        case, tables, at = self.case, self.tables, (kind, self.case.stage)
        before = range(case.earlier.lengths.shape[0] - 1)
        earlier = [case.earlier[i].where(tables.shows[kind, case.stage, i]) for i in before]
        fixed = (tables.intro[at], case.question, tables.middle[at], *earlier, tables.label[at])
        return concat((case.chat_headers[kind], *fixed), self.front_room)

    def _ask(self, batch: jax.Array, kind: jax.Array, wanted: jax.Array, now: TournamentState) -> TournamentState:
        """One sub-batch of the ``wanted`` rows of a round."""
        row = batch * self.side + jnp.arange(self.side)  # [side]
        match, turned = row // self.judge.orders, row % self.judge.orders == 1
        left, right = (now.bracket[:, jnp.clip(2 * match + i, 0, self.candidates - 1)] for i in (0, 1))
        pair = kind == PAIR
        checked = jnp.clip(row, 0, self.candidates - 1)
        first = jnp.where(pair, jnp.where(turned, right, left), checked)  # [questions, side]
        second = jnp.where(pair, jnp.where(turned, left, right), 0)
        live = jnp.broadcast_to(row < wanted, first.shape)

        case, tables, at = self.case, self.tables, (kind, self.case.stage)
        shown = (_pick(case.texts, first), tables.between[at], _pick(case.texts, second).where(pair), tables.ending[at])
        texts = concat(shown, self.row_room).where(live)
        flat = RaggedTokens(texts.tokens.reshape(-1, self.row_room), texts.lengths.reshape(-1))
        prefix = Prefix(now.front, now.front_length)
        cache = KVCache(now.own, jnp.zeros_like(flat.lengths), prefix)
        decoder = replace(self.decoder, prefill_chunk=self.row_chunk)
        own, logits = prefill(decoder, flat, cache, text_only=kind == CHECK)
        vote, other_probability = self._verdicts(logits)
        reason = _nothing_written(len(vote), self.written)
        if self.judge.verdict == "rationale":
            cache = replace(cache, suffix=own, lengths=flat.lengths)
            own, reason = self._reason(kind, logits, cache, first, second, live)
            vote, other_probability = self._conclusions(reason), jnp.zeros_like(vote)

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            new = new.reshape(self.questions, self.side, *old.shape[2:])
            return jax.lax.dynamic_update_slice_in_dim(old, new, now.asked + batch * self.side, axis=1)

        rows = JudgeQueries(first, second, texts.lengths, vote, other_probability, reason)
        return now._replace(own=own, rows=jax.tree.map(put, now.rows, rows))

    def _verdicts(self, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Votes by the next token, and the probability of any but the two, [rows], of logits [rows, vocabulary]."""
        said = logits[:, self.tables.verdicts]  # [rows, 2]
        vote = jnp.tanh((said[:, 0] - said[:, 1]) / 2)  # the difference of the two's shares of their sum
        return vote, 1 - jnp.exp(said - jax.nn.logsumexp(logits, axis=-1, keepdims=True)).sum(axis=-1)

    def _reason(
        self, kind: jax.Array, logits: jax.Array, cache: KVCache, first: jax.Array, second: jax.Array, live: jax.Array
    ) -> tuple[CacheLayers, Samples]:
        """Reasons drawn after prompts with these ``logits``; ``first``, ``second`` and ``live`` [questions, side]."""
        judge, pair = self.judge, kind == PAIR
        drawn_for = jnp.where(pair, REASON, CHECKING)
        keys = jax.vmap(jax.random.fold_in, (0, None))(self.case.keys, drawn_for)
        stop = StopConditions(
            stop_table=self.tables.stop_tables[kind],
            max_new_tokens=jnp.where(pair, judge.reason_tokens, judge.check_tokens),
            temperature=jnp.float32(judge.temperature),
            keys=jax.vmap(_fold_each)(keys, first, second).reshape(-1),
            used=live.reshape(-1),
        )
        sampling = replace(self.sampling, temperature=judge.temperature)
        given = (self.decoder, logits, cache, stop)
        return sample(*given, capacity=self.written, sampling=sampling, text_only=kind == CHECK)

    def _conclusions(self, reason: Samples) -> jax.Array:
        """Votes [rows] that written reasons end in; 0 where there is none to be read."""
        reading = reason.state - self.tables.stop_tables.shape[1]  # 0 or 1
        return jnp.where(reason.ended == TAG, 1.0 - 2.0 * reading, 0.0)

    def _settle(self, now: TournamentState) -> TournamentState:
        """The matches of a round whose rows have been asked: the winners go on."""
        questions, candidates, pairs, orders = self.questions, self.candidates, self.pairs, self.judge.orders
        votes = jax.lax.dynamic_slice_in_dim(now.rows.vote, now.asked, pairs * orders, axis=1)
        votes = votes.reshape(questions, pairs, orders) * jnp.array([1.0, -1.0][:orders])
        left, right = now.bracket[:, 0 : 2 * pairs : 2], now.bracket[:, 1 : 2 * pairs : 2]  # [questions, pairs]
        failed = (now.rows.vote[:, :candidates] < 0) & self.tables.checked[self.case.stage]
        left_failed, right_failed = (jnp.take_along_axis(failed, x, axis=1) for x in (left, right))
        checked = left_failed != right_failed
        margin = jnp.where(checked, jnp.where(left_failed, -1.0, 1.0), votes.mean(axis=-1))
        left_score, right_score = (jnp.take_along_axis(self.case.scores, x, axis=1) for x in (left, right))
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


def _pick(pieces: RaggedTokens, index: jax.Array) -> RaggedTokens:
    """JudgeQueries ``index`` int32 [questions, n] of pieces [questions, rows]."""
    tokens = jnp.take_along_axis(pieces.tokens, index[..., None], axis=1)
    return RaggedTokens(tokens, jnp.take_along_axis(pieces.lengths, index, axis=1))


def _nothing_written(rows: int, capacity: int) -> Samples:
    zeros = jnp.zeros(rows, jnp.int32)
    return Samples(jnp.zeros((rows, capacity), jnp.int32), zeros, zeros, zeros, jnp.zeros(rows, jnp.float32))
