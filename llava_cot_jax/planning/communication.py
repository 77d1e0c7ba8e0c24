"""Bytes that a training step moves, from the model's own arithmetic: between chips by mesh axis, and to and from HBM.

To gather an array over n devices, or to reduce it so that each device keeps its own part (reduce-scatter), a device
sends (n - 1) / n of the array; an all-reduce costs twice that. The axis ``fsdp`` gathers a layer's weights where they
are used, once in the forward and once in the backward pass, and reduce-scatters their gradients; ``tensor`` all-reduces
a layer's activations; ``data`` all-reduces gradients. These are lower bounds: the TPU compiler passes weights along in
rings while it multiplies, which takes up to (n + 1) / n.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from llava_cot_jax.costs import model_costs
from llava_cot_jax.costs.model_costs import MODEL_PARTS, ModelPart, part_of
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.parameters import Parameter
from llava_cot_jax.model.sharding import LOGICAL_AXIS_RULES
from llava_cot_jax.rounding import ceil_div
from llava_cot_jax.training.loss import LOGITS_CHUNK
from llava_cot_jax.training.program import TrainProgram
from llava_cot_jax.training.settings import TrainSettings

FLOAT32_BYTES = 4

FORWARD_REDUCTIONS = 2
"""All-reduces of a layer's forward pass: the outputs of its attention and of its MLP."""

BACKWARD_REDUCTIONS = 2
"""All-reduces of a layer's backward pass: the gradients of the inputs of its attention and of its MLP."""

ADAPTED_BACKWARD_REDUCTIONS = {"self": 5, "cross": 3}
"""All-reduces of a text layer's backward pass where it has adapters: one for each projection from the hidden states,
those of queries (keys and values too in ``self``), gate and up."""

REMAT_REDUCTIONS = {"none": 0, "dots": 0, "full": 1}
"""All-reduces of a layer that are repeated when its activations are recomputed: the output of its attention."""


@dataclass(frozen=True)
class TrainingStep:
    """A training step on a mesh, with the quantities that its bytes are computed from.

    Attributes:
        settings: Settings of the run.
        config: Configuration of the model.
        program: Program of the run.
        mesh: Number of devices along each mesh axis.
        tokens: Number of tokens of each sequence.
        images: Number of images of each sequence.
    """

    settings: TrainSettings
    config: MllamaConfig
    program: TrainProgram
    mesh: Mapping[str, int]
    tokens: int
    images: int

    @property
    def dtype_bytes(self) -> int:
        """Bytes of a value in the dtype of the computation."""
        return int(jnp.dtype(self.settings.dtype).itemsize)

    @property
    def device_batch(self) -> int:
        """Number of sequences that a device computes together, in one step of gradient accumulation."""
        shards = self.mesh["data"] * self.mesh["fsdp"] * self.settings.grad_accum_steps
        return max(1, self.settings.loader.batch_size // shards)

    @property
    def tower_tokens(self) -> int:
        """Number of tokens of a sequence's images in the vision tower, with their padding."""
        return self.images * model_costs.padded_tower_tokens(self.config)

    @property
    def image_tokens(self) -> int:
        """Number of image tokens of a sequence, with their padding."""
        return model_costs.padded_image_tokens(self.config, self.images)

    @property
    def logit_chunks(self) -> int:
        """Number of chunks of a device's batch whose logits are materialised one after the other."""
        return ceil_div(self.tokens * self.device_batch, LOGITS_CHUNK)

    @property
    def tower_blocks(self) -> int:
        """Number of blocks of the vision tower."""
        return self.config.vision.num_hidden_layers + self.config.vision.num_global_layers

    def has_gradient(self, part: ModelPart) -> bool:
        """Whether a gradient passes back through the layers of a part of the model."""
        learning = self.program.trained_parts | self.program.adapted_parts
        if part in ("tower", "projector"):
            return any(before in learning for before in MODEL_PARTS[: MODEL_PARTS.index(part) + 1])
        return bool(learning)


def num_shards(parameter: Parameter, mesh: Mapping[str, int], axes: tuple[str, ...]) -> int:
    """Return the number of shards that a parameter is split into along the given mesh axes."""
    splitting = {name for axis in parameter.axes if axis for name in LOGICAL_AXIS_RULES[axis]}
    return math.prod(mesh[name] for name in axes if name in splitting)


def training_bytes_sent(step: TrainingStep) -> dict[str, float]:
    """Bytes that a device sends in a step, by mesh axis. Axes of one device send nothing."""
    sent = dict.fromkeys(step.mesh, 0.0)
    for path, parameter in step.program.table.items():
        for axis, count in _parameter_bytes_sent(step, path, parameter).items():
            sent[axis] += count
    sent["tensor"] += step.settings.grad_accum_steps * _activation_bytes_sent(step)
    return sent


def _parameter_bytes_sent(step: TrainingStep, path: str, parameter: Parameter) -> dict[str, float]:
    """Bytes that a device sends in a step to gather a parameter and to reduce its gradient, by mesh axis."""
    part, data = part_of(step.config, path), step.mesh["data"]
    is_trained, accumulations = path in step.program.state.trained, step.settings.grad_accum_steps
    shards = {axis: num_shards(parameter, step.mesh, (axis,)) for axis in ("fsdp", "tensor")}
    size = math.prod(parameter.shape)
    shard = size / (shards["fsdp"] * shards["tensor"])
    sent = {"data": is_trained * 2 * (data - 1) / data * shard * step.dtype_bytes * accumulations}
    if "columns" in parameter.axes:
        return sent | _embedding_bytes_sent(step, part, parameter, is_trained)
    gathers, scatters = (1 + step.has_gradient(part)) * accumulations, is_trained * accumulations
    gradient_bytes = step.dtype_bytes
    if part == "head":  # gathered for each chunk of logits, whose gradients are float32
        gathers, scatters, gradient_bytes = gathers * step.logit_chunks, scatters * step.logit_chunks, FLOAT32_BYTES
    gathered = "gathered" in parameter.axes
    whole = (gathers * step.dtype_bytes + scatters * gradient_bytes) * size / (1 if gathered else shards["tensor"])
    if gathered:
        sent["tensor"] = (shards["tensor"] - 1) / shards["tensor"] * whole
    return sent | {"fsdp": (shards["fsdp"] - 1) / shards["fsdp"] * whole}


def _embedding_bytes_sent(step: TrainingStep, part: ModelPart, table: Parameter, is_trained: bool) -> dict[str, float]:
    """Bytes that a device sends to look rows up in a table that is split by columns, by mesh axis.

    ``fsdp`` exchanges a device's own columns of the rows, and their gradients; ``tensor`` the other columns.
    """
    fsdp, tensor = step.mesh["fsdp"], step.mesh["tensor"]
    lookups = step.settings.grad_accum_steps * step.device_batch * (step.tokens if part == "embedding" else 1)
    found = lookups * table.shape[-1] * step.dtype_bytes
    return {"fsdp": (fsdp - 1) / fsdp * found / tensor * (1 + is_trained), "tensor": (tensor - 1) / tensor * found}


def _activation_bytes_sent(step: TrainingStep) -> float:
    """Bytes that a device sends along ``tensor`` to all-reduce the activations of one accumulation step."""
    n = step.mesh["tensor"]
    tower, text = step.config.vision, step.config.text
    hidden_states = step.tokens * text.hidden_size
    repeated = REMAT_REDUCTIONS[step.settings.remat]
    text_gradient, tower_gradient = step.has_gradient("self"), step.has_gradient("tower")
    layers, cross = text.num_hidden_layers, sum(text.is_cross)
    backward = BACKWARD_REDUCTIONS * layers
    if step.program.adapted_parts:
        adapted = ADAPTED_BACKWARD_REDUCTIONS
        backward = adapted["self"] * (layers - cross) + adapted["cross"] * cross
    reduced = hidden_states * (FORWARD_REDUCTIONS * layers + text_gradient * (backward + repeated * layers))
    reduced += hidden_states * text_gradient  # the gradient of what enters lm_head
    # The gradient of the image tokens, from the keys and values of each cross layer.
    reduced += cross * step.image_tokens * text.hidden_size * step.has_gradient("projector")
    per_block = FORWARD_REDUCTIONS + tower_gradient * (BACKWARD_REDUCTIONS + repeated)
    reduced += step.tower_blocks * step.tower_tokens * tower.hidden_size * per_block
    return 2 * (n - 1) / n * step.device_batch * reduced * step.dtype_bytes


def training_hbm_bytes(step: TrainingStep) -> float:
    """Least number of bytes that a device must read from and write to HBM in a step.

    A layer's weights are read for its forward pass, its backward pass and, where it is trained, its gradient; once
    more where the layer is recomputed. The optimizer reads and writes its state. The inputs of layers are written and
    read.
    """
    settings, mesh = step.settings, step.mesh
    recomputes = settings.remat == "full"
    total = 0.0
    for path, parameter in step.program.table.items():
        part = part_of(step.config, path)
        if part == "embedding":
            continue
        gathered = math.prod(parameter.shape) / num_shards(parameter, mesh, ("tensor",))
        reads = 1 + step.has_gradient(part) * (1 + recomputes) + (path in step.program.state.trained)
        total += reads * gathered * step.dtype_bytes * settings.grad_accum_steps
    total += 2 * updated_state_bytes(step.program)
    tower, text = step.config.vision, step.config.text
    layer_inputs = text.num_hidden_layers * step.tokens * text.hidden_size
    layer_inputs += step.tower_blocks * step.tower_tokens * tower.hidden_size
    return total + 2 * layer_inputs * step.device_batch * step.dtype_bytes * settings.grad_accum_steps


def updated_state_bytes(program: TrainProgram) -> int:
    """Bytes per device of what a step updates: the trained arrays and the optimizer's state."""
    return sum(map(shard_bytes, jax.tree.leaves((program.state.trained, program.state.optimizer))))


def shard_bytes(leaf: Any) -> int:
    """Bytes per device of an array or a ``jax.ShapeDtypeStruct``."""
    return shard_size(leaf) * int(leaf.dtype.itemsize)


def shard_size(leaf: Any) -> int:
    """Number of values per device of an array or a ``jax.ShapeDtypeStruct``."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape))
