"""Lengths of a search in tokens: the one place where they are computed for caches, checks, plans and benchmarks.

Only the shapes of tables are read, so these functions work on abstract arrays as well.
"""

from dataclasses import dataclass
from typing import Self

from llava_cot_jax.rounding import ceil_div
from llava_cot_jax.search.scorers import Judge
from llava_cot_jax.search.strategies import SearchSpec
from llava_cot_jax.search.tables import JudgeTables, StageTables, VerifierTables


@dataclass(frozen=True)
class SearchLengths:
    """Largest numbers of tokens of the parts of an answer.

    Attributes:
        candidate: Tokens that are sampled for a candidate.
        text: A candidate with its opening, or its label for the judge, and the closing that may be added.
        pending: Tokens that are prefilled before a stage: the prompt or the last winner, and the next opening.
        prefix: Tokens that the candidates of the last stage, or of the last sentence, share, where winners are read
            into one prefix.
        answer: The prompt with the whole answer.
        earlier: What a judge's prompt has room for of the winners before: all stages but one, or the answer so far.
    """

    candidate: int
    text: int
    pending: int
    prefix: int
    answer: int
    earlier: int

    @classmethod
    def of(cls, spec: SearchSpec, tables: StageTables, prompt: int) -> Self:
        """Return the lengths of a search after a prompt of ``prompt`` tokens."""
        candidate, tokens = spec.candidate_tokens, sum(spec.max_new_tokens)
        last = 0 if spec.max_sentences else spec.max_new_tokens[-1]  # it is never read before other candidates
        opening, closing = tables.openings.capacity, tables.closings.capacity
        label = opening if tables.labels is None else tables.labels.capacity
        text = max(opening, label) + candidate + closing
        return cls(
            candidate=candidate,
            text=text,
            pending=max(prompt, candidate + closing) + opening,
            prefix=prompt + tokens - last + spec.num_stages * (closing + opening) - closing,
            answer=prompt + tokens + spec.num_stages * (closing + opening),
            earlier=tokens if spec.max_sentences else (spec.num_stages - 1) * text,
        )


@dataclass(frozen=True)
class JudgeLengths:
    """Largest numbers of tokens of a prompt of the judge, and of what the judge writes after it.

    Attributes:
        prefix: Tokens that all prompts of a stage begin with, up to the first candidate.
        suffix: Tokens of the rest of a prompt: two candidates, and the texts around them.
        verdict: Tokens that the judge writes.
    """

    prefix: int
    suffix: int
    verdict: int

    @classmethod
    def of(cls, judge: Judge, tables: JudgeTables, *, header: int, question: int, text: int, earlier: int) -> Self:
        """Return the lengths of the prompts that are made of ``tables``.

        Args:
            judge: Settings of the judge.
            tables: Texts of the prompts.
            header: Largest number of tokens of the chat header.
            question: Largest number of tokens of the question.
            text: Largest number of tokens of a candidate with its tags.
            earlier: Largest number of tokens of the earlier stages, or of the beginning of the answer, that a prompt
                shows.
        """
        fixed = tables.intro.capacity + tables.middle.capacity + tables.label.capacity
        return cls(
            prefix=header + fixed + question + earlier,
            suffix=2 * text + tables.between.capacity + tables.ending.capacity,
            verdict=judge.max_new_tokens,
        )

    @property
    def total(self) -> int:
        """Tokens of the longest prompt and what is written after it."""
        return self.prefix + self.suffix + self.verdict


def probe_capacity(tables: VerifierTables, closing: int) -> int:
    """Return the largest number of tokens that the verifier reads after a candidate's cached ones.

    Args:
        tables: Probes of the verifier.
        closing: Largest number of tokens that close a candidate.
    """
    return 1 + closing + tables.probes.capacity


def probe_chunk(prefill_chunk: int, num_candidates: int, capacity: int) -> int:
    """Return the number of tokens of each probe to prefill at a time.

    The chunks are of equal size. All probes of a question together take at most twice the tokens of a prompt's chunk:
    on an accelerator one chunk then reads the weights once for ten candidates, and the memory stays bounded.

    Args:
        prefill_chunk: Number of tokens of each question that are prefilled at a time.
        num_candidates: Number of probes of a question.
        capacity: Largest number of tokens of a probe.
    """
    return ceil_div(capacity, ceil_div(capacity, max(1, 2 * prefill_chunk // num_candidates)))
