"""Costs of a search: tokens and FLOPs of each of its parts, by the useful count of ``model_costs``."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax

from llava_cot_jax.costs import model_costs
from llava_cot_jax.inference.decoding import EndReason
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.search.judge import CHECK, PAIR, JudgeQueries
from llava_cot_jax.search.program import StageResult
from llava_cot_jax.search.scorers import Judge, Verifier
from llava_cot_jax.search.strategies import SearchSpec
from llava_cot_jax.search.tournament import StageJudgement
from llava_cot_jax.search.trace import num_checks, stages_of


@dataclass(frozen=True)
class DecodingRun:
    """Sequences that were sampled side by side, in one run of the decoding loop.

    Attributes:
        num_sequences: Number of sequences.
        steps: Number of steps of the loop, each of which reads the weights once.
        prefix_tokens: Number of tokens before the sequences, which they share.
        suffix_tokens: Number of each sequence's own tokens before those that are sampled, on average.
        text_only: Whether the sequences see no image.
    """

    num_sequences: int
    steps: int
    prefix_tokens: int
    suffix_tokens: int
    text_only: bool


class CostCounter:
    """Counts the tokens and FLOPs of a question's answer, by what they are spent on.

    Args:
        config: Configuration of the model.
        num_images: Number of images of the question.

    Attributes:
        tokens: Number of tokens, as in ``Trace``.
        flops: FLOPs, as in ``Trace``.
        decoding_runs: Runs of the decoding loop, as if all sequences of a stage and a kind were sampled in one run.
    """

    def __init__(self, config: MllamaConfig, num_images: int) -> None:
        self._config = config
        self._image_tokens = num_images * config.vision.image_tokens
        parts = (
            *("prompt", "winners", "candidates", "verifier_probes"),
            *("judge_prefixes", "judge_queries", "judge_reasons"),
        )
        self.tokens = dict.fromkeys(parts, 0)
        vision = sum(model_costs.vision_flops(config, num_images).values()) if num_images else 0
        self.flops = {"vision": vision, **dict.fromkeys(parts, 0)}
        self.decoding_runs: list[DecodingRun] = []

    def add_prefill(self, part: str, tokens: int, prefix: int, text_only: bool = False) -> None:
        """Add a prefill of ``tokens`` tokens after ``prefix`` others, with logits of the last one."""
        self._add(part, tokens, tokens, prefix, min(tokens, 1), text_only)

    def add_decoding(
        self, part: str, sampled: Sequence[int], prefix: int, suffixes: Sequence[int], text_only: bool = False
    ) -> None:
        """Add sequences of ``sampled`` tokens, each after the shared prefix and its own suffix.

        The first token of a sequence is sampled from the logits of the prefill; the last is not computed with.
        """
        for tokens, suffix in zip(sampled, suffixes, strict=True):
            self._add(part, tokens, tokens - 1, prefix + suffix, tokens - 1, text_only)
        if sampled:
            steps, mean_suffix = max(sampled) - 1, sum(suffixes) // len(suffixes)
            self.decoding_runs.append(DecodingRun(len(sampled), steps, prefix, mean_suffix, text_only))

    def add_probe(self, tokens: int, before: int, kept: int) -> None:
        """Add what the verifier reads after a candidate of ``kept`` tokens, of which the last is not cached."""
        self.add_prefill("verifier_probes", tokens, before + max(kept - 1, 0))

    def _add(self, part: str, tokens: int, computed: int, before: int, scored: int, text_only: bool) -> None:
        """Add ``tokens`` tokens, and the FLOPs of computing ``computed`` of them, with logits of ``scored`` of them."""
        self.tokens[part] += tokens
        image_tokens = 0 if text_only else self._image_tokens
        work = model_costs.text_flops(self._config, computed, image_tokens, prefix=before, scored=scored)
        self.flops[part] += sum(work.values())


class SearchCosts(CostCounter):
    """Tokens and FLOPs of the search for one question's answer.

    Args:
        config: Configuration of the model.
        spec: Static part of the search.
        stages: Result of each stage of the question, in host arrays.
        num_images: Number of images of the question.
    """

    def __init__(self, config: MllamaConfig, spec: SearchSpec, stages: Sequence[StageResult], num_images: int) -> None:
        super().__init__(config, num_images)
        if spec.rounds:
            self._add_rounds(spec, stages)
        else:
            self._add_stages(spec, stages)

    def _add_stages(self, spec: SearchSpec, stages: Sequence[StageResult]) -> None:
        """Add stages, or sentences, whose winners are read into one prefix."""
        prefix = 0
        for place, (_, number, _, stage) in enumerate(stages_of(spec, stages)):
            self.add_prefill("winners" if place else "prompt", int(stage.num_prefilled), prefix)
            prefix += int(stage.num_prefilled)
            self._add_candidates(spec, number, stage, prefix, [0] * spec.num_candidates[number])
            judge = spec.judge_of(number)
            if judge is not None and stage.judgement is not None:
                self._add_judgement(judge, stage.judgement, num_checks(spec, number, judge, stage.judgement))

    def _add_rounds(self, spec: SearchSpec, stages: Sequence[StageResult]) -> None:
        """Add the stages of a retracing search, in which candidates are continued over their own cache.

        What is read between two stages is divided evenly among the candidates that are continued.
        """
        assert spec.rounds is not None
        first, reasonings = stages[0], list[int]()
        prompt = int(first.num_prefilled)
        self.add_prefill("prompt", prompt, 0)
        self._add_candidates(spec, 0, first, prompt, [0])
        before, root = [prompt + int(first.kept[0])], 0
        for _, number, _, stage in stages_of(spec, stages)[1:]:
            count = spec.num_candidates[number]
            assert stage.parent is not None
            before = reasonings if number == 3 else before
            parents = [before[int(i)] for i in stage.parent[:count]]
            rows = {1: 1, 2: spec.rounds.keep, 3: count}[number]
            if number == 1 and root:  # the end of the summary is read once
                starts = [root] * count
            else:
                joint, rest = divmod(int(stage.num_prefilled), rows)
                for row, parent in enumerate(parents[:: count // rows]):
                    self.add_prefill("winners", joint + (row < rest), parent - 1)
                starts = [parent - 1 + joint for parent in parents]
                root = root or starts[0]
            self._add_candidates(spec, number, stage, root, [start - root for start in starts])
            before = [start + int(kept) for start, kept in zip(starts, stage.kept, strict=False)]
            if number == 2:
                reasonings += before

    def _add_candidates(
        self, spec: SearchSpec, number: int, stage: StageResult, prefix: int, suffixes: Sequence[int]
    ) -> None:
        """Add the candidates of a stage, and their probes, each after the shared prefix and its own suffix."""
        sampled = stage.candidates.num_sampled[stage.candidates.ended != EndReason.UNUSED].tolist()
        self.add_decoding("candidates", sampled, prefix, suffixes)
        if stage.scores is not None and isinstance(spec.scorers[number], Verifier):
            for i, suffix in enumerate(suffixes):
                self.add_probe(int(stage.scores.probe_lengths[i]), prefix + suffix, int(stage.kept[i]))

    def _add_judgement(self, judge: Judge, judgement: StageJudgement, num_checks: int) -> None:
        queries: JudgeQueries = jax.tree.map(lambda x: x[: int(judgement.num_queries)], judgement.queries)
        for kind, indices in ((CHECK, slice(num_checks)), (PAIR, slice(num_checks, None))):
            prefix, text_only = int(judgement.prefix_lengths[kind]), kind == CHECK
            self.add_prefill("judge_prefixes", prefix, 0, text_only)
            suffixes = queries.suffix_lengths[indices].tolist()
            for suffix in suffixes:
                self.add_prefill("judge_queries", suffix, prefix, text_only)
            if judge.writes_reasons:
                sampled = queries.reason.num_sampled[indices].tolist()
                self.add_decoding("judge_reasons", sampled, prefix, suffixes, text_only)
