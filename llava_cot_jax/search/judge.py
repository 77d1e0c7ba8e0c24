"""The model as judge of its own candidates: its prompts, verdicts and written reasons, inside the compiled search.

A query is one prompt to the judge. It shows a pair of candidates in one order, or one candidate to check. All queries
of one kind in a stage share a prefix, which is prefilled once, and the images. ``prompts`` draws a prompt's parts.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from llava_cot_jax.inference.decoding import Decoder, EndReason, Samples, StopConditions, prefill, sample
from llava_cot_jax.inference.ragged_tokens import RaggedTokens, concat
from llava_cot_jax.inference.settings import Sampling
from llava_cot_jax.model.kv_cache import CacheLayers, KVCache, Segment
from llava_cot_jax.search.lengths import JudgeLengths
from llava_cot_jax.search.prompts import PROMPT_KINDS
from llava_cot_jax.search.random_keys import Draw, fold_in_each
from llava_cot_jax.search.scorers import Judge
from llava_cot_jax.search.tables import JudgeTables

PAIR, CHECK = PROMPT_KINDS.index("pair"), PROMPT_KINDS.index("check")
"""Kinds of queries, by their index in all tables of prompts."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class JudgeQueries:
    """Queries of a stage and their verdicts, [questions, queries]. Checks come before pairs.

    Attributes:
        first: int32, the candidate shown as response 1, or the one that is checked.
        second: int32, the candidate shown as response 2; without meaning in a check.
        suffix_lengths: int32, number of tokens of the prompt after the shared prefix.
        vote: float32, from 1 (response 1, or correct) to -1; 0 is unreadable.
        other_probability: float32, probability of anything but the two verdicts; 0 where reasons are written.
        reason: The written reason; empty with a token verdict.
    """

    first: Int[Array, "questions queries"]
    second: Int[Array, "questions queries"]
    suffix_lengths: Int[Array, "questions queries"]
    vote: Float[Array, "questions queries"]
    other_probability: Float[Array, "questions queries"]
    reason: Samples


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class JudgeInputs:
    """Candidates of a stage, and what the judge is told about them.

    Attributes:
        stage: int32, index of each question's stage.
        texts: Candidates as the judge is shown them, [questions, candidates].
        mean_log_prob: float32, mean log-probability of a token of each candidate.
        num_candidates: int32, number of each question's candidates; those beyond have no meaning. A single one wins
            without a query.
        chat_headers: Beginning of each kind of prompt, [kinds, questions].
        question: The question, [questions].
        earlier: Texts that a prompt may show before the candidates, such as the winners of the stages before,
            [questions, texts].
        keys: Random keys of the stage.
    """

    stage: Int[Array, " questions"]
    texts: RaggedTokens
    mean_log_prob: Float[Array, "questions candidates"]
    num_candidates: Int[Array, " questions"]
    chat_headers: RaggedTokens
    question: RaggedTokens
    earlier: RaggedTokens
    keys: Key[Array, " questions"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class JudgeCache:
    """KV caches of the judge in a stage.

    Attributes:
        prefix: Shared prefix of a question's queries of one kind.
        kind: int32, that kind; -1 before a prefix is there.
        prefix_lengths: int32, number of tokens of the prefixes prefilled so far, by kind.
        suffix: Room for the rest of the prompts of a batch and the reasons written after them.
    """

    prefix: Segment
    kind: Int[Array, " questions"]
    prefix_lengths: Int[Array, "questions kinds"]
    suffix: CacheLayers


@dataclass(frozen=True)
class StageJudge:
    """Judge of candidates, where each question may be in another stage.

    Attributes:
        decoder: Model and images.
        settings: Settings of the judge.
        inputs: Candidates, and what the judge is told about them.
        tables: Texts of the prompts, and how verdicts are read.
        sampling: top_k and top_p of written reasons.
    """

    decoder: Decoder
    settings: Judge
    inputs: JudgeInputs
    tables: JudgeTables
    sampling: Sampling

    @property
    def num_questions(self) -> int:
        """Number of questions."""
        return self.inputs.texts.lengths.shape[0]

    @property
    def num_candidates(self) -> int:
        """Largest number of candidates of a stage."""
        return self.inputs.texts.lengths.shape[1]

    @property
    def batch_size(self) -> int:
        """Number of queries of each question that are processed side by side."""
        return self.settings.queries_per_batch(self.num_candidates)

    @property
    def lengths(self) -> JudgeLengths:
        """Lengths of the prompts, in which every earlier text may be shown."""
        inputs = self.inputs
        return JudgeLengths.of(
            self.settings,
            self.tables,
            header=inputs.chat_headers.capacity,
            question=inputs.question.capacity,
            text=inputs.texts.capacity,
            earlier=inputs.earlier.lengths.shape[1] * inputs.earlier.capacity,
        )

    @property
    def suffix_chunk(self) -> int:
        """Number of tokens of each query that are prefilled at a time."""
        return max(1, self.decoder.prefill_chunk // self.batch_size)

    @property
    def checks_candidates(self) -> Bool[Array, " questions"]:
        """Whether a question's candidates are checked before pairs are judged."""
        return self.tables.checked[self.inputs.stage]

    def empty_queries(self, capacity: int) -> JudgeQueries:
        """Return zeros for ``capacity`` queries of each question."""
        shape = (self.num_questions, capacity)
        numbers, votes = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)
        return JudgeQueries(numbers, numbers, numbers, votes, votes, _no_reasons(shape, self.lengths.verdict))

    def init_cache(self) -> JudgeCache:
        """Return empty caches."""
        decoder, lengths, questions = self.decoder, self.lengths, self.num_questions
        prefix = decoder.init_cache(questions, lengths.prefix + decoder.prefill_chunk)
        suffix_capacity = lengths.suffix + self.suffix_chunk + lengths.verdict
        return JudgeCache(
            prefix=Segment(prefix, jnp.zeros(questions, jnp.int32)),
            kind=jnp.full(questions, -1, jnp.int32),
            prefix_lengths=jnp.zeros((questions, len(PROMPT_KINDS)), jnp.int32),
            suffix=decoder.init_cache(questions * self.batch_size, suffix_capacity),
        )

    @jax.named_scope("judge_prefix")
    def prefill_prefix(
        self, cache: JudgeCache, kind: Int[Array, " questions"], used: Bool[Array, " questions"]
    ) -> JudgeCache:
        """Prefill the prefix of each question's queries of ``kind``, unless it is in the cache or is not used."""
        needed = used & (cache.kind != kind)
        tokens = self._prefix_tokens(kind).where(needed)
        before = KVCache(cache.prefix.layers, jnp.where(needed, 0, cache.prefix.lengths))
        layers, _ = prefill(self.decoder, tokens, before, text_only=kind == CHECK)
        return replace(
            cache,
            prefix=Segment(layers, jnp.where(needed, tokens.lengths, cache.prefix.lengths)),
            kind=jnp.where(needed, kind, cache.kind),
            prefix_lengths=cache.prefix_lengths.at[jnp.arange(self.num_questions), kind].add(tokens.lengths),
        )

    @jax.named_scope("judge_queries")
    def ask(
        self,
        cache: JudgeCache,
        kind: Int[Array, " questions"],
        first: Int[Array, "questions queries"],
        second: Int[Array, "questions queries"],
        used: Bool[Array, "questions queries"],
    ) -> tuple[JudgeCache, JudgeQueries]:
        """Ask a batch of queries, those of a question of one kind.

        Args:
            cache: Caches with the prefixes of these kinds.
            kind: int32, PAIR or CHECK.
            first: int32, the candidate shown as response 1, or the one to check.
            second: int32, the candidate shown as response 2; not shown in a check.
            used: Whether a query is asked at all.

        Returns:
            The caches, and the queries with their verdicts.
        """
        tokens = self._suffix_tokens(kind, first, second).where(used)
        flat = RaggedTokens(tokens.tokens.reshape(-1, tokens.capacity), tokens.lengths.reshape(-1))
        before = KVCache(cache.suffix, jnp.zeros_like(flat.lengths), (cache.prefix,))
        decoder = replace(self.decoder, prefill_chunk=self.suffix_chunk)
        suffix, logits = prefill(decoder, flat, before, text_only=kind == CHECK)
        if self.settings.writes_reasons:
            before = replace(before, suffix=suffix, lengths=flat.lengths)
            suffix, reason = self._write_reasons(kind, logits, before, first, second, used)
            vote = self._read_reasons(reason)
            other_probability = jnp.zeros_like(vote)
        else:
            vote, other_probability = self._read_verdict_tokens(logits)
            reason = _no_reasons(vote.shape, self.lengths.verdict)
        vote, other_probability, reason = jax.tree.map(
            lambda x: x.reshape(*first.shape, *x.shape[1:]), (vote, other_probability, reason)
        )
        queries = JudgeQueries(first, second, tokens.lengths, vote, other_probability, reason)
        return replace(cache, suffix=suffix), queries

    def _prefix_tokens(self, kind: Int[Array, " questions"]) -> RaggedTokens:
        """Tokens that all prompts of ``kind`` begin with, [questions]."""
        inputs, tables, at = self.inputs, self.tables, (kind, self.inputs.stage)
        before = range(inputs.earlier.lengths.shape[1])
        earlier = [inputs.earlier[:, i].where(tables.shows[*at, i]) for i in before]
        fixed = (tables.intro[at], inputs.question, tables.middle[at], *earlier, tables.label[at])
        return concat((inputs.chat_headers[kind, jnp.arange(self.num_questions)], *fixed), self.lengths.prefix)

    def _suffix_tokens(
        self,
        kind: Int[Array, " questions"],
        first: Int[Array, "questions queries"],
        second: Int[Array, "questions queries"],
    ) -> RaggedTokens:
        """Tokens of prompts after their prefix, [questions, queries]."""
        tables, at = self.tables, (kind[:, None], self.inputs.stage[:, None])
        first_text = _take_candidates(self.inputs.texts, first)
        second_text = _take_candidates(self.inputs.texts, second).where(kind[:, None] == PAIR)
        return concat((first_text, tables.between[at], second_text, tables.ending[at]), self.lengths.suffix)

    def _read_verdict_tokens(
        self, logits: Float[Array, "batch vocab"]
    ) -> tuple[Float[Array, " batch"], Float[Array, " batch"]]:
        """Votes by the probabilities of the next token, and the probability of anything but the two verdicts."""
        verdicts = logits[:, self.tables.verdicts]  # [batch, 2]
        vote = jnp.tanh((verdicts[:, 0] - verdicts[:, 1]) / 2)  # difference of their shares of their sum
        return vote, 1 - jnp.exp(verdicts - jax.nn.logsumexp(logits, axis=-1, keepdims=True)).sum(axis=-1)

    def _write_reasons(
        self,
        kind: Int[Array, " questions"],
        logits: Float[Array, "batch vocab"],
        cache: KVCache,
        first: Int[Array, "questions queries"],
        second: Int[Array, "questions queries"],
        used: Bool[Array, "questions queries"],
    ) -> tuple[CacheLayers, Samples]:
        """Sample the reasons after prompts. Return the suffix of the cache, and the reasons, [batch]."""
        judge, pair = self.settings, kind == PAIR
        keys = jax.vmap(jax.random.fold_in)(self.inputs.keys, jnp.where(pair, Draw.REASON, Draw.CHECK))
        queries, batch = first.shape[1], first.size
        stop = StopConditions(
            stop_tables=self.tables.stop_tables,
            table=jnp.repeat(kind, queries),
            max_new_tokens=jnp.repeat(jnp.where(pair, judge.reason_tokens, judge.check_tokens), queries),
            temperature=jnp.full(batch, judge.temperature, jnp.float32),
            keys=jax.vmap(fold_in_each)(keys, first, second).reshape(-1),
            used=used.reshape(-1),
        )
        return sample(
            self.decoder,
            logits,
            cache,
            stop,
            capacity=self.lengths.verdict,
            sampling=replace(self.sampling, temperature=judge.temperature),
            text_only=kind == CHECK,
        )

    def _read_reasons(self, reason: Samples) -> Float[Array, " batch"]:
        """Votes that written reasons end in; 0 where there is none to be read."""
        reading = reason.state - self.tables.stop_tables.shape[1]  # 0 or 1
        return jnp.where(reason.ended == EndReason.TAG, 1.0 - 2.0 * reading, 0.0)


def _take_candidates(texts: RaggedTokens, index: Int[Array, "questions queries"]) -> RaggedTokens:
    """Texts of the candidates that each query names, [questions, queries]."""
    tokens = jnp.take_along_axis(texts.tokens, index[..., None], axis=1)
    return RaggedTokens(tokens, jnp.take_along_axis(texts.lengths, index, axis=1))


def _no_reasons(shape: tuple[int, ...], capacity: int) -> Samples:
    """Empty reasons."""
    zeros = jnp.zeros(shape, jnp.int32)
    return Samples(jnp.zeros((*shape, capacity), jnp.int32), zeros, zeros, zeros, jnp.zeros(shape, jnp.float32))
