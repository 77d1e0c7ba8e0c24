"""Bytes that a training step holds on each device at its peak, predicted from the model's own arithmetic.

The arguments of a step are exact. The memory that it takes besides is that of its largest arrays, in the numbers in
which the TPU compiler was seen to keep them: ``tests/evidence/plan_table.py`` compares each prediction with the
compiler's figure.
"""

import math
from dataclasses import dataclass

import jax

from llava_cot_jax.costs.model_costs import ModelPart, part_of
from llava_cot_jax.model.attention import LANES
from llava_cot_jax.model.choices import RematPolicy
from llava_cot_jax.planning.communication import FLOAT32_BYTES, TrainingStep, num_shards, shard_bytes, shard_size
from llava_cot_jax.rounding import ceil_div

MemoryShares = dict[str, int]
"""Bytes per device, by what they hold."""


@dataclass(frozen=True)
class SavedPerToken:
    """Activations of one layer that are kept per token for the backward pass.

    Attributes:
        hidden: Number of vectors of the hidden size that each device of the axis ``tensor`` keeps whole.
        split_hidden: Number of vectors of the hidden size that are split over ``tensor``.
        split_mlp: Number of vectors of the MLP's width that are split over ``tensor``.
    """

    hidden: int
    split_hidden: int
    split_mlp: int

    def values(self, hidden_size: int, mlp_size: int, tensor: int) -> int:
        """Number of values per device."""
        return self.hidden * hidden_size + (self.split_hidden * hidden_size + self.split_mlp * mlp_size) // tensor


SAVED_BY_TEXT_LAYER: dict[RematPolicy, SavedPerToken] = {
    "full": SavedPerToken(1, 0, 0),  # the layer's input
    "dots": SavedPerToken(1, 3, 2),  # and the outputs of its matrix products: attention (3), gate and up (2)
    "none": SavedPerToken(4, 4, 2),  # all inputs of products: norms, the middle, heads (q, out, merged; k and v), MLP
}

SAVED_BY_TOWER_BLOCK: dict[RematPolicy, SavedPerToken] = {
    "full": SavedPerToken(1, 0, 0),  # the block's input
    "dots": SavedPerToken(1, 4, 1),  # and the outputs of its matrix products: attention (4), fc1 (1)
    "none": SavedPerToken(4, 5, 1),  # likewise, with as many keys and values as queries, and fc1
}


@dataclass(frozen=True)
class LayerWorkspace:
    """Arrays of one layer that are there at the same time in its backward pass.

    Attributes:
        mlp_float32: Number of arrays of the MLP's width in float32.
        mlp: Number of arrays of the MLP's width in the dtype of the computation.
        hidden: Number of arrays of the hidden size in the dtype of the computation.
        heads: Number of arrays of attention heads in the dtype of the computation.
    """

    mlp_float32: int
    mlp: int
    hidden: int
    heads: int


TEXT_WORKSPACE = LayerWorkspace(mlp_float32=5, mlp=2, hidden=6, heads=0)
"""Workspace of a text layer. Its attention heads take less than its MLP, which is computed at another time."""

TOWER_WORKSPACE = LayerWorkspace(mlp_float32=2, mlp=2, hidden=8, heads=7)
"""Workspace of a block of the vision tower."""

GATHERED_LAYERS = 2
"""Number of layers whose gathered weights are in memory at once: the one that is computed, and the next."""

IMAGE_TOKEN_ARRAYS = 3
"""Number of arrays of all image tokens that are in memory in a text layer's backward pass, for their gradients."""

FLOAT32_LOGITS = 2
"""Arrays of a chunk's logits in float32: the logits and their gradients. There is one more in the step's dtype."""


def training_memory(step: TrainingStep, batch: dict[str, jax.ShapeDtypeStruct]) -> MemoryShares:
    """Predict what a training step holds at its peak: its arguments, and the memory that it takes besides.

    Args:
        step: The training step, with its longest sequences.
        batch: Batch of the step, as ``programs.abstract_batch`` returns it.
    """
    state = step.program.state
    arguments = {
        "parameters": sum(map(shard_bytes, [*state.trained.values(), *state.frozen.values()])),
        "optimizer": sum(map(shard_bytes, jax.tree.leaves(state.optimizer))),
        "batch": sum(map(shard_bytes, batch.values())),
    }
    return arguments | _temporary_memory(step)


def _temporary_memory(step: TrainingStep) -> MemoryShares:
    """Predict the memory beyond the arguments: the largest of three phases, each with what is kept across it.

    While logits are computed, the activations of all layers are kept. In the backward pass of the text layers all of
    their gradients are there as well, since a scan allocates its results at its start. In that of the vision tower
    all gradients are there, and no activations of the text.
    """
    # With gradient accumulation there are two gradients: a float32 sum, and those of one accumulation step.
    gradient_bytes = step.dtype_bytes + FLOAT32_BYTES * (step.settings.grad_accum_steps > 1)
    gradients = {path: shard_size(leaf) * gradient_bytes for path, leaf in step.program.state.trained.items()}
    all_gradients = sum(gradients.values())
    of_tower = sum(size for path, size in gradients.items() if part_of(step.config, path) in ("tower", "projector"))
    text, tower = _saved_text_bytes(step), _saved_tower_bytes(step)
    phases = {
        "logits": (0, text + tower, _logits_bytes(step)),
        "text": (all_gradients - of_tower, text + tower, _text_layer_bytes(step)),
        "tower": (all_gradients, tower if step.has_gradient("tower") else 0, _tower_block_bytes(step)),
    }
    peak = max(phases.values(), key=sum)
    return {"gradients": peak[0], "activations": peak[1], "working": peak[2]}


def _saved_text_bytes(step: TrainingStep) -> int:
    """Bytes of activations that are kept from the forward pass: those of text layers, and the image tokens."""
    text = step.config.text
    saved = SAVED_BY_TEXT_LAYER[step.settings.remat]
    per_token = saved.values(text.hidden_size, text.intermediate_size, step.mesh["tensor"])
    layers = text.num_hidden_layers * step.tokens * per_token if step.has_gradient("self") else 0
    return (layers + step.image_tokens * text.hidden_size) * step.device_batch * step.dtype_bytes


def _saved_tower_bytes(step: TrainingStep) -> int:
    """Bytes of activations that are kept from the forward pass: those of the tower's blocks, and its features."""
    tower = step.config.vision
    saved = SAVED_BY_TOWER_BLOCK[step.settings.remat]
    per_token = saved.values(tower.hidden_size, tower.intermediate_size, step.mesh["tensor"])
    blocks = step.tower_blocks * step.tower_tokens * per_token if step.has_gradient("tower") else 0
    features = step.tower_tokens * tower.output_size if step.has_gradient("projector") else 0
    return (blocks + features) * step.device_batch * step.dtype_bytes


def _logits_bytes(step: TrainingStep) -> int:
    """Bytes of the gathered lm_head, of its float32 gradient, and of one chunk of logits with their gradients."""
    vocabulary = step.config.text.vocab_size // step.mesh["tensor"]
    is_trained = any(part_of(step.config, path) == "head" for path in step.program.state.trained)
    is_gathered = step.mesh["fsdp"] > 1
    head_bytes = step.dtype_bytes * is_gathered + FLOAT32_BYTES * is_trained
    head = vocabulary * step.config.text.hidden_size * head_bytes
    tokens = ceil_div(step.tokens, step.logit_chunks) * step.device_batch
    return head + tokens * vocabulary * (FLOAT32_LOGITS * FLOAT32_BYTES + step.dtype_bytes)


def _text_layer_bytes(step: TrainingStep) -> int:
    """Bytes that the backward pass of a text layer works with: gathered weights, activations and image tokens."""
    text = step.config.text
    images = 0
    if step.has_gradient("projector"):
        images = IMAGE_TOKEN_ARRAYS * step.device_batch * step.image_tokens * text.hidden_size * step.dtype_bytes
    weights = GATHERED_LAYERS * _largest_layer_size(step, ("self", "cross")) * step.dtype_bytes
    tokens = step.device_batch * step.tokens
    sizes = (text.hidden_size, text.intermediate_size, text.num_attention_heads)
    return weights + _workspace_bytes(step, TEXT_WORKSPACE, tokens, *sizes) + images


def _tower_block_bytes(step: TrainingStep) -> int:
    """Bytes that the backward pass of a block of the vision tower works with: gathered weights and activations."""
    tower = step.config.vision
    weights = GATHERED_LAYERS * _largest_layer_size(step, ("tower",)) * step.dtype_bytes
    tokens = step.device_batch * step.tower_tokens
    sizes = (tower.hidden_size, tower.intermediate_size, tower.attention_heads)
    return weights + _workspace_bytes(step, TOWER_WORKSPACE, tokens, *sizes)


def _workspace_bytes(
    step: TrainingStep, workspace: LayerWorkspace, tokens: int, hidden_size: int, mlp_size: int, heads: int
) -> int:
    """Bytes of a layer's workspace. Arrays of the MLP and of heads are split over the mesh axis ``tensor``."""
    tensor, dtype_bytes = step.mesh["tensor"], step.dtype_bytes
    mlp = tokens * mlp_size // tensor * (workspace.mlp_float32 * FLOAT32_BYTES + workspace.mlp * dtype_bytes)
    # The vector of a head is padded to the lanes of a TPU's vector registers.
    attention = tokens * heads // tensor * LANES * workspace.heads * dtype_bytes
    return mlp + attention + tokens * hidden_size * workspace.hidden * dtype_bytes


def _largest_layer_size(step: TrainingStep, parts: tuple[ModelPart, ...]) -> int:
    """Number of values per device in the largest layer of the given parts once it is gathered along ``fsdp``."""
    layers: dict[str, int] = {}
    for path, parameter in step.program.table.items():
        if part_of(step.config, path) in parts and parameter.stacked:
            layer = path.split("layers.")[0] + path.split("layers.")[1].split(".")[0]
            size = math.prod(parameter.tensor_shape) // num_shards(parameter, step.mesh, ("tensor",))
            layers[layer] = layers.get(layer, 0) + size
    return max(layers.values())
