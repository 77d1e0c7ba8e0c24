"""Bytes that a program moves, from the model's own arithmetic: between chips by mesh axis, and in a chip's memory.

What a device sends in a gather of an array over n devices is (n - 1) / n of it, and so in a reduction that leaves
each device its part; a reduction whose whole result all devices get costs twice that. As the layers are scanned,
``fsdp`` gathers a layer's weights where they are used, once forwards and once backwards, and scatters their
gradients; ``tensor`` sums what its devices found of a layer's activations; ``data`` sums gradients. This is the least
that can be sent: the TPU compiler hands weights on in rings while it multiplies, which takes up to (n + 1) / n.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from llava_cot_jax.costs.counts import Part, part_of
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.parameters import Parameter
from llava_cot_jax.model.sharding import RULES
from llava_cot_jax.model.text_decoder import IMAGE_TOKEN_MULTIPLE
from llava_cot_jax.model.vision_tower import TOKEN_MULTIPLE
from llava_cot_jax.training.loss import LOGITS
from llava_cot_jax.training.program import Program
from llava_cot_jax.training.settings import TrainSettings

FLOAT32 = 4


@dataclass(frozen=True)
class Step:
    """A training step on a mesh, as its counts of bytes see it.

    Attributes:
        settings: of the run.
        config: the model's.
        program: the run's.
        mesh: devices along each axis.
        tokens: of each row.
    """

    settings: TrainSettings
    config: MllamaConfig
    program: Program
    mesh: Mapping[str, int]
    tokens: int

    @property
    def width(self) -> int:
        """Bytes of a number in the computation."""
        return int(jnp.dtype(self.settings.dtype).itemsize)

    @property
    def rows(self) -> int:
        """That a device computes at a time."""
        over = self.mesh["data"] * self.mesh["fsdp"] * self.settings.micro_batches
        return max(1, self.settings.loader.batch // over)

    @property
    def tower_tokens(self) -> int:
        """Of an image, with the tower's fill."""
        tower = self.config.vision
        return tower.max_num_tiles * (tower.tile_tokens + -tower.tile_tokens % TOKEN_MULTIPLE)

    @property
    def image_tokens(self) -> int:
        """Of a row, with their fill."""
        return self.config.vision.image_tokens + -self.config.vision.image_tokens % IMAGE_TOKEN_MULTIPLE

    @property
    def chunks(self) -> int:
        """Parts of a row whose logits stand one after the other."""
        return -(-self.tokens * self.rows // LOGITS)

    def flows(self, part: Part) -> bool:
        """Whether a gradient passes back through the layers of a part."""
        order: tuple[Part, ...] = ("tower", "projector", "embedding", "self", "cross", "head")
        learns = self.program.trained | self.program.adapted
        if part in ("tower", "projector"):
            return any(before in learns for before in order[: order.index(part) + 1])
        return bool(learns)


def pieces(parameter: Parameter, mesh: Mapping[str, int], axes: tuple[str, ...]) -> int:
    """How many pieces those of the mesh's ``axes`` that cut ``parameter`` cut it into."""
    cut = {name for axis in parameter.axes if axis for name in RULES[axis]}
    return math.prod(mesh[name] for name in axes if name in cut)


def training_traffic(step: Step) -> dict[str, float]:
    """Bytes that a device sends in a step, by mesh axis; axes of one device send nothing."""
    sent = dict.fromkeys(step.mesh, 0.0)
    for path, parameter in step.program.table.items():
        for axis, count in _of_a_parameter(step, path, parameter).items():
            sent[axis] += count
    sent["tensor"] += step.settings.micro_batches * _of_activations(step)
    return sent


def _of_a_parameter(step: Step, path: str, parameter: Parameter) -> dict[str, float]:
    part, copies = part_of(step.config, path), step.mesh["data"]
    learns, parts = path in step.program.state.trained, step.settings.micro_batches
    over = {axis: pieces(parameter, step.mesh, (axis,)) for axis in ("fsdp", "tensor")}
    size = math.prod(parameter.shape)
    left = size / (over["fsdp"] * over["tensor"])
    sent = {"data": learns * 2 * (copies - 1) / copies * left * step.width * parts}
    if "columns" in parameter.axes:
        return sent | _of_a_table(step, part, parameter, learns)
    uses, scatters, gradient = (1 + step.flows(part)) * parts, learns * parts, step.width
    if part == "head":  # gathered for each part of the logits, whose products are float32
        uses, scatters, gradient = uses * step.chunks, scatters * step.chunks, FLOAT32
    gathered = "gathered" in parameter.axes
    whole = (uses * step.width + scatters * gradient) * size / (1 if gathered else over["tensor"])
    if gathered:
        sent["tensor"] = (over["tensor"] - 1) / over["tensor"] * whole
    return sent | {"fsdp": (over["fsdp"] - 1) / over["fsdp"] * whole}


def _of_a_table(step: Step, part: Part, table: Parameter, learns: bool) -> dict[str, float]:
    """Of what is looked up: along ``fsdp`` a device's own columns, and their gradients; along ``tensor`` the others."""
    fsdp, tensor = step.mesh["fsdp"], step.mesh["tensor"]
    lookups = step.settings.micro_batches * step.rows * (step.tokens if part == "embedding" else 1)
    found = lookups * table.shape[-1] * step.width
    return {"fsdp": (fsdp - 1) / fsdp * found / tensor * (1 + learns), "tensor": (tensor - 1) / tensor * found}


def _of_activations(step: Step) -> float:
    """What the devices of the tensor axis send to sum up the activations of one part of a batch."""
    n = step.mesh["tensor"]
    tower, text = step.config.vision, step.config.text
    state = step.tokens * text.hidden_size
    again = 1 if step.settings.checkpointing == "full" else 0  # what a layer computes a second time
    text_flows, tower_flows = step.flows("self"), step.flows("tower")
    layers, cross = text.num_hidden_layers, sum(text.is_cross)
    # Backwards, the gradients of what enters attention and MLP; with adapters each projection's are summed apart.
    backwards = 5 * (layers - cross) + 3 * cross if step.program.adapted else 2 * layers
    sums = state * (2 * layers + text_flows * (backwards + again * layers))
    sums += state * text_flows  # what the head gives back
    sums += cross * step.image_tokens * text.hidden_size * step.flows("projector")
    blocks = tower.num_hidden_layers + tower.num_global_layers
    sums += blocks * step.tower_tokens * tower.hidden_size * (2 + tower_flows * (2 + again))
    return 2 * (n - 1) / n * step.rows * sums * step.width


def training_bytes(step: Step) -> float:
    """Bytes that a device must read and write in its memory in a step, at the least.

    Weights are read for the layer, for its backward pass and, where it is computed again, for that; the optimizer
    reads and writes its state; the inputs of layers are written and read.
    """
    settings, mesh = step.settings, step.mesh
    again = settings.checkpointing == "full"
    total = 0.0
    for path, parameter in step.program.table.items():
        part = part_of(step.config, path)
        if part == "embedding":
            continue
        held = math.prod(parameter.shape) / pieces(parameter, mesh, ("tensor",))
        reads = 1 + step.flows(part) * (1 + again) + (path in step.program.state.trained)
        total += reads * held * step.width * settings.micro_batches
    total += 2 * state_bytes(step.program)
    tower, text = step.config.vision, step.config.text
    saved = text.num_hidden_layers * step.tokens * text.hidden_size
    saved += (tower.num_hidden_layers + tower.num_global_layers) * step.tower_tokens * tower.hidden_size
    return total + 2 * saved * step.rows * step.width * settings.micro_batches


def state_bytes(program: Program) -> int:
    """Of what a step changes, on one device: trained arrays and moments."""
    return sum(map(shard_bytes, jax.tree.leaves((program.state.trained, program.state.optimizer))))


def shard_bytes(leaf: Any) -> int:
    """Bytes of an array, or of a ``jax.ShapeDtypeStruct``, on one of its devices."""
    return shard_size(leaf) * int(leaf.dtype.itemsize)


def shard_size(leaf: Any) -> int:
    """Likewise, how many numbers."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape))
