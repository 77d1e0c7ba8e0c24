"""Sharding: mesh axes, logical axes, and the table that maps one to the other.

A mesh has three axes. ``data`` repeats the model, ``fsdp`` shards parameters and batch alike, ``tensor`` shards heads,
MLP widths and the vocabulary. Parameters name their logical axes in ``parameters.py``; activations name theirs in calls
of ``constrain``.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
from jax.experimental import mesh_utils
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    get_abstract_mesh,
    use_abstract_mesh,
)

from llava_cot_jax.checks import check_int, shown
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.choices import MESH_AXES
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.parameters import Parameter, parameters

_Tree = TypeVar("_Tree")

LOGICAL_AXIS_RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "gathered": ("fsdp", "tensor"),  # widths of layers used once, gathered where they are used
    "columns": ("tensor", "fsdp"),  # of embedding tables; the next two are for intermediate results of ``embed``
    "replica": ("data",),
    "part": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "layers": (),
}


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh of ``data`` x ``fsdp`` x ``tensor`` devices, by default the first ones.

    Where there are several TPU slices, only ``data`` runs over the slow network between them: each slice holds whole
    copies of the model.

    Raises:
        UserError: An axis is no whole number of at least 1, or there are fewer devices than the mesh takes, or ``data``
            is no multiple of the number of slices.
    """
    shape = (data, fsdp, tensor)
    for axis, size in zip(MESH_AXES, shape, strict=True):
        check_int(f"mesh axis {axis}", size)
    if devices is not None and not (isinstance(devices, list | tuple) and all(map(_is_device, devices))):
        raise UserError(f"devices is {shown(devices)}; give a list of devices, such as jax.devices()")
    available = list(jax.devices() if devices is None else devices)
    count = math.prod(shape)
    if count > len(available):
        raise UserError(
            f"a mesh of data={data} x fsdp={fsdp} x tensor={tensor} takes {count} devices; there are {len(available)}"
        )
    axes = (AxisType.Auto,) * len(MESH_AXES)
    slices = len({getattr(device, "slice_index", 0) for device in available[:count]})
    if slices == 1 or available[0].platform != "tpu":
        return jax.make_mesh(shape, MESH_AXES, axis_types=axes, devices=available[:count])
    if data % slices:
        raise UserError(f"data={data} does not divide over {slices} slices: make it a multiple of {slices}")
    within, across = (data // slices, fsdp, tensor), (slices, 1, 1)
    return Mesh(mesh_utils.create_hybrid_device_mesh(within, across, available[:count]), MESH_AXES, axis_types=axes)


def _is_device(value: Any) -> bool:
    """Whether ``value`` is a device, or stands for one in a topology that is compiled for."""
    return hasattr(value, "platform") and hasattr(value, "device_kind")


def abstract_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """Return a mesh without devices: enough to trace a program, and to know the shapes of all its shards."""
    mesh: Any = AbstractMesh((data, fsdp, tensor), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    return mesh  # jax accepts it wherever no device is needed


def partition_spec(axes: Iterable[str | None]) -> PartitionSpec:
    """Return the PartitionSpec of an array with these logical axes.

    Raises:
        ValueError: A logical axis is unknown, or two would use one mesh axis.
    """
    entries = [() if axis is None else LOGICAL_AXIS_RULES[axis] for axis in axes]
    used = [mesh_axis for entry in entries for mesh_axis in entry]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {tuple(axes)} map to one mesh axis twice")
    while entries and not entries[-1]:  # jax compiles a program anew for P(None), where it was compiled for P()
        entries.pop()
    return PartitionSpec(*(entry or None for entry in entries))


def parameter_sharding(parameter: Parameter, mesh: Mesh) -> NamedSharding:
    """Return the sharding of a parameter on a mesh.

    Raises:
        UserError: The mesh does not divide the parameter.
    """
    for size, axis in zip(parameter.shape, parameter.axes, strict=True):
        mesh_axes = LOGICAL_AXIS_RULES[axis] if axis else ()
        pieces = math.prod(mesh.shape[m] for m in mesh_axes)
        if size % pieces:
            raise UserError(
                f"the mesh does not divide {parameter.tensors[0]} {list(parameter.tensor_shape)}: "
                f"{size} into {pieces} pieces ({' x '.join(f'{m}={mesh.shape[m]}' for m in mesh_axes)})"
            )
    return NamedSharding(mesh, partition_spec(parameter.axes))


def check_mesh(config: MllamaConfig, mesh: Mesh) -> None:
    """Check that ``mesh`` can hold a model of ``config``.

    Raises:
        UserError: It is no mesh, or lacks an axis, or an axis is not of the type Auto. Or it splits an attention head,
            or does not divide a parameter.
    """
    remedy = "make one with llava_cot_jax.make_mesh(data=..., fsdp=..., tensor=...)"
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise UserError(f"mesh is {shown(mesh)}; {remedy}")
    if missing := [axis for axis in MESH_AXES if axis not in mesh.axis_names]:
        raise UserError(f"the mesh has the axes {', '.join(mesh.axis_names)}; it lacks {', '.join(missing)}: {remedy}")
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise UserError(f"an axis of the mesh is not of the type Auto, by which the model is sharded: {remedy}")
    tensor = mesh.shape["tensor"]
    heads = {"text key and value": config.text.num_key_value_heads, "vision": config.vision.attention_heads}
    for kind, count in heads.items():
        if count % tensor:
            raise UserError(f"the mesh does not divide the {count} {kind} heads: tensor={tensor}")
    for parameter in parameters(config, "unrolled").values():
        parameter_sharding(parameter, mesh)


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[None]:
    """Return the context in which ``constrain``, in a traced function, refers to ``mesh``.

    Raises:
        UserError: The function is traced inside ``jax.shard_map``, where each device computes for itself.
    """
    if mesh is None:
        return contextlib.nullcontext()
    if get_abstract_mesh().manual_axes:
        raise UserError(
            "a model on a mesh cannot be called inside jax.shard_map: call it outside, or load it without a mesh"
        )
    return use_abstract_mesh(mesh.abstract_mesh)


@contextlib.contextmanager
def without_surroundings() -> Iterator[None]:
    """Compute in the block on a model's own devices and in 32 bits, whatever ``jax.set_mesh`` and 64-bit mode say.

    Otherwise jax would refuse arrays on other devices than those of that mesh, and 64-bit numbers beside 32-bit ones.
    While a function is traced, as by ``jax.jit`` or ``jax.grad``, the surroundings stay.
    """
    try:
        no_mesh = jax.set_mesh(None)
    except ValueError:  # a function is traced
        yield
        return
    with no_mesh, jax.enable_x64(False):
        yield


def check_surroundings(mesh: Mesh | None, params: Any, inputs: Mapping[str, Any]) -> None:
    """Check that a model on ``mesh`` can be called with parameters and arrays that a mesh of the user's own may hold.

    Raises:
        UserError: The call is part of a function that is compiled for another mesh, which ``jax.set_mesh`` has set; or
            an array is sharded over axes of the type Explicit.
    """
    arrays = {name: x for name, x in inputs.items() if isinstance(x, jax.Array)}
    for name, x in arrays.items():
        if any(jax.typeof(x).sharding.spec):  # names axes of the type Explicit alone
            raise UserError(
                f"{name} is sharded over mesh axes of the type Explicit, which the model does not support: "
                "make the mesh with axis_types=(jax.sharding.AxisType.Auto,) for each axis"
            )
    around = get_abstract_mesh()
    is_traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((params, arrays)))
    if mesh is None or around.empty or around.manual_axes:
        return
    if is_traced and around != mesh.abstract_mesh:
        raise UserError(
            f"the model is on a mesh with the axes {', '.join(mesh.axis_names)}, and jax.jit or jax.grad traces it for "
            f"another one, with {', '.join(around.axis_names)}: use jax.set_mesh(model.mesh), or call the model "
            "outside jit"
        )


def current_mesh() -> AbstractMesh | None:
    """Return the mesh over which a traced function is sharded: that of ``use_mesh``, or None.

    A mesh that the user has set around a model without one counts if its axes have the same names. Any other one, and
    one whose axes ``jax.shard_map`` handles, is left to the user: nothing is constrained to it.
    """
    mesh = get_abstract_mesh()
    automatic = {axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}
    return mesh if automatic.issuperset(MESH_AXES) else None


def traced_platform() -> str:
    """Return the platform that the traced function is to run on: that of ``use_mesh``, else the default one."""
    device = get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrain the sharding of ``x`` by the logical name of each of its axes, on the mesh of ``use_mesh``.

    An axis that the mesh does not divide (a batch of one question, say) is left whole on every device. Without a mesh
    this is the identity.
    """
    mesh = current_mesh()
    if mesh is None:
        return x
    sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
    whole = [
        None if axis is None or size % math.prod(sizes[m] for m in LOGICAL_AXIS_RULES[axis]) else axis
        for size, axis in zip(x.shape, axes, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, partition_spec(whole))


def to_host(tree: _Tree, mesh: Mesh | None) -> _Tree:
    """Return the arrays of a tree on the host, whole in every process.

    Arrays that are sharded over the devices of several processes are replicated first, which all processes must do
    together.

    Args:
        tree: Results of a program that was compiled for ``mesh``.
        mesh: Mesh of the model's devices; None on one device.
    """
    if mesh is not None and not all(map(_is_readable, jax.tree.leaves(tree))):
        with without_surroundings():
            tree = _replication(mesh)(tree)
    return jax.device_get(tree)


def _is_readable(x: jax.Array) -> bool:
    """Whether this process has the whole of an array."""
    return x.is_fully_addressable or x.is_fully_replicated


@functools.cache
def _replication(mesh: Mesh) -> Callable[[Any], Any]:
    """Return the compiled function that replicates the arrays of a tree over ``mesh``."""
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))


def local_size(size: int, axis: str) -> int:
    """Return the size of a shard of an axis of ``size``, as ``constrain`` shards it on the mesh of ``use_mesh``."""
    mesh = current_mesh()
    pieces = 1 if mesh is None else math.prod(mesh.shape[m] for m in LOGICAL_AXIS_RULES[axis])
    return size if size % pieces else size // pieces


def default_mesh(config: MllamaConfig) -> Mesh | None:
    """Return a mesh of all devices, or None for one: heads are sharded as far as they go, parameters over the rest."""
    count = jax.device_count()
    return None if count == 1 else make_mesh(**default_mesh_shape(config, count), devices=jax.devices())


def default_mesh_shape(config: MllamaConfig, count: int) -> dict[str, int]:
    """Return the size of each axis of ``default_mesh`` over ``count`` devices."""
    tensor = math.gcd(count, config.text.num_key_value_heads, config.vision.attention_heads)
    return {"data": 1, "fsdp": count // tensor, "tensor": tensor}
