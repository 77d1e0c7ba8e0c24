"""Bytes that a program holds on each device at its worst moment, predicted from the model's own arithmetic.

What stands between two calls is exact. What a call needs besides is made of its largest arrays, as the TPU compiler
was seen to keep them: ``tests/evidence/plan_table.py`` holds each prediction beside the compiler's figure.
"""

import math
from dataclasses import dataclass

import jax

from llava_cot_jax.costs.counts import Part, part_of
from llava_cot_jax.planning.traffic import FLOAT32, Step, pieces, shard_bytes, shard_size

Parts = dict[str, int]
"""Bytes of one device, by what they are of."""


def training_memory(step: Step, batch: dict[str, jax.ShapeDtypeStruct]) -> Parts:
    """What a training step holds: its arguments, and what it needs besides.

    Args:
        step: see there.
        batch: of the step, as ``programs.abstract_batch`` gives it.
    """
    state = step.program.state
    held = {
        "parameters": sum(map(shard_bytes, [*state.trained.values(), *state.frozen.values()])),
        "optimizer": sum(map(shard_bytes, jax.tree.leaves(state.optimizer))),
        "batch": sum(map(shard_bytes, batch.values())),
    }
    return held | _needed(step)


def _needed(step: Step) -> Parts:
    """Beyond the arguments: the largest of three moments, each with what is kept across it.

    When the logits are made, activations of all layers are kept. In the backward pass of the text layers their
    gradients are there too, all of them, for a scan has room for its results from its beginning; then, in that of
    the tower's blocks, all gradients, while nothing of the text is kept.
    """
    # Parts of a batch are summed in float32, beside the gradients of one part.
    width = step.width + FLOAT32 * (step.settings.micro_batches > 1)
    gradients = {path: shard_size(leaf) * width for path, leaf in step.program.state.trained.items()}
    of_tower = sum(size for path, size in gradients.items() if part_of(step.config, path) in ("tower", "projector"))
    saved = Saved.of(step)
    moments = {
        "logits": (0, saved.text + saved.tower, _logits(step)),
        "text": (sum(gradients.values()) - of_tower, saved.text + saved.tower, _text_layer(step)),
        "tower": (sum(gradients.values()), saved.tower if step.flows("tower") else 0, _tower_block(step)),
    }
    taken = max(moments.values(), key=sum)
    return {"gradients": taken[0], "activations": taken[1], "working": taken[2]}


@dataclass(frozen=True)
class Saved:
    """Bytes of activations that are kept from the forward pass for the backward one.

    Attributes:
        text: of the text layers and the image tokens that they see.
        tower: of the tower's blocks and its features.
    """

    text: int
    tower: int

    @classmethod
    def of(cls, step: Step) -> "Saved":
        """Of a step."""
        tower, text, tensor = step.config.vision, step.config.text, step.mesh["tensor"]
        state = text.hidden_size
        kept = {
            "full": state,
            "dots": state + (3 * state + 2 * text.intermediate_size) // tensor,
            "none": 4 * state + (8 * state + 5 * text.intermediate_size) // tensor,
        }[step.settings.checkpointing]
        in_text = text.num_hidden_layers * step.tokens * kept if step.flows("self") else 0
        images = step.image_tokens * state
        wide = tower.hidden_size
        kept = {
            "full": wide,
            "dots": wide + (4 * wide + tower.intermediate_size) // tensor,
            "none": 4 * wide + (8 * wide + 4 * tower.intermediate_size) // tensor,
        }[step.settings.checkpointing]
        blocks = tower.num_hidden_layers + tower.num_global_layers
        in_tower = blocks * step.tower_tokens * kept if step.flows("tower") else 0
        features = step.tower_tokens * tower.output_size if step.flows("projector") else 0
        each = step.rows * step.width
        return cls((in_text + images) * each, (in_tower + features) * each)


def _logits(step: Step) -> int:
    """lm_head whole, its gradient in float32, and the logits of one part with their gradients."""
    vocabulary = step.config.text.vocab_size // step.mesh["tensor"]
    learns = any(part_of(step.config, path) == "head" for path in step.program.state.trained)
    cut = step.mesh["fsdp"] > 1
    head = vocabulary * step.config.text.hidden_size * (step.width * cut + FLOAT32 * learns)
    tokens = -(-step.tokens // step.chunks) * step.rows
    return head + tokens * vocabulary * (2 * FLOAT32 + step.width)


def _text_layer(step: Step) -> int:
    """A layer's weights whole, twice, for the next one is fetched meanwhile; their gradients; and its activations."""
    text, tensor = step.config.text, step.mesh["tensor"]
    weights = _largest_layer(step, ("self", "cross")) * step.width
    tokens = step.rows * step.tokens
    inner = tokens * text.intermediate_size // tensor * (5 * FLOAT32 + 2 * step.width)
    images = 0
    if step.flows("projector"):
        images = 3 * step.rows * step.image_tokens * text.hidden_size * step.width
    return weights * 2 + inner + tokens * text.hidden_size * 6 * step.width + images


def _tower_block(step: Step) -> int:
    """The same of a block of the tower."""
    tower, tensor = step.config.vision, step.mesh["tensor"]
    weights = _largest_layer(step, ("tower",)) * step.width
    tokens = step.rows * step.tower_tokens
    inner = tokens * tower.intermediate_size // tensor * (2 * FLOAT32 + 2 * step.width)
    heads = tokens * tower.attention_heads // tensor * 128 * 7 * step.width  # a head is as wide as a lane
    return weights * 2 + inner + heads + tokens * tower.hidden_size * 8 * step.width


def _largest_layer(step: Step, parts: tuple[Part, ...]) -> int:
    """Numbers in the largest layer of these parts, on one device when it is gathered."""
    layers: dict[str, int] = {}
    for path, parameter in step.program.table.items():
        if part_of(step.config, path) in parts and parameter.stacked:
            layer = path.split("layers.")[0] + path.split("layers.")[1].split(".")[0]
            size = math.prod(parameter.tensor_shape) // pieces(parameter, step.mesh, ("tensor",))
            layers[layer] = layers.get(layer, 0) + size
    return max(layers.values())
