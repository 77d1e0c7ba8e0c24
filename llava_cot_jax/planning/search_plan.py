"""Plan of a search on a slice: memory, roofline and seconds by arithmetic, and the compiled program."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from llava_cot_jax.benchmark.inputs import endless_tables, random_search_inputs
from llava_cot_jax.benchmark.workload import Workload
from llava_cot_jax.costs import model_costs
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.sharding import abstract_mesh, check_mesh, default_mesh_shape, make_mesh
from llava_cot_jax.planning.communication import shard_bytes
from llava_cot_jax.planning.compiler import CompiledProgram, compile_for
from llava_cot_jax.planning.memory import MemoryShares
from llava_cot_jax.planning.programs import WeightDtype, abstract_params, lower_search
from llava_cot_jax.planning.roofline import Roofline
from llava_cot_jax.planning.slices import GENERATIONS, HBM_MARGIN, Slice
from llava_cot_jax.rounding import ceil_div
from llava_cot_jax.search.lengths import JudgeLengths, SearchLengths, probe_capacity, probe_chunk
from llava_cot_jax.search.program import ACCELERATOR_CHUNK
from llava_cot_jax.search.rollouts import row_capacity
from llava_cot_jax.search.rounds import Rounds
from llava_cot_jax.search.scorers import Judge, Verifier
from llava_cot_jax.search.strategies import SearchSpec
from llava_cot_jax.search.tables import ScorerTables, StageTables

TYPICAL_WORKLOAD = Workload(prompt_tokens=256, judge_prompt_tokens=200)
"""Lengths that are planned with: stages as long as in the standard workload of ``bench``, with longer prompts."""

BFLOAT16_BYTES = 2
"""Bytes per value of KV caches and activations, which are bfloat16 whatever the dtype of the weights."""

REDUCTIONS_PER_LAYER = 2
"""All-reduces of a layer along the mesh axis ``tensor``: the outputs of its attention and of its MLP."""

EMBEDDING_REDUCTIONS = 1
"""All-reduces of the embedding along the mesh axis ``tensor``."""


@dataclass(frozen=True)
class SearchPlan:
    """Plan of a search on a slice.

    Attributes:
        spec: The search.
        questions: Number of questions that are answered together.
        dtype: Dtype of the weights.
        slice: Slice that the search runs on.
        mesh: Number of devices along each mesh axis.
        memory: Predicted bytes per device, with room for the longest stages.
        decode_step: Roofline of a decoding step in the middle of the longest stage.
        seconds: Least seconds for answering the questions by the roofline of each step, with a workload's lengths.
    """

    spec: SearchSpec
    questions: int
    dtype: WeightDtype
    slice: Slice
    mesh: dict[str, int]
    memory: MemoryShares
    decode_step: Roofline
    seconds: float

    @property
    def headroom(self) -> int:
        """Bytes of a device's memory that are left free; negative where the search does not fit."""
        return self.slice.generation.usable_hbm_bytes - sum(self.memory.values())


def plan_search(
    spec: SearchSpec,
    config: MllamaConfig,
    slice_: Slice,
    mesh: Mapping[str, int] | None = None,
    *,
    questions: int = 1,
    dtype: WeightDtype = "bfloat16",
    work: Workload = TYPICAL_WORKLOAD,
) -> SearchPlan:
    """Plan a search by arithmetic alone.

    Args:
        spec: The search.
        config: Configuration of the model.
        slice_: Slice that the search runs on.
        mesh: Number of devices along each mesh axis; None splits attention heads over all chips, as ``generate`` does.
        questions: Number of questions that are answered together.
        dtype: Dtype of the weights.
        work: Lengths of prompts and stages. For the memory, stages are as long as the search allows.

    Raises:
        UserError: The mesh does not divide the model, or does not have as many devices as the slice.
    """
    if slice_.num_slices > 1:
        raise UserError("a search runs on one slice: give a topology of one slice")
    sizes = dict(mesh) if mesh else default_mesh_shape(config, slice_.chips)
    if math.prod(sizes.values()) != slice_.chips:
        raise UserError(f"a mesh of {sizes} is not {slice_.name}'s {slice_.chips} chips")
    abstract = abstract_mesh(**sizes)
    check_mesh(config, abstract)
    weights = abstract_params(config, dtype, abstract)
    memory = {
        "weights": sum(map(shard_bytes, weights.values())),
        "caches": _kv_cache_bytes(spec, config, work, questions, sizes),
        "working": shard_bytes(weights["language_model.lm_head.weight"]),  # once more, in another layout
    }
    costs = _SearchCosts(spec, config, work, questions, jnp.dtype(dtype).itemsize, slice_, sizes)
    seconds = 0.0
    for call in costs.seconds_of_calls():
        seconds += call
    return SearchPlan(spec, questions, dtype, slice_, sizes, memory, costs.longest_decode_step(), seconds)


def compile_search(plan: SearchPlan, config: MllamaConfig, work: Workload = TYPICAL_WORKLOAD) -> CompiledProgram:
    """Compile a plan's search with the TPU compiler.

    Raises:
        UserError: The TPU compiler is not installed.
    """
    mesh = make_mesh(**plan.mesh, devices=plan.slice.devices())
    work = replace(work, stage_tokens=plan.spec.max_new_tokens)

    def lower() -> jax.stages.Lowered:
        return lower_search(config, plan.spec, work, plan.questions, plan.dtype, mesh)

    return compile_for(plan.slice, plan.mesh, lower, "the search")


def max_questions(plan: SearchPlan, config: MllamaConfig, work: Workload = TYPICAL_WORKLOAD) -> int:
    """Return the predicted number of questions that a plan's slice can answer together; 0 where not even one fits."""
    group = plan.mesh["data"] * plan.mesh["fsdp"]  # questions are split over these axes where they divide them
    planned = plan_search(plan.spec, config, plan.slice, plan.mesh, questions=group, dtype=plan.dtype, work=work)
    caches = planned.memory["caches"]
    groups = max(0, (planned.headroom + caches) // caches)
    return groups * group or int(plan.questions == 1 and plan.headroom >= 0)


def smallest_slices_for_search(
    spec: SearchSpec, config: MllamaConfig, *, questions: int = 1, dtype: WeightDtype = "bfloat16"
) -> list[SearchPlan]:
    """Plan a search on the smallest slice of each TPU generation that holds it, fewest chip-seconds first."""
    found = []
    for generation in GENERATIONS.values():
        for shape in generation.shapes:
            plan = plan_search(spec, config, Slice(generation, shape), questions=questions, dtype=dtype)
            if plan.headroom >= HBM_MARGIN * generation.usable_hbm_bytes:
                found.append(plan)
                break
    return sorted(found, key=lambda plan: plan.seconds * plan.slice.chips)


def _kv_cache_bytes(
    spec: SearchSpec, config: MllamaConfig, work: Workload, questions: int, mesh: Mapping[str, int]
) -> int:
    """Bytes per device of all KV caches at the peak: the prefix, its images, and what belongs to a stage.

    The caches of candidates and those of the judge are never there at the same time. The verifier reads those of the
    candidates, so that its own come beside them.
    """
    work = replace(work, stage_tokens=spec.max_new_tokens)
    inputs, stage_tables, scorer_tables = jax.eval_shape(
        lambda: (random_search_inputs(config, work), *endless_tables(config, work, spec))
    )
    lengths = SearchLengths.of(spec, stage_tables, prompt=inputs.model_inputs["input_ids"].shape[1])
    prefix = lengths.prefix + ACCELERATOR_CHUNK
    candidates = max(spec.num_candidates)
    suffix = candidates * (lengths.candidate + _probe_tokens(scorer_tables, stage_tables, candidates))
    if spec.rounds is not None:
        prefix = lengths.pending + ACCELERATOR_CHUNK
        suffix = _retracing_tokens(spec, spec.rounds, stage_tables, scorer_tables)
    if scorer_tables.judge is not None and spec.judge is not None:
        prompt = JudgeLengths.of(
            spec.judge,
            scorer_tables.judge,
            header=inputs.chat_headers.capacity,
            question=inputs.question.capacity,
            text=lengths.text,
            earlier=lengths.earlier,
        )
        queries = spec.judge.queries_per_batch(candidates)
        per_query = prompt.suffix + ACCELERATOR_CHUNK // queries + prompt.verdict
        suffix = max(suffix, prompt.prefix + ACCELERATOR_CHUNK + queries * per_query)
    text_token, image_token = model_costs.kv_cache_values_per_token(config)
    image_tokens = model_costs.padded_image_tokens(config) if work.image_tiles else 0
    values = (prefix + suffix) * text_token + image_tokens * image_token
    return questions * values * BFLOAT16_BYTES // _cache_shards(questions, mesh)


def _probe_tokens(scorer_tables: ScorerTables, stage_tables: StageTables, candidates: int) -> int:
    """Return the room for what the verifier reads after each of ``candidates`` candidates; 0 without a verifier."""
    if scorer_tables.verifier is None:
        return 0
    probe = probe_capacity(scorer_tables.verifier, stage_tables.closings.capacity)
    return probe + probe_chunk(ACCELERATOR_CHUNK, candidates, probe)


def _retracing_tokens(spec: SearchSpec, rounds: Rounds, stage_tables: StageTables, scorer_tables: ScorerTables) -> int:
    """Tokens of a question that the caches of a retracing search hold at its peak beside the prompt, by their shapes.

    Beside the summary and the best reasonings of the rounds before, each with its caption, these are, whichever is
    most: the captions of a round with the verifier's probes; the captions that are kept, and the reasonings with
    probes; or the kept captions, the reasonings with the caption of each, and the best ones once the round is over.
    """
    _, captions, reasonings, _ = spec.num_candidates
    row = row_capacity(spec, stage_tables)
    caption, reasoning = (row + _probe_tokens(scorer_tables, stage_tables, one) for one in (captions, reasonings))
    kept = rounds.keep * row
    round_ = max(captions * caption, kept + reasonings * reasoning, kept + 2 * (reasonings + rounds.pool) * row)
    return (1 + 2 * rounds.pool) * row + round_


def _cache_shards(questions: int, mesh: Mapping[str, int]) -> int:
    """Number of devices that KV caches and the work on them are split over: by heads, and by questions."""
    return mesh["tensor"] * math.gcd(questions, mesh["data"] * mesh["fsdp"])


@dataclass(frozen=True)
class _SearchCosts:
    """Costs of the calls that a search consists of.

    Attributes:
        spec: The search.
        config: Configuration of the model.
        work: Lengths of prompts and stages.
        questions: Number of questions that are answered together.
        weight_bytes: Bytes per weight.
        slice: Slice that the search runs on.
        mesh: Number of devices along each mesh axis.
    """

    spec: SearchSpec
    config: MllamaConfig
    work: Workload
    questions: int
    weight_bytes: int
    slice: Slice
    mesh: Mapping[str, int]

    @property
    def image_tokens(self) -> int:
        """Number of image tokens of a question."""
        return self.config.vision.image_tokens if self.work.image_tiles else 0

    @property
    def stage_tokens(self) -> tuple[int, ...]:
        """Number of tokens of a candidate of each stage, or of each sentence; whole answers are one stage."""
        tokens = self.work.stage_tokens
        if self.spec.max_sentences:
            return (min(self.work.sentence_tokens, self.spec.candidate_tokens),) * self.work.sentences
        return tokens if len(tokens) == self.spec.num_stages else (sum(tokens),)

    def seconds_of_calls(self) -> Iterator[float]:
        """Yield the least seconds of each kind of call, from the images to the last stage."""
        yield self._encoding_seconds() + self._prefill_seconds(self.work.prompt_tokens, prefix=0)
        prefix = self.work.prompt_tokens
        for stage, tokens in enumerate(self.stage_tokens):
            yield tokens * self.decode_step(stage, suffix=tokens // 2).step_seconds
            if self.spec.judge is not None and self.num_candidates(stage) > 1:
                yield from self._judge_seconds(self.spec.judge, stage)
            if isinstance(self.spec.scorers[0 if self.spec.max_sentences else stage], Verifier):
                probes = self.num_candidates(stage) * (self.work.probe_tokens + 1)
                yield self._prefill_seconds(probes, prefix=prefix + tokens)
            if stage + 1 < len(self.stage_tokens):
                yield self._prefill_seconds(tokens, prefix)
            prefix += tokens

    def num_candidates(self, stage: int) -> int:
        """Return the number of candidates of a stage, or of a sentence."""
        return self.spec.num_candidates[0 if self.spec.max_sentences else stage]

    def longest_decode_step(self) -> Roofline:
        """Roofline of a decoding step in the middle of the longest stage."""
        tokens = self.stage_tokens
        longest = max(range(len(tokens)), key=tokens.__getitem__)
        return self.decode_step(longest, suffix=tokens[longest] // 2)

    def decode_step(self, stage: int, suffix: int) -> Roofline:
        """Roofline of a step that decodes one token of each candidate of a stage, after ``suffix`` tokens of each."""
        candidates, image_tokens = self.num_candidates(stage), self.image_tokens
        sequences = self.questions * candidates
        prefix = self.work.prompt_tokens + sum(self.stage_tokens[:stage])
        read = model_costs.bytes_per_step(
            self.config,
            questions=self.questions,
            candidates=candidates,
            prefix=prefix,
            suffix=suffix,
            image_tokens=image_tokens,
            weight_bytes=self.weight_bytes,
            cache_bytes=BFLOAT16_BYTES,
        )
        per_token = model_costs.text_flops(self.config, 1, image_tokens, prefix=prefix + suffix)
        weights = read.pop("weights") / self.mesh["tensor"]
        caches = sum(read.values()) / _cache_shards(self.questions, self.mesh)
        return self._roofline(sequences * sum(per_token.values()), weights, caches, tokens=sequences)

    def _encoding_seconds(self) -> float:
        """Least seconds for encoding the images of all questions, whose bottleneck is compute."""
        if not self.work.image_tiles:
            return 0.0
        flops = self.questions * sum(model_costs.vision_flops(self.config, 1).values())
        return flops / _cache_shards(self.questions, self.mesh) / self.slice.generation.chip.peak_flops

    def _prefill_seconds(self, tokens: int, prefix: int) -> float:
        """Least seconds for a prefill of ``tokens`` tokens per question, in chunks that each read all weights."""
        image_tokens = self.image_tokens
        one = model_costs.text_flops(self.config, tokens, image_tokens, prefix=prefix, scored=1)
        chunks = ceil_div(tokens, ACCELERATOR_CHUNK)
        weights = model_costs.parameters_per_step(self.config, images=image_tokens > 0) * self.weight_bytes * chunks
        flops = self.questions * sum(one.values())
        roofline = self._roofline(flops, weights / self.mesh["tensor"], caches=0.0, tokens=self.questions * tokens)
        return roofline.step_seconds

    def _judge_seconds(self, judge: Judge, stage: int) -> Iterator[float]:
        """Yield the least seconds for judging a stage: those for reading all pairs, and those for writing reasons."""
        tokens, candidates = self.stage_tokens[stage], self.num_candidates(stage)
        prompts = (candidates - 1) * judge.orders
        pair = 2 * tokens + self.work.judge_prompt_tokens
        if self.spec.max_sentences:  # the answer so far is read once, before the pairs
            yield self._prefill_seconds(sum(self.stage_tokens[:stage]), prefix=self.work.prompt_tokens)
        yield prompts * self._prefill_seconds(pair, prefix=self.work.prompt_tokens)
        if judge.writes_reasons:
            rounds = math.ceil(math.log2(candidates))
            yield rounds * self.work.reason_tokens * self.decode_step(stage, suffix=2 * tokens).step_seconds

    def _roofline(self, flops: float, weights: float, caches: float, tokens: int) -> Roofline:
        """Roofline of a call.

        Args:
            flops: FLOPs on all devices together.
            weights: Bytes of weights that a device reads, of which it gathers along ``fsdp`` what it does not hold.
            caches: Bytes of KV caches that a device reads.
            tokens: Number of tokens whose activations are all-reduced along ``tensor``.
        """
        fsdp, tensor = self.mesh["fsdp"], self.mesh["tensor"]
        sent = {"fsdp": (1 - 1 / fsdp) * weights, "tensor": _reduction_bytes(self.config, tokens, tensor)}
        shards = _cache_shards(self.questions, self.mesh)
        return Roofline.on_slice(self.slice, flops=flops / shards, hbm_bytes=weights + caches, sent_bytes=sent)


def _reduction_bytes(config: MllamaConfig, tokens: int, tensor: int) -> float:
    """Bytes that a device sends along ``tensor`` to all-reduce the activations of ``tokens`` tokens in all layers."""
    reductions = REDUCTIONS_PER_LAYER * config.text.num_hidden_layers + EMBEDDING_REDUCTIONS
    values = reductions * tokens * config.text.hidden_size
    return 2 * (tensor - 1) / tensor * values * BFLOAT16_BYTES
