"""Sentence-level beam search, LLaVA-CoT's baseline: of the candidates for each sentence, one is continued."""

from dataclasses import dataclass, field, replace

from llava_cot_jax.checks import check_instance, check_int, shown
from llava_cot_jax.errors import UserError
from llava_cot_jax.search.scorers import Judge, OwnScorer, Scorer, check_scorer
from llava_cot_jax.search.strategies import FORMAT_REMEDY, SearchSpec, whole_answers
from llava_cot_jax.stage_format import LLAVA_COT, StageFormat


@dataclass(frozen=True)
class SentenceBeam:
    """Strategy of sentence-level beam search: of the candidates for each sentence, the scorer chooses one to continue.

    An answer ends with the model's turn, with the closing of the format's last stage, or at the first of the three
    bounds that it reaches. A sentence that has as many tokens as it may have is cut there, and the next one goes on.

    Attributes:
        num_candidates: Number of candidates of a sentence.
        scorer: Scorer that chooses: ``Judge``, ``Verifier`` or ``LogProbability``.
        temperature: Temperature of sampling.
        max_new_tokens: Largest number of tokens of the whole answer; by default 2048, or what the context leaves.
        max_sentences: Largest number of sentences of an answer.
        max_sentence_tokens: Largest number of tokens of a sentence.
        top_k: Number of likeliest tokens that are sampled from; None is all.
        top_p: Probability up to which the likeliest tokens are sampled from.
        format: Format of the answers.

    Raises:
        UserError: A setting is not of its type, or out of range.
    """

    num_candidates: int = 2
    scorer: Scorer = field(default_factory=Judge)
    temperature: float = 0.6
    max_new_tokens: int | None = None
    max_sentences: int = 64
    max_sentence_tokens: int = 128
    top_k: int | None = 50
    top_p: float = 0.9
    format: StageFormat = field(default=LLAVA_COT, repr=False)

    def __post_init__(self) -> None:
        self.to_spec()  # refuses wrong settings now

    def to_spec(self) -> SearchSpec:
        """Return the static part of the compiled search."""
        check_instance("format", self.format, StageFormat, FORMAT_REMEDY)
        check_int("max_sentences", self.max_sentences)
        check_int("max_sentence_tokens", self.max_sentence_tokens)
        if self.format.has_turns:
            raise UserError(
                f"format {self.format.name} asks for its stages in several turns, so that its answers cannot be "
                "searched for sentence by sentence: search with StageBeam (--search stage_beam)"
            )
        scorer = check_scorer(self.scorer)
        if isinstance(scorer, OwnScorer):
            raise UserError(
                f"scorer is {shown(self.scorer)}, and a search sentence by sentence calls no function: give Judge(), "
                "Verifier() or LogProbability(), or search with StageBeam"
            )
        whole = whole_answers(
            self.format, self.num_candidates, self.temperature, self.max_new_tokens, self.top_k, self.top_p, scorer
        )
        return replace(whole, max_sentences=self.max_sentences, max_sentence_tokens=self.max_sentence_tokens)
