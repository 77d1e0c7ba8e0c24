"""Collectives that are read from a program's text are those that the program was made of."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from llava_cot_jax.model.choices import MESH_AXES
from llava_cot_jax.model.sharding import make_mesh
from llava_cot_jax.planning.collectives import Collective, find_collectives, sent_by_axis

ROWS, WIDTH, TRIPS = 8, 64, 5


def compiled(body, mesh, *shapes):
    """Return the text of ``body``, compiled with ``shard_map``."""
    parts = PartitionSpec(MESH_AXES)
    mapped = jax.shard_map(body, mesh=mesh, in_specs=parts, out_specs=parts, check_vma=False)
    return jax.jit(mapped).lower(*shapes).compile().as_text()


def read(body, mesh) -> list[Collective]:
    x = jax.ShapeDtypeStruct((8 * ROWS, WIDTH), jnp.float32)
    return find_collectives(compiled(body, mesh, x), dict(mesh.shape))


EACH = ROWS * WIDTH * 4
"""Bytes of the argument on a device."""


def gather(x, axis):
    return jax.lax.all_gather(x, axis, tiled=True)[:ROWS] * 2


def scatter(x, axis):
    return jnp.tile(jax.lax.psum_scatter(x, axis, tiled=True), (x.shape[0] // ROWS * jax.lax.axis_size(axis), 1))[:ROWS]


@pytest.mark.parametrize(
    ("body", "axis", "sent"),
    [
        (gather, "fsdp", 3 * EACH),  # of four devices: the parts of three others
        (gather, "tensor", 1 * EACH),
        (lambda x, axis: jax.lax.psum(x, axis), "fsdp", 2 * 3 / 4 * EACH),
        (lambda x, axis: jax.lax.psum(x, axis), ("fsdp", "tensor"), 2 * 7 / 8 * EACH),
        (scatter, "fsdp", 3 / 4 * EACH),
        (lambda x, axis: jax.lax.ppermute(x, axis, [(0, 1), (1, 0)]), "tensor", EACH),
        (lambda x, axis: jax.lax.all_to_all(x, axis, 0, 0, tiled=True), "fsdp", 3 / 4 * EACH),
    ],
    ids=["gather 4", "gather 2", "sum 4", "sum 8", "scatter 4", "permute 2", "all to all 4"],
)
def test_bytes_that_a_device_sends(body, axis, sent):
    mesh = make_mesh(fsdp=4, tensor=2)
    found = read(partial(body, axis=axis), mesh)
    name = axis if isinstance(axis, str) else "+".join(axis)
    assert sent_by_axis(found) == {name: pytest.approx(sent)}


def test_a_permutation_in_which_some_devices_send_nothing():
    found = read(lambda x: jax.lax.ppermute(x, "fsdp", [(0, 1)]), make_mesh(fsdp=8))
    assert sent_by_axis(found) == {"fsdp": pytest.approx(EACH / 8)}  # of eight devices one sends


def test_a_collective_in_a_loop_counts_for_each_iteration():
    def body(x):
        def trip(carry, _):
            inner = jax.lax.fori_loop(0, 3, lambda i, y: jax.lax.psum(y * (1.0 + i), "tensor") / 2, carry)
            return jax.lax.psum(inner, "fsdp") / 4, None

        return jax.lax.scan(trip, x, length=TRIPS)[0]

    sums = sent_by_axis(read(body, make_mesh(fsdp=4, tensor=2)))
    assert sums == {"fsdp": pytest.approx(TRIPS * 2 * 3 / 4 * EACH), "tensor": pytest.approx(3 * TRIPS * EACH)}


UNROLLED = """\
HloModule unrolled
%body (p: (f32[16], u32[])) -> (f32[16], u32[]) {
  %p = (f32[16]{0}, u32[]) parameter(0)
  %x = f32[16]{0} get-tuple-element(%p), index=0
  %i = u32[] get-tuple-element(%p), index=1
  %a = f32[16]{0} collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %b = f32[16]{0} collective-permute(%a), channel_id=2, source_target_pairs={{0,1},{1,0}}
  %two = u32[] constant(2)
  %after = u32[] add(%i, %two)
  ROOT %r = (f32[16]{0}, u32[]) tuple(%b, %after)
}
%condition (p: (f32[16], u32[])) -> pred[] {
  %p = (f32[16]{0}, u32[]) parameter(0)
  %i = u32[] get-tuple-element(%p), index=1
  %most = u32[] constant(8)
  ROOT %less = pred[] compare(%i, %most), direction=LT
}
ENTRY %main (x: f32[16]) -> f32[16] {
  %x = f32[16]{0} parameter(0)
  %zero = u32[] constant(0)
  %start = (f32[16]{0}, u32[]) tuple(%x, %zero)
  %loop = (f32[16]{0}, u32[]) while(%start), condition=%condition, body=%body
  ROOT %out = f32[16]{0} get-tuple-element(%loop), index=0
}
"""


def test_an_unrolled_loop_counts_by_more_than_one():
    """The TPU compiler writes products whose weights go round in a ring in this way."""
    found = find_collectives(UNROLLED, {"fsdp": 2})
    assert [each.executions for each in found] == [4, 4]
    assert sent_by_axis(found) == {"fsdp": 2 * 4 * 64}


def test_the_steps_of_a_pipelined_collective_count_once():
    twice = UNROLLED.replace("channel_id=2", "channel_id=1")
    assert len(find_collectives(twice, {"fsdp": 2})) == 1


@pytest.mark.parametrize(
    ("groups", "axes", "share"),
    [
        ("{{0,2},{1,3}}", "fsdp", 1 / 2),
        ("[2,2]<=[4]", "tensor", 1 / 2),
        ("[2,2]<=[2,2]T(1,0)", "fsdp", 1 / 2),
        ("mesh['axis_0'=2,'axis_1'=2] {'axis_0'}", "fsdp", 1 / 2),
        ("mesh['axis_0'=2,'axis_1'=2] {'axis_1'}", "tensor", 1 / 2),
        ("mesh['axis_0'=4] {'axis_0':(2)2}", "tensor", 1 / 2),
        ("mesh['axis_0'=4] {'axis_0'}", "fsdp+tensor", 3 / 4),
    ],
)
def test_all_notations_of_groups(groups, axes, share):
    line = f"  ROOT %g = f32[16]{{0}} all-gather(%x), channel_id=1, replica_groups={groups}, dimensions={{0}}"
    text = "HloModule m\nENTRY %main (x: f32[4]) -> f32[16] {\n  %x = f32[4]{0} parameter(0)\n" + line + "\n}\n"
    assert sent_by_axis(find_collectives(text, {"fsdp": 2, "tensor": 2})) == {axes: 64 * share}


@pytest.mark.parametrize(
    ("transfer", "slices", "result", "sent"),
    [
        ("ALL_REDUCE", 2, 64, 64),
        ("ALL_REDUCE", 4, 64, 96),
        ("ALL_GATHER", 2, 128, 64),
        ("REDUCE_SCATTER", 4, 16, 48),
        ("ALL_TO_ALL", 2, 64, 32),
        ("ONE_TO_ONE", 2, 64, 64),
    ],
)
def test_a_transfer_between_slices(transfer, slices, result, sent):
    """The TPU compiler leaves a transfer to the hosts: a send and a receive of 16 numbers, over all chips of slices."""
    target = f"{{{','.join(str(i + 1) for i in range(slices))}}}x{{0:3}}"
    if transfer == "ONE_TO_ONE":
        target = "{{200000->100001},{100002->200003}}"
    about = f'_xla_megascale_target="{target}",_xla_megascale_transfer_type="{transfer}"'
    lines = [
        "ENTRY %main (x: f32[16]) -> f32[16] {",
        "  %x = f32[16]{0} parameter(0)",
        f"  %s = (f32[16]{{0}}, u32[], token[]) send(%x, %a), channel_id=4, frontend_attributes={{{about}}}",
        f"  %r = (f32[{result // 4}]{{0}}, u32[], token[]) recv(%a), channel_id=3, frontend_attributes={{{about}}}",
        "}",
    ]
    (found,) = find_collectives("\n".join(lines), {"data": slices, "fsdp": 4})
    assert (found.axes, found.result_bytes, found.sent_bytes, found.executions) == ("data", result, sent, 1)
