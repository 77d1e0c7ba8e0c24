"""Least cost of giving values to candidates: tokens, FLOPs and chip-hours, by arithmetic and before it starts."""

from dataclasses import dataclass

from llava_cot_jax.benchmark.workload import TAG_TOKENS, Workload
from llava_cot_jax.costs import model_costs
from llava_cot_jax.costs.chips import Chip
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.planning.search_plan import BFLOAT16_BYTES
from llava_cot_jax.search.search_costs import CostCounter
from llava_cot_jax.search.strategies import SearchSpec

JOINT = 2 * TAG_TOKENS
"""Number of tokens between two stages: a closing and an opening."""


@dataclass(frozen=True)
class RolloutEstimate:
    """Least cost of giving values to the candidates of questions.

    Attributes:
        questions: Number of questions.
        sampled: Number of tokens that are sampled.
        read: Number of tokens that are only read.
        flops: FLOPs, by the useful count of ``model_costs``.
        chip: Chip that the hours are of.
        chip_hours: Least hours of one such chip, by the roofline of each call.
        slots: Number of questions that are answered at a time.
        stage_tokens: Number of tokens of a candidate of each stage that is assumed.
    """

    questions: int
    sampled: int
    read: int
    flops: float
    chip: Chip
    chip_hours: float
    slots: int
    stage_tokens: tuple[int, ...]

    def __str__(self) -> str:
        lengths = ", ".join(map(str, self.stage_tokens))
        return (
            f"{self.questions:,} questions: {self.sampled:,} tokens to generate and {self.read:,} to read, "
            f"{self.flops:.3g} FLOPs, at least {self.chip_hours:.3g} hours of one {self.chip.name} (its roofline, "
            f"{self.slots} questions at a time, stages of {lengths} tokens)"
        )


def estimate_rollouts(
    config: MllamaConfig,
    spec: SearchSpec,
    continuations: int,
    chip: Chip,
    *,
    questions: int,
    slots: int,
    work: Workload,
    weight_bytes: int = BFLOAT16_BYTES,
) -> RolloutEstimate:
    """Estimate the least cost of giving values to the candidates of questions.

    Args:
        config: Configuration of the model.
        spec: Static part of the search, by stages or of whole answers.
        continuations: Number of continuations of a candidate; 0 of whole answers.
        chip: Chip to compute hours for. The model is taken to fit, or to be split at no cost.
        questions: Number of questions.
        slots: Number of questions that are answered at a time.
        work: Lengths of prompts, stages, probes and reasons.
        weight_bytes: Bytes per weight; 1 is int8.
    """
    costs = _RolloutCosts(config, spec, continuations, work)
    sampled = sum(costs.tokens[part] for part in ("candidates", "continuations", "judge_reasons"))
    return RolloutEstimate(
        questions=questions,
        sampled=questions * sampled,
        read=questions * (sum(costs.tokens.values()) - sampled),
        flops=float(questions * sum(costs.flops.values())),
        chip=chip,
        chip_hours=costs.seconds(chip, slots, weight_bytes) * questions / slots / 3600,
        slots=slots,
        stage_tokens=work.stage_tokens,
    )


class _RolloutCosts(CostCounter):
    """Tokens and FLOPs of a question whose candidates are continued, and the calls that they are spent in.

    Args:
        config: Configuration of the model.
        spec: Static part of the search, by stages or of whole answers.
        continuations: Number of continuations of a candidate; 0 of whole answers.
        work: Lengths of prompts, stages and probes.
    """

    def __init__(self, config: MllamaConfig, spec: SearchSpec, continuations: int, work: Workload) -> None:
        images = 1 if work.image_tiles else 0
        super().__init__(config, images)
        self._model, self._seen = config, images * config.vision.image_tokens
        for counts in (self.tokens, self.flops):
            counts |= {"joints": 0, "continuations": 0}
        self._prefills: list[int] = []  # FLOPs of each call
        prefix = work.prompt_tokens
        self._add_call("prompt", 1, prefix, 0)
        for stage, tokens in enumerate(work.stage_tokens):
            count, left = spec.num_candidates[stage], sum(work.stage_tokens[stage + 1 :])
            self.add_decoding("candidates", [tokens] * count, prefix, [0] * count)
            if spec.stages:  # a whole answer has the probe of whole answers alone
                self._add_call("verifier_probes", count, work.probe_tokens + 1, prefix + tokens)
            if (judge := spec.judge_of(stage)) is not None:
                pair, queries = 2 * tokens + work.judge_prompt_tokens, (count - 1) * judge.orders
                self._add_call("judge_queries", queries, pair, work.prompt_tokens)
                if judge.writes_reasons:
                    reasons = [work.reason_tokens] * queries
                    self.add_decoding("judge_reasons", reasons, work.prompt_tokens, [pair] * queries)
            if left:
                rows = count * continuations
                self._add_call("joints", count, JOINT, prefix + tokens)
                self.add_decoding("continuations", [left] * rows, prefix, [tokens + JOINT] * rows)
                self._add_call("winners", 1, tokens + JOINT, prefix)
            self._add_call("verifier_probes", count, work.probe_tokens, prefix + tokens + left)
            prefix += tokens + JOINT

    def _add_call(self, part: str, rows: int, tokens: int, prefix: int) -> None:
        """Add a prefill of ``tokens`` tokens of ``rows`` sequences side by side, each after ``prefix`` others."""
        before = sum(self.flops.values())
        for _ in range(rows):
            self.add_prefill(part, tokens, prefix)
        self._prefills.append(sum(self.flops.values()) - before)

    def seconds(self, chip: Chip, slots: int, weight_bytes: int) -> float:
        """Return the least seconds of a batch of ``slots`` questions on one chip, the roofline of each call."""
        weights = model_costs.parameters_per_step(self._model, images=self._seen > 0) * weight_bytes

        def least(flops: float, hbm_bytes: float) -> float:
            return max(flops / chip.peak_flops, hbm_bytes / chip.hbm_bandwidth)

        total = slots * self.flops["vision"] / chip.peak_flops
        total += sum(least(slots * flops, weights) for flops in self._prefills)
        for run in self.decoding_runs:
            before = run.prefix_tokens + run.suffix_tokens + run.steps // 2
            work = model_costs.text_flops(self._model, 1, self._seen, prefix=before)
            read = model_costs.bytes_per_step(
                self._model,
                questions=slots,
                candidates=run.num_sequences,
                prefix=run.prefix_tokens,
                suffix=run.steps // 2,
                image_tokens=self._seen,
                weight_bytes=weight_bytes,
            )
            flops = slots * run.num_sequences * sum(work.values())
            total += run.steps * least(flops, sum(read.values()))
        return total
