"""Tournaments in which the judge chooses among the candidates of each question, inside the compiled search.

The candidates are drawn into a random bracket, and all pairs of a round are judged before the next round. Where the
number of candidates is odd, one advances without a match, and comes first in the next round. (Upstream puts each winner
back among the rest and draws again.)
"""

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from llava_cot_jax.search.judge import CHECK, PAIR, JudgeCache, JudgeQueries, StageJudge
from llava_cot_jax.search.random_keys import Draw, fold_in_each

_Entries = TypeVar("_Entries", "Matches", JudgeQueries)


class Decision(IntEnum):
    """Reason that decided a match."""

    JUDGED = 0
    """The verdicts."""
    CHECKED = 1
    """A check that one of the two candidates alone failed."""
    SCORED = 2
    """The mean log-probability, where the verdicts were even or could not be read."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Matches:
    """Matches in the order of the rounds.

    Attributes:
        first: int32, a candidate.
        second: int32, the other candidate.
        margin: float32, from 1 (``first``) to -1 (``second``): the mean vote of the orders, or that of the checks.
        decision: int32, what decided the match: a value of ``Decision``.
        winner: int32, the candidate that advances.
    """

    first: Int[Array, "questions matches"]
    second: Int[Array, "questions matches"]
    margin: Float[Array, "questions matches"]
    decision: Int[Array, "questions matches"]
    winner: Int[Array, "questions matches"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StageJudgement:
    """Outcome of a tournament.

    Attributes:
        winner: int32, the candidate that is left.
        queries: Queries, of which the first ``num_queries`` were asked.
        matches: Matches, of which there is one fewer than the stage has candidates.
        num_queries: int32, number of queries of each question.
        prefix_lengths: int32, number of tokens of the shared prefix of each kind of prompt; 0 where it was not needed.
    """

    winner: Int[Array, " questions"]
    queries: JudgeQueries
    matches: Matches
    num_queries: Int[Array, " questions"]
    prefix_lengths: Int[Array, "questions kinds"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bracket:
    """Standing of the tournaments of a batch of questions.

    Attributes:
        order: int32, the candidates, of which the first ``num_left`` are still in.
        num_left: int32, number of candidates that are still in.
        matches: Matches, of which the first ``num_matches`` were played.
        num_matches: int32, number of matches played.
    """

    order: Int[Array, "questions candidates"]
    num_left: Int[Array, " questions"]
    matches: Matches
    num_matches: Int[Array, " questions"]

    @property
    def pairs(self) -> tuple[Int[Array, "questions pairs"], Int[Array, "questions pairs"]]:
        """The candidates of each pair of a round. Those beyond ``num_left`` have no meaning."""
        end = 2 * (self.order.shape[1] // 2)
        return self.order[:, 0:end:2], self.order[:, 1:end:2]

    def advance(self, new: Matches) -> "Bracket":
        """Return the bracket after a round: the winners go on, after the candidate that had no opponent."""
        candidates = self.order.shape[1]
        num_pairs, num_unpaired = self.num_left // 2, self.num_left % 2
        place, pair = jnp.arange(candidates), jnp.arange(candidates // 2)
        last = jnp.take_along_axis(self.order, self.num_left[:, None] - 1, axis=1)
        winner = jnp.clip(place - num_unpaired[:, None], 0, candidates // 2 - 1)
        is_unpaired = (place == 0) & (num_unpaired[:, None] == 1)
        return Bracket(
            order=jnp.where(is_unpaired, last, jnp.take_along_axis(new.winner, winner, axis=1)),
            num_left=num_pairs + num_unpaired,
            matches=_write(self.matches, new, self.num_matches, pair < num_pairs[:, None]),
            num_matches=self.num_matches + num_pairs,
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TournamentState:
    """State of the tournaments of a batch of questions between rounds.

    Attributes:
        checks_next: Whether the next round is that of the checks.
        bracket: Standing of the candidates.
        cache: KV caches of the judge.
        queries: Queries, of which the first ``num_queries`` were asked.
        num_queries: int32, number of queries asked.
    """

    checks_next: Bool[Array, " questions"]
    bracket: Bracket
    cache: JudgeCache
    queries: JudgeQueries
    num_queries: Int[Array, " questions"]


@jax.named_scope("judge")
def run_tournament(judge: StageJudge) -> StageJudgement:
    """Let the judge compare the candidates of each question until one is left."""

    def play(state: TournamentState) -> TournamentState:
        return _play_round(judge, state)

    end = jax.lax.while_loop(lambda state: (state.bracket.num_left > 1).any(), play, _init_state(judge))
    bracket = end.bracket
    return StageJudgement(bracket.order[:, 0], end.queries, bracket.matches, end.num_queries, end.cache.prefix_lengths)


def _init_state(judge: StageJudge) -> TournamentState:
    """Return the state before the first round."""
    candidates, questions = judge.num_candidates, judge.num_questions
    none = jnp.zeros((questions, candidates - 1), jnp.int32)
    zeros = jnp.zeros(questions, jnp.int32)
    bracket = Bracket(
        order=_draw_order(judge.inputs.keys, judge.inputs.num_candidates, candidates),
        num_left=judge.inputs.num_candidates,
        matches=Matches(none, none, none.astype(jnp.float32), none, none),
        num_matches=zeros,
    )
    queries = judge.empty_queries(candidates + (candidates - 1) * judge.settings.orders)
    return TournamentState(judge.checks_candidates, bracket, judge.init_cache(), queries, zeros)


@jax.named_scope("tournament_round")
def _play_round(judge: StageJudge, state: TournamentState) -> TournamentState:
    """Play one round of each question: the checks, or the matches of all candidates that are still in."""
    plays = state.bracket.num_left > 1
    kind = jnp.where(state.checks_next, CHECK, PAIR)
    state = replace(state, cache=judge.prefill_prefix(state.cache, kind, plays))
    num_pair_queries = state.bracket.num_left // 2 * judge.settings.orders
    num_queries = jnp.where(state.checks_next, judge.inputs.num_candidates, num_pair_queries)
    num_queries = jnp.where(plays, num_queries, 0)

    def ask(batch: jax.Array, state: TournamentState) -> TournamentState:
        return _ask_batch(judge, state, kind, batch, num_queries)

    state = jax.lax.fori_loop(0, -(-num_queries.max() // judge.batch_size), ask, state)
    advanced = state.bracket.advance(_decide_matches(judge, state))
    return TournamentState(
        checks_next=jnp.zeros_like(state.checks_next),
        bracket=jax.tree.map(lambda old, new: _where(kind == CHECK, old, new), state.bracket, advanced),
        cache=state.cache,
        queries=state.queries,
        num_queries=state.num_queries + num_queries,
    )


def _ask_batch(
    judge: StageJudge,
    state: TournamentState,
    kind: Int[Array, " questions"],
    batch: Int[Array, ""],
    num_queries: Int[Array, " questions"],
) -> TournamentState:
    """Ask batch ``batch`` of the ``num_queries`` queries of a round."""
    last, orders = judge.num_candidates - 1, judge.settings.orders
    query = batch * judge.batch_size + jnp.arange(judge.batch_size)  # index in the round
    match, is_swapped = query // orders, query % orders == 1
    left, right = (state.bracket.order[:, jnp.clip(2 * match + side, 0, last)] for side in (0, 1))
    is_pair = kind[:, None] == PAIR
    first = jnp.where(is_pair, jnp.where(is_swapped, right, left), jnp.clip(query, 0, last))
    second = jnp.where(is_pair, jnp.where(is_swapped, left, right), 0)
    used = query < num_queries[:, None]
    cache, queries = judge.ask(state.cache, kind, first, second, used)
    queries = _write(state.queries, queries, state.num_queries + batch * judge.batch_size, used)
    return replace(state, cache=cache, queries=queries)


def _decide_matches(judge: StageJudge, state: TournamentState) -> Matches:
    """Return the matches of a round whose queries have been asked, [questions, pairs]."""
    candidates, orders = judge.num_candidates, judge.settings.orders
    left, right = state.bracket.pairs
    query = state.num_queries[:, None] + jnp.arange(left.shape[1] * orders)
    votes = jnp.take_along_axis(state.queries.vote, query, axis=1, mode="clip")  # those beyond have no meaning
    votes = votes.reshape(*left.shape, orders) * jnp.array([1.0, -1.0][:orders])
    failed = (state.queries.vote[:, :candidates] < 0) & judge.checks_candidates[:, None]
    left_failed, right_failed = (jnp.take_along_axis(failed, side, axis=1) for side in (left, right))
    is_checked = left_failed != right_failed
    margin = jnp.where(is_checked, jnp.where(left_failed, -1.0, 1.0), votes.mean(axis=-1))
    scores = judge.inputs.mean_log_prob
    left_score, right_score = (jnp.take_along_axis(scores, side, axis=1) for side in (left, right))
    left_scores_more = (left_score > right_score) | ((left_score == right_score) & (left < right))
    winner = jnp.where((margin > 0) | ((margin == 0) & left_scores_more), left, right)
    decision = jnp.where(is_checked, Decision.CHECKED, jnp.where(margin == 0, Decision.SCORED, Decision.JUDGED))
    return Matches(left, right, margin, decision, winner)


def _draw_order(
    keys: Key[Array, " questions"], num_candidates: Int[Array, " questions"], capacity: int
) -> Int[Array, "questions {capacity}"]:
    """Return a random order of each question's first ``num_candidates`` candidates, before those that it lacks."""
    keys = jax.vmap(lambda key: jax.random.fold_in(key, Draw.BRACKET))(keys)
    each = jax.vmap(fold_in_each, (0, None))(keys, jnp.arange(capacity))
    lots = jax.vmap(jax.vmap(jax.random.uniform))(each)
    has_candidate = jnp.arange(capacity) < num_candidates[:, None]
    return jnp.argsort(jnp.where(has_candidate, lots, jnp.inf), axis=-1).astype(jnp.int32)


def _where(chosen: Bool[Array, " questions"], x: jax.Array, y: jax.Array) -> jax.Array:
    """Return ``x`` of the questions that are chosen, and ``y`` of the others."""
    return jnp.where(chosen.reshape(-1, *[1] * (x.ndim - 1)), x, y)


def _write(
    old: _Entries, new: _Entries, start: Int[Array, " questions"], used: Bool[Array, "questions entries"]
) -> _Entries:
    """Return ``old`` with those entries of ``new`` that are used, from each question's ``start`` on."""
    question, entry = jnp.arange(used.shape[0])[:, None], start[:, None] + jnp.arange(used.shape[1])

    def write(x: jax.Array, y: jax.Array) -> jax.Array:
        return x.at[question, jnp.where(used, entry, x.shape[1])].set(y, mode="drop")

    return jax.tree.map(write, old, new)
