"""Costs of the model agree with published figures, and with all matrix products of the traced programs."""

import itertools
import math
from collections.abc import Collection
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import unflatten_dict
from jax.experimental.pallas import tpu as pltpu
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxprs_in_params
from jax.interpreters import partial_eval

from llava_cot_jax.costs import model_costs
from llava_cot_jax.costs.chips import CHIPS, find_chip
from llava_cot_jax.costs.model_costs import (
    MODEL_PARTS,
    ModelPart,
    count_flops,
    part_of,
    text_flops,
    training_flops,
    vision_flops,
)
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.image_context import ImageContext, cross_attention_mask
from llava_cot_jax.model.kv_cache import KVCache, LayerCache, Segment
from llava_cot_jax.model.mllama import compute_logits, hidden_states
from llava_cot_jax.model.parameters import parameters
from llava_cot_jax.model.text_decoder import IMAGE_TOKEN_MULTIPLE, forward_with_cache
from llava_cot_jax.training.lora import adapter_table
from llava_cot_jax.training.settings import LoraSettings

ELEVEN, NINETY = MllamaConfig.llama32_11b(), MllamaConfig.llama32_90b()


def abstract(*shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype)


def arrays(config, layout):
    return {path: abstract(*p.shape, dtype=jnp.bfloat16) for path, p in parameters(config, layout).items()}


def row(config, tokens, images, rows=1):
    """Return the shapes of the model's inputs."""
    batch = {"input_ids": abstract(rows, tokens)}
    if images:
        tower = config.vision
        tiles, size = tower.max_num_tiles, tower.image_size
        pixels = (rows, images, tiles, tower.num_channels, size, size)
        batch |= {
            "pixel_values": abstract(*pixels, dtype=jnp.uint8),
            "aspect_ratio_ids": abstract(rows, images),
            "aspect_ratio_mask": abstract(rows, images, tiles),
            "cross_attention_mask": abstract(rows, tokens, images, tiles),
        }
    return batch


def forward(flat, batch, config):
    params = unflatten_dict(flat, sep=".")
    return compute_logits(params, hidden_states(params, config, batch))


def model_flops(program: ClosedJaxpr) -> int:
    """FLOPs of a traced program without those of masks: products of float32 alone, in a bfloat16 model."""
    return count_flops(program) - float32_flops(program.jaxpr)


def float32_flops(jaxpr: Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        dtypes = {x.aval.dtype for x in equation.invars}
        if equation.primitive.name == "dot_general" and dtypes == {jnp.dtype(jnp.float32)}:
            total += count_flops(jaxpr.replace(eqns=[equation]))
        inner = [float32_flops(jaxpr) for jaxpr in jaxprs_in_params(equation.params)]
        total += equation.params.get("length", 1) * sum(inner)
    return total


def traced_forward(config, layout, batch) -> ClosedJaxpr:
    return jax.make_jaxpr(partial(forward, config=config))(arrays(config, layout), batch)


def traced_step(config, layout, batch, trained, adapters=None) -> ClosedJaxpr:
    """Trace the forward and backward pass, with gradients of ``trained`` parts and of ``adapters`` alone."""
    table = arrays(config, layout)
    learning = {path: x for path, x in table.items() if part_of(config, path) in trained}
    learning |= {path: abstract(*p.shape, dtype=jnp.bfloat16) for path, p in (adapters or {}).items()}
    frozen = {path: x for path, x in table.items() if path not in learning}

    def loss(learning, frozen, batch):
        return jnp.square(forward(learning | frozen, batch, config)).sum()  # its gradient needs the logits

    traced = jax.make_jaxpr(jax.grad(loss))(learning, frozen, batch)
    # The backward pass of attention has all its gradients. Those that nothing reads are not compiled.
    needed, _ = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars), instantiate=True)
    return ClosedJaxpr(needed, traced.consts)


@pytest.mark.parametrize("layout", ["unrolled", "stacked"])
@pytest.mark.parametrize(("tokens", "images", "rows"), [(12, 1, 1), (9, 3, 2), (7, 0, 1), (1100, 1, 1)])
def test_forward_flops_are_those_of_the_program(small, layout, tokens, images, rows):
    real = model_flops(traced_forward(small, layout, row(small, tokens, images, rows)))
    assert rows * sum(training_flops(small, tokens, images, trained=(), as_computed=True).values()) == real


@pytest.mark.parametrize("config", [ELEVEN, NINETY], ids=["11b", "90b"])
def test_forward_flops_of_the_published_models_are_those_of_the_program(config):
    real = model_flops(traced_forward(config, "stacked", row(config, 600, 1)))
    assert sum(training_flops(config, 600, 1, trained=(), as_computed=True).values()) == real


@pytest.mark.parametrize("layout", ["unrolled", "stacked"])
@pytest.mark.parametrize(("tokens", "images"), [(12, 1), (7, 0), pytest.param(9, 3, marks=pytest.mark.slow)])
def test_step_flops_are_those_of_the_program(small, layout, tokens, images):
    real = model_flops(traced_step(small, layout, row(small, tokens, images), MODEL_PARTS))
    assert sum(training_flops(small, tokens, images, as_computed=True).values()) == real


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "trained"),
    [
        pytest.param(600, MODEL_PARTS, id="600"),
        pytest.param(1100, set(MODEL_PARTS) - {"tower"}, id="1100"),
    ],
)
def test_step_flops_of_the_11b_are_those_of_the_program(tokens, trained):
    real = model_flops(traced_step(ELEVEN, "stacked", row(ELEVEN, tokens, 1), trained))
    assert sum(training_flops(ELEVEN, tokens, 1, trained=trained, as_computed=True).values()) == real


def sorted_names(parts: Collection[str]) -> str:
    """Return a test id that is the same in every process."""
    return " ".join(sorted(parts))


SOME_TRAINED: list[set[ModelPart]] = [{"cross"}, {"projector", "cross"}, set(MODEL_PARTS) - {"tower"}]


@pytest.mark.parametrize("trained", SOME_TRAINED, ids=sorted_names)
def test_step_flops_with_frozen_parts_are_those_of_the_program(small, trained):
    real = model_flops(traced_step(small, "unrolled", row(small, 12, 1), trained))
    assert sum(training_flops(small, 12, 1, trained=trained, as_computed=True).values()) == real


@pytest.mark.slow
@pytest.mark.exhaustive
def test_step_flops_with_any_parts_frozen_are_those_of_the_program(small):
    """Every combination of parts, in turn with cross-attention layers at the ends and in the middle."""
    for count in range(1, len(MODEL_PARTS)):
        for trained, config in zip(
            itertools.combinations(MODEL_PARTS, count), itertools.cycle(with_cross_layers(small))
        ):
            real = model_flops(traced_step(config, "unrolled", row(config, 12, 1), trained))
            assert sum(training_flops(config, 12, 1, trained=trained, as_computed=True).values()) == real, trained


def with_cross_layers(config: MllamaConfig) -> list[MllamaConfig]:
    """The configuration with cross-attention in the first and last of its layers, and with it in the middle one.

    The tower has a layer of each kind, since no part of it is ever frozen alone, and tracing it takes most of the time.
    """
    vision = replace(config.vision, num_hidden_layers=1, intermediate_layers_indices=(0,))
    texts = [replace(config.text, cross_attention_layers=layers) for layers in ((0, 2), (1,))]
    return [replace(config, vision=vision, text=text) for text in texts]


RANK = 11
"""Rank of test adapters. No other axis of the small model is as long."""


def with_rank(jaxpr: Jaxpr) -> int:
    """FLOPs of the products in which an axis has length RANK. The program must have no loops."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general" and any(RANK in x.aval.shape for x in equation.invars):
            total += count_flops(jaxpr.replace(eqns=[equation]))
        total += sum(with_rank(inner) for inner in jaxprs_in_params(equation.params))
    return total


def check_adapted(config, trained, adapted):
    """Check that the count lacks the products of the adapters, and nothing else."""
    settings = LoraSettings(rank=RANK, targets=["_proj", "fc", "projector"])
    adapters = adapter_table(parameters(config, "unrolled"), settings)
    adapters = {path: p for path, p in adapters.items() if part_of(config, path) in adapted}
    program = traced_step(config, "unrolled", row(config, 12, 1), trained, adapters)
    counted = training_flops(config, 12, 1, trained=trained, adapted=adapted, as_computed=True)
    own = with_rank(program.jaxpr)
    assert sum(counted.values()) + own == model_flops(program), (trained, adapted)
    assert (own > 0) == bool(adapted)


ADAPTED: list[set[ModelPart]] = [{"self", "cross"}, {"tower", "projector", "self", "cross"}, {"cross"}]


@pytest.mark.parametrize("adapted", ADAPTED, ids=sorted_names)
def test_step_flops_with_adapters_lack_only_the_adapters_own(small, adapted):
    check_adapted(small, (), adapted)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_step_flops_with_adapters_on_any_parts_lack_only_the_adapters_own(small):
    """Every combination of parts, in turn with cross-attention layers at the ends and in the middle."""
    configs = itertools.cycle(with_cross_layers(small))
    for adapted in itertools.product([False, True], repeat=4):
        carriers = set(itertools.compress(("tower", "projector", "self", "cross"), adapted))
        for trained in ((), {"embedding"}, {"projector", "cross"}) if carriers else ({"cross"},):
            check_adapted(next(configs), trained, carriers)


def test_shares_of_adapters_are_the_known_ones():
    table = parameters(ELEVEN, "stacked")
    adapters = adapter_table(table, LoraSettings(rank=16))
    shares = [
        sum(math.prod(adapters[f"{path}.{name}"].shape) for name in ("lora_a", "lora_b"))
        / math.prod(table[f"{path}.weight"].shape)
        for path in {path.rpartition(".")[0] for path in adapters}
    ]
    assert (round(min(shares), 3), round(max(shares), 2)) == (0.005, 0.02)


@pytest.mark.parametrize("images", [0, 1])
def test_decode_flops_are_those_of_the_program(small, images):
    """Decode three candidates of two questions. The capacities of prefix and suffix count alike."""
    shared, own, questions, candidates, text = 48, 16, 2, 3, small.text
    seen = images * (small.vision.image_tokens + -small.vision.image_tokens % IMAGE_TOKEN_MULTIPLE)
    rows = questions * candidates

    def layers(rows, capacity, cross):
        entry = abstract(rows, text.num_key_value_heads, capacity, text.head_dim, dtype=jnp.bfloat16)
        return tuple(LayerCache(entry, entry) if is_cross == cross and capacity else None for is_cross in text.is_cross)

    prefix = Segment(layers(questions, shared, False), abstract(questions))
    cache = KVCache(layers(rows, own, False), abstract(rows), (prefix,))
    tiles = abstract(rows, 1, 1, small.vision.max_num_tiles)
    context = None
    if images:
        masks = jax.eval_shape(lambda tiles: cross_attention_mask(small, tiles), tiles)
        context = ImageContext(*masks, layers=layers(questions, seen, True))

    def decode(flat, token, cache, context):
        params = unflatten_dict(flat, sep=".")
        hidden, _ = forward_with_cache(params["language_model"]["model"], small, token, cache, context)
        return compute_logits(params, hidden)

    real = model_flops(jax.make_jaxpr(decode)(arrays(small, "unrolled"), abstract(rows, 1), cache, context))
    assert rows * sum(text_flops(small, 1, seen, prefix=shared + own - 1, as_computed=True).values()) == real


def test_useful_flops_lack_masked_scores_and_padding():
    useful, computed = (training_flops(ELEVEN, 600, 1, as_computed=c) for c in (False, True))
    assert computed["text attention"] / useful["text attention"] == pytest.approx(2, rel=2 / 600)
    assert computed["cross attention"] / useful["cross attention"] == pytest.approx(6528 / 6404)
    assert computed["cross keys and values"] / useful["cross keys and values"] == pytest.approx(6528 / 6404)
    assert computed["tower attention"] / useful["tower attention"] == pytest.approx(51 * 128 / 6432)
    same = ("tower", "projector", "text", "head")
    assert [useful[kind] for kind in same] == [computed[kind] for kind in same]


def test_prefill_in_two_parts_is_as_much_work_as_in_one():
    whole = text_flops(ELEVEN, 1000, 6404)
    parts = text_flops(ELEVEN, 700, 6404), text_flops(ELEVEN, 300, 6404, prefix=700)
    assert whole == {kind: sum(part[kind] for part in parts) for kind in whole}


def test_no_gradient_passes_through_a_frozen_tower():
    frozen, forwards = (vision_flops(ELEVEN, 1, trained=t) for t in (set(MODEL_PARTS) - {"tower"}, ()))
    assert frozen["tower"] + frozen["tower attention"] == forwards["tower"] + forwards["tower attention"]
    assert frozen["projector"] == 2 * forwards["projector"]  # its weights' gradient, and none of its input


def test_flops_of_the_11b_are_the_known_ones():
    vision = vision_flops(ELEVEN, 1)
    assert round((vision["tower"] + vision["tower attention"]) / 1e12, 1) == 18.6
    assert round(vision["tower attention"] / 1e12, 1) == 8.5
    assert round((vision["projector"] + vision["cross keys and values"]) / 1e12, 1) == 1.3
    text = text_flops(ELEVEN, 1, 1)
    assert round((text["text"] + text["head"]) / 1e9, 1) == 18.4
    training = training_flops(ELEVEN, 600, 1)
    assert round(sum(training.values()) / 1e12) == 94
    assert round((training["tower"] + training["tower attention"]) / 1e12) == 56


def test_parameters_and_bytes_of_the_11b_are_the_known_ones():
    assert sum(model_costs.parameter_counts(ELEVEN).values()) == 10_670_220_835
    assert sum(model_costs.parameter_counts(NINETY).values()) == 88_593_355_323
    assert round(model_costs.parameters_per_step(ELEVEN, images=True) / 1e9, 2) == 9.18
    assert [2 * values for values in model_costs.kv_cache_values_per_token(ELEVEN)] == [131_072, 32_768]
    read = model_costs.bytes_per_step(ELEVEN, questions=1, candidates=10, prefix=1000, suffix=50, image_tokens=6404)
    assert round(read["image"] / 1e6) == 210
    assert (read["prefix"], read["suffix"]) == (1000 * 131_072, 500 * 131_072)


LEAST_MILLISECONDS = {
    "TPU v4": (15.4, 7.9),
    "TPU v5 lite": (23.0, 11.8),
    "TPU v5p": (6.8, 3.5),
    "TPU v6 lite": (11.5, 5.9),
    "TPU7x": (2.6, 1.3),
    "NVIDIA H100 80GB HBM3": (5.6, 2.9),
    "NVIDIA H200": (3.9, 2.0),
}
"""Least milliseconds of a decoding step of 10 candidates, with bfloat16 and with int8 weights."""


@pytest.mark.parametrize("kind", LEAST_MILLISECONDS)
def test_rooflines_of_decoding_are_the_known_ones(kind):
    sizes = dict(questions=1, candidates=10, prefix=2000, suffix=20, image_tokens=6404)
    for weight_bytes, floor in zip((2, 1), LEAST_MILLISECONDS[kind], strict=True):
        read = sum(model_costs.bytes_per_step(ELEVEN, weight_bytes=weight_bytes, **sizes).values())
        assert round(1e3 * read / find_chip(kind).hbm_bandwidth, 1) == floor


@pytest.mark.parametrize(
    ("kind", "version"),
    [
        ("TPU v4", pltpu.ChipVersion.TPU_V4),
        ("TPU v5 lite", pltpu.ChipVersion.TPU_V5E),
        ("TPU v5", pltpu.ChipVersion.TPU_V5P),
        ("TPU v6 lite", pltpu.ChipVersion.TPU_V6E),
        ("TPU7x", pltpu.ChipVersion.TPU_7X),
    ],
)
def test_chips_have_the_figures_that_jax_has_of_them(kind, version):
    chip, info = find_chip(kind), pltpu.get_tpu_info_for_chip(version, 1)
    cores = version.num_physical_tensor_cores_per_chip
    assert chip.hbm_bytes == pytest.approx(cores * info.hbm_capacity_bytes, rel=0.01)
    assert chip.peak_flops == pytest.approx(cores * info.bf16_ops_per_second, rel=0.01)
    if kind != "TPU v5":  # jax has 2460 GB/s, Google's data sheet 2765
        assert chip.hbm_bandwidth == pytest.approx(cores * info.mem_bw_bytes_per_second, rel=0.01)
    assert chip.devices_per_chip == (1 if version.supports_megacore else cores)


def test_a_chip_is_found_by_each_of_its_kinds_and_a_cpu_is_none():
    kinds = [kind for chip in CHIPS for kind in chip.device_kinds]
    assert len(set(kinds)) == len(kinds)
    assert find_chip("TPU v5e") is find_chip("TPU v5 lite") is not find_chip("TPU v5")
    assert find_chip(jax.devices()[0].device_kind) is None


def test_parts_are_the_same_in_either_layout(small):
    config = replace(small, text=replace(small.text, num_hidden_layers=6, cross_attention_layers=(1, 4)))
    for parameter_path, parameter in parameters(config, "stacked").items():
        assert model_costs.parts_of(config, parameter.tensors) == {part_of(config, parameter_path)}
    assert model_costs.parts_of(config, parameters(config, "stacked")) == set(MODEL_PARTS)


def counted(function, *shapes):
    return count_flops(jax.make_jaxpr(function)(*(jnp.ones(shape) for shape in shapes)))


def test_count_flops_follows_every_kind_of_inner_program():
    def f(a):
        return jnp.tanh(a @ a)

    custom = jax.custom_jvp(f)
    custom.defjvps(lambda tangent, out, a: tangent)
    one = 2 * 4**3
    assert counted(f, (4, 4)) == one
    assert counted(jax.jit(jax.checkpoint(f)), (4, 4)) == one
    assert counted(lambda a: jax.lax.scan(lambda x, _: (f(x), None), a, length=5)[0], (4, 4)) == 5 * one
    assert counted(lambda a: jax.lax.map(f, a), (3, 4, 4)) == 3 * one
    assert counted(lambda a: jax.lax.cond(a[0, 0] > 0, f, lambda a: f(f(a)), a), (4, 4)) == 2 * one
    assert counted(custom, (4, 4)) == one
    assert counted(partial(jnp.einsum, "bij,bkj->bik"), (7, 2, 3), (7, 5, 3)) == 2 * 7 * 2 * 3 * 5
    with pytest.raises(ValueError, match="while loop"):
        counted(lambda a: jax.lax.while_loop(lambda x: x[0, 0] < 9, f, a), (4, 4))


def test_count_flops_of_a_convolution_are_those_of_its_patches():
    def convolve(x, w):
        return jax.lax.conv_general_dilated(x, w, window_strides=(2, 2), padding="VALID")

    assert counted(convolve, (1, 3, 8, 8), (5, 3, 2, 2)) == counted(jnp.matmul, (16, 12), (12, 5))


def test_count_flops_agrees_with_the_compiler():
    """XLA counts elementwise work too, which is little beside these products."""
    grad = jax.jit(jax.grad(lambda a, b: ((a @ b) ** 2).sum(), argnums=(0, 1)))
    arrays = jnp.ones((64, 512)), jnp.ones((512, 128))
    ours, compiled = count_flops(jax.make_jaxpr(grad)(*arrays)), grad.lower(*arrays).compile().cost_analysis()
    assert ours == 3 * 2 * 64 * 512 * 128
    assert ours == pytest.approx(compiled["flops"], rel=0.01)
