"""What a search takes on a slice: memory and floors by arithmetic, and what the compiler says of its one program."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from llava_cot_jax.benchmark.inputs import request, tables
from llava_cot_jax.benchmark.workload import Workload
from llava_cot_jax.costs import counts
from llava_cot_jax.costs.counts import cache_values
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.sharding import abstract_mesh, check_mesh, default_sizes, make_mesh
from llava_cot_jax.model.text_decoder import IMAGE_TOKEN_MULTIPLE
from llava_cot_jax.planning.compiler import Compiled, compile_for
from llava_cot_jax.planning.floors import Floors
from llava_cot_jax.planning.memory import Parts
from llava_cot_jax.planning.programs import Weight, abstract_weights, lowered_search
from llava_cot_jax.planning.slices import GENERATIONS, MARGIN, Slice
from llava_cot_jax.planning.traffic import shard_bytes
from llava_cot_jax.search.reasoner import ACCELERATOR_CHUNK
from llava_cot_jax.search.strategies import Plan

USUAL = Workload(prompt=256, judge_words=200)
"""Lengths that are planned with: stages as long as the standard ones of ``bench``, prompts a little longer."""

CACHE_BYTES = 2
"""Of a number in a cache: bfloat16, whatever the weights are in."""


@dataclass(frozen=True)
class SearchPlan:
    """A search on a slice.

    Attributes:
        plan: what the strategy comes to.
        questions: answered at a time.
        dtype: of the weights.
        slice: that it runs on.
        mesh: devices along each axis.
        memory: predicted bytes of one device, with room for the longest stages.
        step: floors of a step of decoding, in the middle of the longest stage.
        seconds: the floor of answering the questions, where stages are as long as ``work`` says.
    """

    plan: Plan
    questions: int
    dtype: Weight
    slice: Slice
    mesh: dict[str, int]
    memory: Parts
    step: Floors
    seconds: float

    @property
    def room(self) -> int:
        """Bytes of a device's memory that are left over; below 0 where it does not fit."""
        return self.slice.generation.usable - sum(self.memory.values())


def plan_search(
    plan: Plan,
    config: MllamaConfig,
    slice_: Slice,
    mesh: Mapping[str, int] | None = None,
    *,
    questions: int = 1,
    dtype: Weight = "bfloat16",
    work: Workload = USUAL,
) -> SearchPlan:
    """Work out a search by arithmetic alone.

    Args:
        plan: what the strategy comes to.
        config: the model's.
        slice_: that it is to run on.
        mesh: devices along each axis; None cuts heads over all chips, as ``generate`` does.
        questions: answered at a time.
        dtype: of the weights.
        work: how long prompts and stages are; for memory, stages are as long as their budgets.

    Raises:
        UserError: the mesh does not divide the model, or is not the slice's.
    """
    if slice_.count > 1:
        raise UserError("a search runs on one slice: give a topology of one")
    sizes = dict(mesh) if mesh else default_sizes(config, slice_.chips)
    if math.prod(sizes.values()) != slice_.chips:
        raise UserError(f"a mesh of {sizes} is not {slice_.name}'s {slice_.chips} chips")
    abstract = abstract_mesh(**sizes)
    check_mesh(config, abstract)
    weights = abstract_weights(config, dtype, abstract)
    memory = {"weights": sum(map(shard_bytes, weights.values()))}
    memory |= _needed(plan, config, work, questions, sizes, weights)
    step, seconds = _floors(plan, config, work, questions, dtype, slice_, sizes)
    return SearchPlan(plan, questions, dtype, slice_, sizes, memory, step, seconds)


def compile_search(plan: SearchPlan, config: MllamaConfig, work: Workload = USUAL) -> Compiled:
    """What the TPU compiler makes of a plan's search.

    Raises:
        UserError: the compiler is not installed.
    """
    mesh = make_mesh(**plan.mesh, devices=plan.slice.devices())
    work = replace(work, stages=plan.plan.budgets)

    def lower() -> jax.stages.Lowered:
        return lowered_search(config, plan.plan, work, plan.questions, plan.dtype, mesh)

    return compile_for(plan.slice, plan.mesh, lower, "the search")


def most_questions(plan: SearchPlan, config: MllamaConfig, work: Workload = USUAL) -> int:
    """How many questions at a time a plan's slice should hold; 0 where not even one."""
    over = plan.mesh["data"] * plan.mesh["fsdp"]  # questions are cut over these, where they divide them
    many = plan_search(plan.plan, config, plan.slice, plan.mesh, questions=over, dtype=plan.dtype, work=work)
    caches = many.memory["caches"]
    return max(0, (many.room + caches) // caches) * over or int(plan.questions == 1 and plan.room >= 0)


def smallest_for_search(
    plan: Plan, config: MllamaConfig, *, questions: int = 1, dtype: Weight = "bfloat16"
) -> list[SearchPlan]:
    """Of each generation of chips the smallest slice that holds a search: that with the lowest floor a chip first."""
    found = []
    for generation in GENERATIONS.values():
        for shape in generation.shapes:
            each = plan_search(plan, config, Slice(generation, shape), questions=questions, dtype=dtype)
            if each.room >= MARGIN * generation.usable:
                found.append(each)
                break
    return sorted(found, key=lambda each: each.seconds * each.slice.chips)


def _needed(
    plan: Plan,
    config: MllamaConfig,
    work: Workload,
    questions: int,
    mesh: Mapping[str, int],
    weights: Mapping[str, jax.ShapeDtypeStruct],
) -> Parts:
    """Beyond the weights: the caches at the worst moment, and lm_head once more, in another layout.

    Candidates' caches and the judge's are never needed at once.
    """
    work = replace(work, stages=plan.budgets)
    asked, _, judging = jax.eval_shape(lambda: (request(config, work), *tables(config, work, plan)))
    tags = 2 * (len(plan.stages) > 0) * 4
    budget, count = max(plan.budgets), len(plan.budgets)
    prompt = asked.inputs["input_ids"].shape[1]
    prefix = prompt + sum(plan.budgets[:-1]) + count * tags + ACCELERATOR_CHUNK
    own = max(plan.candidates) * budget
    if judging is not None and plan.judge is not None:
        judge = plan.judge
        fixed = sum(piece.tokens.shape[-1] for piece in (judging.intro, judging.middle, judging.label))
        front = fixed + asked.question.tokens.shape[-1] + (count - 1) * (budget + tags) + ACCELERATOR_CHUNK
        shown = 2 * (budget + tags) + judging.between.tokens.shape[-1] + judging.ending.tokens.shape[-1]
        writes = judge.verdict == "rationale"
        rows = -(-max(plan.candidates) // 2) if writes else judge.orders
        written = max(judge.reason_tokens, judge.check_tokens) if writes else 1
        own = max(own, front + rows * (shown + ACCELERATOR_CHUNK // rows + written))
    text_token, image_token = cache_values(config)
    vision = config.vision
    seen = vision.image_tokens + -vision.image_tokens % IMAGE_TOKEN_MULTIPLE if work.tiles else 0
    values = (prefix + own) * text_token + seen * image_token
    over = mesh["tensor"] * math.gcd(questions, mesh["data"] * mesh["fsdp"])
    return {
        "caches": questions * values * CACHE_BYTES // over,
        "working": shard_bytes(weights["language_model.lm_head.weight"]),
    }


def _floors(
    plan: Plan,
    config: MllamaConfig,
    work: Workload,
    questions: int,
    dtype: Weight,
    slice_: Slice,
    mesh: Mapping[str, int],
) -> tuple[Floors, float]:
    """Of a step of decoding, and seconds of the whole search."""
    width = jnp.dtype(dtype).itemsize
    seen = config.vision.image_tokens if work.tiles else 0
    tensor, gathered = mesh["tensor"], 1 - 1 / mesh["fsdp"]  # what fsdp cuts of the weights is fetched at each step
    alike = tensor * math.gcd(questions, mesh["data"] * mesh["fsdp"])
    if len(work.stages) != len(plan.budgets):
        work = replace(work, stages=(sum(work.stages),))

    def decoding(stage: int, own: int) -> Floors:
        rows = questions * plan.candidates[stage]
        before = work.prompt + sum(work.stages[:stage])
        read = counts.bytes_per_step(
            config,
            questions=questions,
            candidates=plan.candidates[stage],
            prefix=before,
            suffix=own,
            image_tokens=seen,
            weight_bytes=width,
            cache_bytes=CACHE_BYTES,
        )
        flops = rows * sum(counts.text_flops(config, 1, seen, prefix=before + own).values())
        weights = read.pop("weights") / tensor
        sent = {"fsdp": gathered * weights, "tensor": _summed(config, rows, tensor)}
        return Floors.of(slice_, flops=flops / alike, memory=weights + sum(read.values()) / alike, sent=sent)

    def reading(rows: int, tokens: int, before: int) -> float:
        """Of rows of a question that are read: of all questions, in chunks, each of which reads the weights."""
        flops = questions * rows * sum(counts.text_flops(config, tokens, seen, prefix=before, scored=1).values())
        times = -(-rows * tokens // ACCELERATOR_CHUNK)
        weights = counts.parameters_per_step(config, images=seen > 0) * width * times / tensor
        sent = {"fsdp": gathered * weights, "tensor": _summed(config, questions * rows * tokens, tensor)}
        return Floors.of(slice_, flops=flops / alike, memory=weights, sent=sent).step

    looking = questions * sum(counts.vision_flops(config, 1).values()) if work.tiles else 0
    total = looking / alike / slice_.generation.chip.flops + reading(1, work.prompt, 0)
    before = work.prompt
    for stage, tokens in enumerate(work.stages):
        total += tokens * decoding(stage, tokens // 2).step
        if plan.judge is not None and plan.candidates[stage] > 1:
            pairs = (plan.candidates[stage] - 1) * plan.judge.orders
            total += pairs * reading(1, 2 * tokens + work.judge_words, work.prompt)
            if plan.judge.verdict == "rationale":
                rounds = math.ceil(math.log2(plan.candidates[stage]))
                total += rounds * work.reason * decoding(stage, 2 * tokens).step
        if stage + 1 < len(work.stages):
            total += reading(1, tokens, before)
        before += tokens
    longest = max(range(len(work.stages)), key=work.stages.__getitem__)
    return decoding(longest, work.stages[longest] // 2), total


def _summed(config: MllamaConfig, rows: int, tensor: int) -> float:
    """What a device sends to sum up the activations of so many tokens: twice a layer, and the embedding's."""
    sums = (2 * config.text.num_hidden_layers + 1) * rows * config.text.hidden_size
    return 2 * (tensor - 1) / tensor * sums * CACHE_BYTES
