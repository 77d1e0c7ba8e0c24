"""Declaration of every parameter: published name, shape, logical axes, initialiser.

Initialisation, sharding, import, export, checkpoints and ahead-of-time compilation all read this table. Names, shapes
and orientation ([out, in] for every projection) are those of the published checkpoint, so a tensor of a file is a
parameter of the model without a transposition.

A model holds its parameters in one of two layouts:

* ``unrolled``: one array per layer, for decoding. The paths are the published names.
* ``stacked``: the layers at the same index of every repeating block share one array with a leading axis ``layers``, for
  training under ``lax.scan``. A block of text layers has ``TextConfig.layers_per_block`` layers, p: path ``layers.i``
  holds the layers i, i + p, i + 2p, ... The blocks of the vision tower have one layer each.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from llava_cot_jax.model.config import EXTRA_EMBEDDINGS, MllamaConfig, TextConfig, VisionConfig

Params = Mapping[str, PyTree[Array]]
"""Parameters of a model or of one of its modules: nested dicts of arrays, named as in the published checkpoint.

A leaf has any dtype, and is a tracer inside a transformation of JAX. mypy takes ``PyTree`` for ``Any``, since only the
configuration tells which names lead to an array. The tests check every leaf at run time.
"""

ParamLayout = Literal["unrolled", "stacked"]
"""How the parameters of repeated layers are held: an array for each layer, or one for all layers of a kind."""

Initializer = Literal["normal", "zeros", "ones", "gate"]

GATE = 0.7
"""Initial value of a gate. The published one, 0, leaves the image path without a gradient for long."""


@dataclass(frozen=True)
class Parameter:
    """Declaration of one array of the model.

    Attributes:
        shape: Shape, with the ``layers`` axis of a stack.
        axes: Logical name of each axis, which ``sharding.LOGICAL_AXIS_RULES`` maps to mesh axes; None where the axis is
            never sharded.
        initializer: Distribution of the initial values.
        std: Standard deviation of the initial values, with ``normal``.
        tensors: Names of the published tensors that it holds: one, or those of a stack in order.
        stacked: Whether the leading axis runs over ``tensors``.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    initializer: Initializer
    std: float
    tensors: tuple[str, ...]
    stacked: bool = False

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of each published tensor."""
        return self.shape[1:] if self.stacked else self.shape


def initial_values(
    shape: tuple[int, ...], initializer: Initializer, std: float, key: PRNGKeyArray, dtype: Any
) -> jax.Array:
    """Return the initial values of a tensor."""
    if initializer == "normal":
        return (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
    return jnp.full(shape, {"zeros": 0.0, "ones": 1.0, "gate": GATE}[initializer], dtype)


def parameters(config: MllamaConfig, layout: ParamLayout) -> dict[str, Parameter]:
    """Return the declaration of every parameter by its dotted path in the given layout."""
    published = {p.tensors[0]: p for p in _published(config)}
    if layout == "unrolled":
        return published
    table: dict[str, Parameter] = {}
    for name, parameter in published.items():
        stack, index, leaf = _split_layer(name)
        if index is None:
            table[name] = parameter
            continue
        layers_per_block = config.text.layers_per_block if stack == TEXT_LAYERS else 1
        if index < layers_per_block:
            depth = {
                TEXT_LAYERS: config.text.num_hidden_layers,
                LOCAL_LAYERS: config.vision.num_hidden_layers,
                GLOBAL_LAYERS: config.vision.num_global_layers,
            }[stack]
            tensors = tuple(f"{stack}.{i}.{leaf}" for i in range(index, depth, layers_per_block))
            shape, axes = (len(tensors), *parameter.shape), ("layers", *parameter.axes)
            table[name] = Parameter(shape, axes, parameter.initializer, parameter.std, tensors, stacked=True)
    return table


TEXT_LAYERS = "language_model.model.layers"
LOCAL_LAYERS = "vision_model.transformer.layers"
GLOBAL_LAYERS = "vision_model.global_transformer.layers"


def _split_layer(name: str) -> tuple[str, int | None, str]:
    """Split a layer's name as ("language_model.model.layers", 3, "norm.weight"); another's is (name, None, "")."""
    for stack in (TEXT_LAYERS, LOCAL_LAYERS, GLOBAL_LAYERS):
        if name.startswith(stack + "."):
            index, leaf = name.removeprefix(stack + ".").split(".", 1)
            return stack, int(index), leaf
    return name, None, ""


def _published(config: MllamaConfig) -> Iterator[Parameter]:
    """Yield every published tensor as a parameter of its own."""
    yield from _vision_tensors(config.vision)
    std, hidden = config.text.initializer_range, config.text.hidden_size
    projector = _Declare("multi_modal_projector", std)
    yield projector("weight", (hidden, config.vision.output_size), ("gathered", None))
    yield projector("bias", (hidden,), (None,), "zeros")
    yield from _text_tensors(config.text)


@dataclass(frozen=True)
class _Declare:
    """Declares the parameters whose names begin with ``prefix``."""

    prefix: str
    std: float

    def __call__(
        self, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], initializer: Initializer = "normal"
    ) -> Parameter:
        assert len(shape) == len(axes), name
        return Parameter(shape, axes, initializer, self.std, (f"{self.prefix}.{name}",))


def _vision_tensors(config: VisionConfig) -> Iterator[Parameter]:
    declare = _Declare("vision_model", config.initializer_range)
    width, ratios = config.hidden_size, len(config.supported_aspect_ratios) + 1
    patch = (width, config.num_channels, config.patch_size, config.patch_size)
    yield declare("class_embedding", (width,), (None,))
    yield declare("patch_embedding.weight", patch, ("gathered", None, None, None))
    positions = "gated_positional_embedding"
    yield declare(f"{positions}.gate", (1,), (None,), "gate")
    yield declare(f"{positions}.embedding", (config.tile_tokens, width), (None, "gathered"))
    tiles = (ratios, config.image_tokens * width)  # (ratios, tiles, tokens, width) flattened
    yield declare(f"{positions}.tile_embedding.weight", tiles, (None, "columns"))
    for place in ("pre", "post"):
        tile = f"{place}_tile_positional_embedding"
        yield declare(f"{tile}.gate", (1,), (None,), "gate")
        yield declare(f"{tile}.embedding.weight", (ratios, config.max_num_tiles * width), (None, "columns"))
        yield declare(f"layernorm_{place}.weight", (width,), (None,), "ones")
        yield declare(f"layernorm_{place}.bias", (width,), (None,), "zeros")
    for i in range(config.num_hidden_layers):
        yield from _vision_block(_Declare(f"{LOCAL_LAYERS}.{i}", declare.std), config, gated=False)
    for i in range(config.num_global_layers):
        yield from _vision_block(_Declare(f"{GLOBAL_LAYERS}.{i}", declare.std), config, gated=True)


def _vision_block(declare: _Declare, config: VisionConfig, gated: bool) -> Iterator[Parameter]:
    width, inner = config.hidden_size, config.intermediate_size
    for projection in ("q_proj", "k_proj", "v_proj"):
        yield declare(f"self_attn.{projection}.weight", (width, width), ("heads", "embed"))
    yield declare("self_attn.o_proj.weight", (width, width), ("embed", "heads"))
    yield declare("mlp.fc1.weight", (inner, width), ("mlp", "embed"))
    yield declare("mlp.fc1.bias", (inner,), ("mlp",), "zeros")
    yield declare("mlp.fc2.weight", (width, inner), ("embed", "mlp"))
    yield declare("mlp.fc2.bias", (width,), (None,), "zeros")
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield declare(f"{norm}.weight", (width,), (None,), "ones")
        yield declare(f"{norm}.bias", (width,), (None,), "zeros")
    if gated:
        yield declare("gate_attn", (1,), (None,), "gate")
        yield declare("gate_ffn", (1,), (None,), "gate")


def _text_tensors(config: TextConfig) -> Iterator[Parameter]:
    declare, hidden = _Declare("language_model", config.initializer_range), config.hidden_size
    yield declare("model.embed_tokens.weight", (config.vocab_size + EXTRA_EMBEDDINGS, hidden), (None, "columns"))
    for i, cross in enumerate(config.is_cross):
        yield from _text_layer(_Declare(f"{TEXT_LAYERS}.{i}", declare.std), config, cross)
    yield declare("model.norm.weight", (hidden,), (None,), "ones")
    yield declare("lm_head.weight", (config.vocab_size, hidden), ("vocab", "embed"))


def _text_layer(declare: _Declare, config: TextConfig, cross: bool) -> Iterator[Parameter]:
    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    attention = "cross_attn" if cross else "self_attn"
    keys = (config.num_key_value_heads * head_dim, hidden)
    yield declare(f"{attention}.q_proj.weight", (hidden, hidden), ("heads", "embed"))
    yield declare(f"{attention}.k_proj.weight", keys, ("kv_heads", "embed"))
    yield declare(f"{attention}.v_proj.weight", keys, ("kv_heads", "embed"))
    yield declare(f"{attention}.o_proj.weight", (hidden, hidden), ("embed", "heads"))
    if cross:
        yield declare("cross_attn.q_norm.weight", (head_dim,), (None,), "ones")
        yield declare("cross_attn.k_norm.weight", (head_dim,), (None,), "ones")
        yield declare("cross_attn_attn_gate", (1,), (None,), "gate")
        yield declare("cross_attn_mlp_gate", (1,), (None,), "gate")
    yield declare("mlp.gate_proj.weight", (inner, hidden), ("mlp", "embed"))
    yield declare("mlp.up_proj.weight", (inner, hidden), ("mlp", "embed"))
    yield declare("mlp.down_proj.weight", (hidden, inner), ("embed", "mlp"))
    yield declare("input_layernorm.weight", (hidden,), (None,), "ones")
    yield declare("post_attention_layernorm.weight", (hidden,), (None,), "ones")
