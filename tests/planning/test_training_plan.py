"""Plans of training agree with the programs: exactly in arguments and FLOPs, nearly in communication and memory."""

import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import jax
import numpy as np
import pytest

from llava_cot_jax.benchmark.workload import config_100m
from llava_cot_jax.costs import model_costs
from llava_cot_jax.data.settings import LoaderSettings
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.sharding import abstract_mesh, make_mesh
from llava_cot_jax.planning.advice import best_per_generation, fits, smallest_training_change
from llava_cot_jax.planning.collectives import find_collectives, sent_by_axis
from llava_cot_jax.planning.programs import abstract_batch, lower_training_step
from llava_cot_jax.planning.settings import DatasetSize
from llava_cot_jax.planning.slices import parse_topology
from llava_cot_jax.planning.training_plan import best_mesh, plan_training
from llava_cot_jax.train import read_arguments
from llava_cot_jax.training.program import make_program
from llava_cot_jax.training.settings import LoraSettings, MeshSettings, OptimizerSettings, TrainSettings
from tests.costs.test_model_costs import model_flops
from tests.tiers import EXHAUSTIVE, in_tiers

ROOT = Path(__file__).parents[2]
ELEVEN = MllamaConfig.llama32_11b()
DATA = DatasetSize()


def run(**fields) -> TrainSettings:
    return replace(TrainSettings("o", "11b", "d", loader=LoaderSettings(batch_size=32)), **fields)


STEPS = [*product(["small", "11b"], ["none", "dots", "full"], [(64, 1, 1), (64, 2, 1), (1536, 1, 1), (64, 1, 3)])]
"""Model, remat, and the tokens, micro-batches and images of steps."""

SUITE = [
    ("small", "none", (64, 1, 3)),
    ("small", "dots", (64, 2, 1)),
    ("11b", "none", (1536, 1, 1)),
    ("11b", "dots", (64, 1, 1)),
    ("11b", "full", (64, 2, 1)),
    ("11b", "full", (64, 1, 3)),
]


@pytest.mark.parametrize("step", in_tiers(STEPS, suite=SUITE), ids=str)
def test_flops_are_those_of_the_real_step(small, step):
    """All matrix products of the traced step count, forward, backward and recomputed, except those of masks."""
    name, remat, (tokens, parts, images) = step
    config = {"small": replace(small, convention="meta"), "11b": ELEVEN}[name]
    settings = run(remat=remat, grad_accum_steps=parts, loader=LoaderSettings(batch_size=2))
    mesh = abstract_mesh()
    program = make_program(settings, config, mesh, steps=10, steps_per_epoch=5)
    batch = abstract_batch(config, 2, tokens, mesh, images)
    real = model_flops(jax.make_jaxpr(lambda state, batch: program.step(state, batch))(program.state, batch))
    once = model_costs.training_flops(config, tokens, images, as_computed=True)
    again = model_costs.recomputed_flops(config, tokens, images, remat=remat)
    assert 2 * (sum(once.values()) + sum(again.values())) == real


def about_100m() -> MllamaConfig:
    """Return the model of 100 million parameters with small images, so that a step takes seconds on a CPU."""
    config = config_100m()
    return replace(config, vision=replace(config.vision, image_size=112), convention="meta")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_best_mesh_for_8_devices_runs_on_them_with_the_predicted_bytes():
    config = about_100m()
    count = sum(model_costs.parameter_counts(config).values())
    assert 70e6 < count < 130e6
    chat = replace(run().chat, max_length=64)
    settings = run(dtype="float32", loader=LoaderSettings(batch_size=8), chat=chat)
    plan = best_mesh(settings, config, parse_topology("v5e-8"), DATA)
    assert plan is not None
    mesh = make_mesh(**plan.mesh)
    program = make_program(plan.settings, config, mesh, steps=10, steps_per_epoch=5)
    lowered = lower_training_step(program, plan.settings, config, mesh)
    compiled = lowered.compile()
    predicted = sum(plan.memory[part] for part in ("parameters", "optimizer", "batch"))
    found = compiled.memory_analysis().argument_size_in_bytes
    assert found == pytest.approx(predicted, abs=32)  # counters, and the rows' ids, which a step does not read

    rng = np.random.default_rng(0)
    shapes = abstract_batch(config, 8, 64, mesh)
    arrays = {name: rng.integers(0, 2, like.shape).astype(like.dtype) for name, like in shapes.items()}
    batch = {name: jax.device_put(arrays[name], like.sharding) for name, like in shapes.items()}
    state = jax.tree.map(
        lambda like: (
            jax.device_put(0.02 * rng.standard_normal(like.shape).astype(like.dtype), like.sharding)
            if np.issubdtype(like.dtype, np.floating)
            else jax.device_put(np.zeros(like.shape, like.dtype), like.sharding)
        ),
        replace(program.state, optimizer=None),
    )
    moments = jax.tree.map(
        lambda like: jax.device_put(np.zeros(like.shape, like.dtype), like.sharding), program.state.optimizer
    )
    _, measures = compiled(replace(state, optimizer=moments), batch)
    assert np.isfinite(measures["loss"]) and bool(measures["finite"])


@pytest.mark.parametrize(
    ("mesh", "axis", "most"),
    [
        pytest.param(MeshSettings(fsdp=8), "fsdp", 1.6, marks=pytest.mark.slow, id="fsdp"),
        pytest.param(MeshSettings(data=8, fsdp=1), "data", 1.6, marks=EXHAUSTIVE, id="data"),
    ],
)
def test_bytes_between_devices_are_those_of_the_compiled_step(mesh, axis, most):
    """The compiler of a CPU all-reduces where a TPU's reduce-scatters, which sends twice as much."""
    config = about_100m()
    settings = run(
        dtype="float32", mesh=mesh, loader=LoaderSettings(batch_size=8), chat=replace(run().chat, max_length=64)
    )
    plan = plan_training(settings, config, parse_topology("v5e-8"), DatasetSize(tokens_per_example=64))
    real = make_mesh(**plan.mesh)
    program = make_program(plan.settings, config, real, steps=10, steps_per_epoch=5)
    text = lower_training_step(program, plan.settings, config, real).compile().as_text()
    sent = sent_by_axis(find_collectives(text, plan.mesh))
    predicted = plan.roofline.sent_bytes
    assert set(name for name, size in predicted.items() if size) == {axis}
    assert predicted[axis] / 1.05 < sent[axis] < most * predicted[axis]


def compiled_rows() -> list[tuple[str, str, str, list[str], float]]:
    """Return the training rows of the compiled table, with the compiler's gigabytes per chip."""
    import sys

    sys.path.insert(0, str(ROOT / "tests/evidence"))
    import plan_table

    text = (ROOT / "tests/evidence/plan_table.txt").read_text()
    sizes = dict(re.findall(r"^(\S.*?): v.*\n  GB (?:of a|per) chip: ([\d.]+)", text, re.MULTILINE))
    return [(name, *row, float(sizes[name])) for name, row in plan_table.TRAINING.items() if name in sizes]


@pytest.mark.slow
def test_advice_names_the_smallest_change_first():
    plan = best_mesh(run(), ELEVEN, parse_topology("v5e-8"), DATA)
    assert plan is not None and not fits(plan)
    change = smallest_training_change(plan, ELEVEN, DATA)
    assert change is not None and fits(change[1])
    assert "--optimizer.precision bfloat16_stochastic" in change[0] and "--lora" not in change[0]

    roomy = best_mesh(run(remat="none"), ELEVEN, parse_topology("v5p-16"), DATA)
    assert roomy is not None
    change = smallest_training_change(roomy, ELEVEN, DATA)
    assert change is not None and change[0] == "--remat full"


def test_advice_is_another_mesh_where_that_is_enough():
    settings = run(loader=LoaderSettings(batch_size=64))
    plan = plan_training(replace(settings, mesh=MeshSettings(data=8, fsdp=8)), ELEVEN, parse_topology("v5e-64"), DATA)
    assert not fits(plan)
    change = smallest_training_change(plan, ELEVEN, DATA)
    assert change is not None and fits(change[1])
    assert change[0] == " ".join(f"--mesh.{axis} {size}" for axis, size in change[1].mesh.items())
    assert change[1].settings == replace(settings, mesh=change[1].settings.mesh)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_where_nothing_else_helps_adapters_are_advised_and_then_a_larger_slice():
    plan = best_mesh(run(), ELEVEN, parse_topology("v5e-4"), DATA)
    assert plan is not None
    change = smallest_training_change(plan, ELEVEN, DATA)
    assert change is not None and "--lora.rank 32" in change[0]

    lora = run(lora=LoraSettings(rank=8))
    plan = best_mesh(lora, MllamaConfig.llama32_90b(), parse_topology("v5e-4"), DATA)
    assert plan is not None
    change = smallest_training_change(plan, MllamaConfig.llama32_90b(), DATA)
    assert change is not None and change[0].startswith("--topology v5e:") and change[1].slice.chips > 4


@pytest.mark.slow
def test_the_best_slices_hold_the_run_and_the_next_smaller_slice_does_not():
    found = best_per_generation(run(), ELEVEN, DATA)
    assert {plan.slice.generation.name for plan in found} == {"v5e", "v6e", "v5p"}
    for plan in found:
        assert fits(plan)
        shapes = plan.slice.generation.shapes
        smaller = shapes[shapes.index(plan.slice.shape) - 1]
        less = best_mesh(run(), ELEVEN, replace(plan.slice, shape=smaller), DATA)
        assert less is None or not fits(less)


def memory_of(**fields) -> int:
    return sum(plan_training(run(**fields), ELEVEN, parse_topology("v5e-64"), DATA).memory.values())


def test_each_setting_moves_memory_as_it_should():
    base = {"mesh": MeshSettings(fsdp=32, tensor=2)}
    whole = memory_of(**base)
    assert memory_of(**base, remat="dots") > whole
    assert memory_of(**base, remat="none") > memory_of(**base, remat="dots")
    assert memory_of(**base, optimizer=OptimizerSettings(precision="bfloat16_stochastic")) < whole
    assert memory_of(**base, lora=LoraSettings(rank=8)) < whole
    assert memory_of(mesh=MeshSettings(data=2, fsdp=16, tensor=2)) > whole
    longer = replace(run().chat, max_length=4096)
    assert memory_of(**base, chat=longer) > whole


def test_the_roofline_names_the_bottleneck():
    wide = plan_training(run(mesh=MeshSettings(fsdp=32, tensor=2)), ELEVEN, parse_topology("v5e-64"), DATA)
    assert wide.roofline.bottleneck == "compute"
    assert wide.roofline.step_seconds == wide.roofline.seconds["compute"]
    several = plan_training(run(mesh=MeshSettings(data=8, fsdp=4)), ELEVEN, parse_topology("8*v5e:2x2"), DATA)
    assert several.roofline.bottleneck == "dcn"  # a quarter of all gradients a chip, for one row
    assert wide.roofline.sent_bytes["data"] == 0 and wide.roofline.seconds["dcn"] == 0


def test_recomputed_flops_are_those_of_the_logits_and_of_the_scores():
    """By hand, where remat saves all: 500 tokens are 4 blocks of 128 queries, and 6432 of the tower are 51."""
    tower = 40 * 2 * (51 * 128) * 6432 * 1280
    text = 32 * 2 * (4 * 128) * 500 * 4096 + 8 * 2 * (4 * 128) * 6528 * 4096 + 2 * 500 * 4096 * 128256
    for frozen, row in (([], tower + text), (["vision_model"], text)):
        settings = run(remat="none", frozen_params=frozen, mesh=MeshSettings(fsdp=32))
        plan = plan_training(settings, ELEVEN, parse_topology("v5e-32"), DatasetSize(3200, 500))
        assert plan.recomputed_flops == 32 * row


def test_hours_follow_from_the_counted_flops():
    plan = plan_training(
        run(epochs=2, mesh=MeshSettings(fsdp=32, tensor=2)), ELEVEN, parse_topology("v5e-64"), DatasetSize(3200, 500)
    )
    row = sum(model_costs.training_flops(ELEVEN, 500, 1).values())
    assert plan.steps == 200
    assert plan.hours(0.5) == pytest.approx(2 * 3200 * row / (64 * 197e12 * 0.5) / 3600)
    # An MFU that ICI does not let it reach:
    assert plan.roofline.step_seconds > 3200 * row / 100 / (64 * 197e12)
    assert plan.hours(1.0) == plan.steps * plan.roofline.step_seconds / 3600


@pytest.mark.parametrize(
    ("mesh", "slice_", "message"),
    [
        (MeshSettings(fsdp=32, tensor=2), "v5e-8", "is not v5e:2x4's 8 chips"),
        (MeshSettings(tensor=16), "v5e-64", "does not divide the 8 text key and value heads"),
        (MeshSettings(fsdp=64), "v5e-64", "the mesh does not divide it"),
        (MeshSettings(fsdp=16), "2*v5e:2x4", "data=1 does not divide over 2 slices"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(mesh, slice_, message):
    with pytest.raises(UserError, match=message):
        plan_training(run(mesh=mesh), ELEVEN, parse_topology(slice_), DATA)


@pytest.mark.slow
def test_predictions_are_within_a_tenth_of_the_compilers():
    rows = compiled_rows()
    assert len(rows) >= 6
    for name, topology, configuration, changes, compiled in rows:
        settings, _ = read_arguments(["--config", str(ROOT / f"configs/{configuration}.yaml"), *changes])
        config = MllamaConfig.llama32_90b() if "90B" in name else ELEVEN
        plan = plan_training(settings, config, parse_topology(topology), DATA)
        assert abs(sum(plan.memory.values()) / 1e9 / compiled - 1) < 0.1, name
