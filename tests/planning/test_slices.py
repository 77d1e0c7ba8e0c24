"""Names of slices, and the chips that they stand for."""

import math

import pytest

from llava_cot_jax.costs.chips import GIB
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.sharding import make_mesh
from llava_cot_jax.planning.slices import GENERATIONS, enable_tpu_compiler, parse_topology


@pytest.fixture(autouse=True, scope="module")
def _compiler():
    enable_tpu_compiler()


@pytest.mark.parametrize(
    ("text", "name", "kind", "chips"),
    [
        ("v5e:8x8", "v5e:8x8", "v5e-64", 64),
        ("v5e-64", "v5e:8x8", "v5e-64", 64),
        ("v5litepod-8", "v5e:2x4", "v5e-8", 8),
        ("v6e-1", "v6e:1x1", "v6e-1", 1),
        ("v5p-8", "v5p:2x2x1", "v5p-8", 4),  # counted in cores, two a chip
        ("v5p:4x4x4", "v5p:4x4x4", "v5p-128", 64),
        ("2*v5e:4x4", "2*v5e:4x4", "2*v5e-16", 32),
    ],
)
def test_a_slice_by_its_names(text, name, kind, chips):
    found = parse_topology(text)
    assert (found.name, found.accelerator_type, found.chips) == (name, kind, chips)
    assert parse_topology(name) == parse_topology(kind) == found


@pytest.mark.parametrize(
    "text", ["", "v5e", "v5e:", "v9:2x2", "v5e:3x3", "v5e-7", "v5p-7", "0*v5e:2x2", "v4:2x2x1", "auto "]
)
def test_what_is_no_slice_is_refused(text):
    with pytest.raises(UserError, match="is no slice"):
        parse_topology(text)


def test_the_compiler_knows_every_slice_on_offer_up_to_64_chips():
    for generation in GENERATIONS.values():
        for shape in generation.shapes:
            if math.prod(shape) <= 64:
                found = parse_topology(f"{generation.name}:{'x'.join(map(str, shape))}")
                devices = found.devices()
                assert len(devices) == found.chips
                assert {device.device_kind for device in devices} <= set(generation.chip.device_kinds)


def test_usable_memory_is_less_than_a_chip_has_by_little():
    for generation in GENERATIONS.values():
        assert 0.9 * generation.chip.hbm_bytes < generation.usable_hbm_bytes < generation.chip.hbm_bytes + GIB


def test_the_data_axis_alone_runs_between_slices():
    devices = parse_topology("2*v5e:2x2").devices()
    mesh = make_mesh(data=2, fsdp=2, tensor=2, devices=devices)
    assert [{device.slice_index for device in copy.flat} for copy in mesh.devices] == [{0}, {1}]
    with pytest.raises(UserError, match="data=1 does not divide over 2 slices"):
        make_mesh(fsdp=8, devices=devices)
