"""Llama-3.2-Vision as a Flax module, and the pure functions that it is made of."""

import functools
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from llava_cot_jax.errors import UserError
from llava_cot_jax.model import text_decoder, vision_tower
from llava_cot_jax.model.attention import causal
from llava_cot_jax.model.checkpoint.finding import read_config, resolve_checkpoint
from llava_cot_jax.model.checkpoint.sharded import OnProgress, load_arrays, save_arrays
from llava_cot_jax.model.choices import Checkpointing
from llava_cot_jax.model.config import Convention, MllamaConfig
from llava_cot_jax.model.layers import Weights, scaled_product
from llava_cot_jax.model.parameters import Initializer, Layout, Parameter, flatten, initialize, nest, parameters
from llava_cot_jax.model.quantization import quantized
from llava_cot_jax.model.sharding import check_mesh, constrain, on_mesh, parameter_sharding
from llava_cot_jax.paths import as_path

ArrayLike = jax.Array | np.ndarray
PARTS = ("vision_model", "multi_modal_projector", "language_model")


class Mllama(nnx.Module):
    """Llama-3.2-Vision: a vision tower, a language model, and cross layers between them.

    The weights are ``nnx.Param``s named as in the published checkpoint, e.g.
    ``model.language_model.model.layers["3"].cross_attn.q_proj.weight`` [out, in].

    Args:
        config: sizes and convention.
        rngs: where fresh weights come from (the stream ``params``). They are the same in either
            layout and on any mesh. None where ``arrays`` are given.
        layout: ``"unrolled"``, one array per layer, for decoding; ``"stacked"``, scanned over, for training.
        dtype: of the weights, and so of the activations.
        mesh: where the weights live (``sharding.make_mesh``); None is the default device.
        checkpointing: what of a layer the backward pass finds saved.
        arrays: weights that are there, by the paths of ``parameters(config, layout)``, in place of fresh ones.

    Raises:
        UserError: ``mesh`` does not divide the model.
    """

    vision_model: Any
    multi_modal_projector: Any
    language_model: Any

    def __init__(
        self,
        config: MllamaConfig,
        *,
        rngs: nnx.Rngs | None = None,
        layout: Layout = "unrolled",
        dtype: Any = jnp.float32,
        mesh: Mesh | None = None,
        checkpointing: Checkpointing = "none",
        arrays: dict[str, jax.Array] | None = None,
    ) -> None:
        if mesh is not None:
            check_mesh(config, mesh)
        self.config = config
        self.layout: Layout = layout
        self.mesh = mesh
        self.checkpointing: Checkpointing = checkpointing
        if arrays is None:
            if rngs is None:
                raise TypeError("give rngs, from which fresh weights are drawn, or arrays")
            key, table = rngs.params(), parameters(config, layout)
            arrays = {path: fresh(parameter, key, jnp.dtype(dtype), mesh) for path, parameter in table.items()}
        self._hold(arrays)

    def __call__(
        self,
        input_ids: ArrayLike,
        *,
        pixel_values: ArrayLike | None = None,
        aspect_ratio_ids: ArrayLike | None = None,
        aspect_ratio_mask: ArrayLike | None = None,
        cross_attention_mask: ArrayLike | None = None,
        attention_mask: ArrayLike | None = None,
    ) -> jax.Array:
        """Logits of the next token after every token; takes what a transformers processor returns.

        Args:
            input_ids: int [batch, tokens].
            pixel_values: [batch, images, tiles, channels, size, size], normalised float or uint8;
                None for a batch without images.
            aspect_ratio_ids: int [batch, images]; 0 where a row has fewer images.
            aspect_ratio_mask: 0 or 1 [batch, images, tiles]; by default what the ids imply.
            cross_attention_mask: 0 or 1 [batch, tokens, images, tiles], what a token sees.
            attention_mask: 0 or 1 [batch, tokens]; 0 is padding, on either side.

        Returns:
            float32 [batch, tokens, vocabulary]; of no meaning at padding.

        Raises:
            UserError: pixel values without the ids or the cross attention mask that belong to them,
                or arrays whose shapes contradict the configuration or each other.
        """
        inputs = {
            "input_ids": input_ids,
            "pixel_values": pixel_values,
            "aspect_ratio_ids": aspect_ratio_ids,
            "aspect_ratio_mask": aspect_ratio_mask,
            "cross_attention_mask": cross_attention_mask,
            "attention_mask": attention_mask,
        }
        check_inputs(self.config, inputs)
        return self._run(_all_logits, inputs)

    def vision_features(
        self, pixel_values: ArrayLike, aspect_ratio_ids: ArrayLike, aspect_ratio_mask: ArrayLike | None = None
    ) -> jax.Array:
        """What the vision tower makes of images, before the projector; arguments as for a call.

        Returns:
            [batch, images, tiles, patches + 1, features].
        """
        images = {
            "pixel_values": pixel_values,
            "aspect_ratio_ids": aspect_ratio_ids,
            "aspect_ratio_mask": aspect_ratio_mask,
        }
        return self._run(_features, images)

    def _run(self, function: Callable[..., jax.Array], inputs: Mapping[str, ArrayLike | None]) -> jax.Array:
        """``function`` of these weights and inputs, compiled."""
        given = {name: _device_ready(x) for name, x in inputs.items() if x is not None}
        static = {"config": self.config, "mesh": self.mesh, "checkpointing": self.checkpointing}
        return _compiled(self.params, given, function=function, **static)

    @property
    def params(self) -> dict[str, Any]:
        """The weights as a nest of dicts that ends in arrays: what the pure functions take."""
        # Not through nnx.state, which leaves reference cycles that keep every array until a garbage collection.
        return {name: _as_arrays(getattr(self, name)) for name in PARTS}

    @property
    def dtype(self) -> Any:
        """Of the weights, and so of the activations."""
        return self.language_model.model.norm.weight.dtype

    @property
    def is_quantized(self) -> bool:
        """Whether the text layers' projections are in int8."""
        return "scale" in self.language_model.lm_head

    def quantize(self) -> None:
        """Turn the text layers' projections and lm_head into int8 in place, for decoding (``quantization``).

        Raises:
            UserError: the layers are stacked.
        """
        if self.layout != "unrolled":
            raise UserError("stacked weights are for training: call to_layout('unrolled') before quantize()")
        if not self.is_quantized:
            held = flatten(self.params)
            self._hold({})  # ``held`` alone keeps the arrays now
            self._hold(quantized(held))

    def to_layout(self, layout: Layout) -> None:
        """Change the layout in place, one parameter at a time: never are there two copies of the model."""
        if layout == self.layout:
            return
        if self.is_quantized:
            raise UserError("int8 weights are for decoding: load the model anew to train it")
        old, new = parameters(self.config, self.layout), parameters(self.config, layout)
        held = flatten(self.params)
        self._hold({})  # ``held`` alone keeps the arrays now, so that each is freed once its parts stand
        tensors: dict[str, jax.Array] = {}
        for path, parameter in old.items():
            if parameter.stacked:
                part = new[parameter.tensors[0]]
                parts = _placed(_unstack, part, self.mesh)(held.pop(path))
                tensors |= zip(parameter.tensors, jax.block_until_ready(parts), strict=True)
            else:
                tensors[path] = held.pop(path)
        arrays: dict[str, jax.Array] = {}
        for path, parameter in new.items():
            parts = [tensors.pop(tensor) for tensor in parameter.tensors]
            stack = _placed(_stack, parameter, self.mesh)
            arrays[path] = jax.block_until_ready(stack(parts)) if parameter.stacked else parts[0]
        self.layout = layout
        self._hold(arrays)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        convention: Convention | None = None,
        dtype: Any = None,
        mesh: Mesh | None = None,
        layout: Layout = "unrolled",
        checkpointing: Checkpointing = "none",
        on_progress: OnProgress | None = None,
    ) -> Self:
        """The model of a Hugging Face checkpoint, read straight into sharded arrays.

        Args:
            path_or_hub_id: a folder, or ``"organisation/name"`` on the hub.
            convention: what the weights were trained with; None is what config.json says, else
                ``"meta"``. LLaVA-CoT's released weights are ``"transformers_4"`` and do not say so.
            dtype: float32, float16 or bfloat16; None is the checkpoint's own.
            mesh: as for the class. Each process reads the bytes of its own shards alone.
            layout: as for the class.
            checkpointing: as for the class.
            on_progress: called with the bytes that this process has read and is to read.

        Raises:
            UserError: no such checkpoint, one of another model, tensors that are missing,
                unexpected, doubled or of another shape, or a mesh that does not divide the model.
        """
        folder = resolve_checkpoint(path_or_hub_id)
        config = read_config(folder, convention)
        arrays = load_arrays(folder, config, layout=layout, dtype=dtype, mesh=mesh, on_progress=on_progress)
        return cls.from_arrays(config, arrays, layout=layout, mesh=mesh, checkpointing=checkpointing)

    def save_pretrained(self, path: str | Path) -> None:
        """Write a checkpoint that transformers loads: safetensors of at most 5 GB a file, their index, config.json.

        Under several processes all must call this; the first writes, one gathered tensor at a time.

        Raises:
            UserError: the weights are in int8, or the folder is not empty, or cannot be written; nothing
                half-written stays there.
        """
        if self.is_quantized:
            raise UserError("int8 weights are not written: save the model before quantize()")
        save_arrays(flatten(self.params), self.config, as_path(path))

    @classmethod
    def from_arrays(
        cls,
        config: MllamaConfig,
        arrays: dict[str, jax.Array],
        *,
        layout: Layout,
        mesh: Mesh | None = None,
        checkpointing: Checkpointing = "none",
    ) -> Self:
        """A model of weights that are there: ``arrays`` by the paths of ``parameters(config, layout)``."""
        return cls(config, arrays=arrays, layout=layout, mesh=mesh, checkpointing=checkpointing)

    def _hold(self, arrays: dict[str, jax.Array]) -> None:
        """Take ``arrays``, by their paths, as this module's weights."""
        tree = nest(arrays)
        for name in PARTS:
            setattr(self, name, _as_params(tree.get(name, {})))


def _as_arrays(node: Any) -> Any:
    return {k: _as_arrays(v) for k, v in node.items()} if isinstance(node, nnx.Dict) else node.get_value()


def _as_params(node: Any) -> Any:
    return nnx.Dict({k: _as_params(v) for k, v in node.items()}) if isinstance(node, dict) else nnx.Param(node)


def _placed(function: Callable[..., Any], parameter: Parameter, mesh: Mesh | None) -> Callable[..., Any]:
    """``function`` compiled to leave its results where ``mesh`` holds ``parameter``."""
    return jax.jit(function, out_shardings=None if mesh is None else parameter_sharding(parameter, mesh))


def _stack(parts: list[jax.Array]) -> jax.Array:
    return jnp.stack(parts)


def _unstack(stack: jax.Array) -> list[jax.Array]:
    return list(jnp.unstack(stack))


def fresh(parameter: Parameter, key: jax.Array, dtype: Any, mesh: Mesh | None) -> jax.Array:
    """A fresh array of ``dtype``, as ``mesh`` holds ``parameter``.

    A tensor's draw is keyed by its name, so it is the same in either layout.

    Raises:
        UserError: the mesh does not divide it.
    """
    ids = np.array([zlib.crc32(tensor.encode()) for tensor in parameter.tensors], np.uint32)
    sharding = None if mesh is None else parameter_sharding(parameter, mesh)
    tensors = _drawing(parameter.tensor_shape, parameter.initializer, parameter.std, dtype, parameter.stacked, sharding)
    return tensors(key, ids)


@functools.cache  # a model has some thirty distinct kinds of tensor: one compilation each
def _drawing(
    shape: tuple[int, ...], initializer: Initializer, std: float, dtype: Any, stacked: bool, sharding: Any
) -> Callable[[jax.Array, np.ndarray], jax.Array]:
    def draw(key: jax.Array, ids: jax.Array) -> jax.Array:
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)
        tensors = jax.vmap(lambda key: initialize(shape, initializer, std, key, dtype))(keys)
        return tensors if stacked else tensors[0]

    return jax.jit(draw, out_shardings=sharding)


def image_states(
    params: Weights, config: MllamaConfig, inputs: Mapping[str, jax.Array], checkpointing: Checkpointing = "none"
) -> jax.Array:
    """Projected image tokens of each row, [batch, image_tokens, hidden]; ``inputs`` as for ``hidden_states``."""
    features = _features(params, config, inputs, checkpointing)
    return text_decoder.project(params["multi_modal_projector"], features)


def logits(params: Weights, hidden: jax.Array) -> jax.Array:
    """Logits, float32 [..., vocabulary], of hidden states [..., hidden]."""
    head = params["language_model"]["lm_head"]
    if "scale" in head:
        return scaled_product(hidden, head)
    return jnp.einsum("...h,vh->...v", hidden, head["weight"], preferred_element_type=jnp.float32)


def _features(
    params: Weights, config: MllamaConfig, inputs: Mapping[str, jax.Array], checkpointing: Checkpointing
) -> jax.Array:
    """[batch, images, tiles, patches + 1, features]: the tower sees all images of a batch side by side."""
    pixels, ids, used = (inputs.get(n) for n in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"))
    assert pixels is not None and ids is not None
    if used is None:  # the image processor marks the first tile of a missing image too
        used = vision_tower.tiles_in_use(config.vision, ids).at[..., 0].set(True)
    features = vision_tower.encode(
        params["vision_model"],
        config.vision,
        pixels.reshape(-1, *pixels.shape[2:]),
        ids.reshape(-1),
        used.reshape(-1, used.shape[-1]),
        taps=config.vision_taps,
        checkpointing=checkpointing,
    )
    return features.reshape(*ids.shape, *features.shape[1:])


def hidden_states(
    params: Weights,
    config: MllamaConfig,
    inputs: Mapping[str, jax.Array],
    checkpointing: Checkpointing = "none",
) -> jax.Array:
    """What lm_head sees of every token, [batch, tokens, hidden]; ``inputs`` by the names of ``Mllama``'s arguments."""
    ids = inputs["input_ids"]
    present = inputs.get("attention_mask", jnp.ones_like(ids)).astype(bool)
    positions = jnp.maximum(jnp.cumsum(present, axis=-1) - 1, 0)
    sight = None
    if "pixel_values" in inputs:
        states = image_states(params, config, inputs, checkpointing)
        sight = text_decoder.see(config, inputs["cross_attention_mask"], states)
    decoder = params["language_model"]["model"]
    return text_decoder.decode(decoder, config, ids, positions, causal(present), sight, checkpointing)


def _all_logits(
    params: Weights, config: MllamaConfig, inputs: Mapping[str, jax.Array], checkpointing: Checkpointing
) -> jax.Array:
    hidden = hidden_states(params, config, inputs, checkpointing)
    return constrain(logits(params, hidden), "batch", None, "vocab")


@functools.partial(jax.jit, static_argnames=("function", "config", "mesh", "checkpointing"))
def _compiled(
    params: Weights,
    inputs: Mapping[str, jax.Array],
    *,
    function: Callable[..., jax.Array],
    config: MllamaConfig,
    mesh: Mesh | None,
    checkpointing: Checkpointing,
) -> jax.Array:
    with on_mesh(mesh):
        return function(params, config, inputs, checkpointing)


def check_inputs(config: MllamaConfig, inputs: Mapping[str, ArrayLike | None]) -> None:
    """Whether these arrays can go through a model of ``config`` together.

    Raises:
        UserError: one is missing beside another, or has another shape than it must have.
    """
    given = {name: tuple(x.shape) for name, x in inputs.items() if x is not None}
    if len(given["input_ids"]) != 2:
        raise UserError(f"input_ids must be [batch, tokens], got shape {list(given['input_ids'])}")
    batch, tokens = given["input_ids"]
    if tokens > config.text.max_position_embeddings:
        raise UserError(f"{tokens} tokens are more than the context of {config.text.max_position_embeddings}")
    expected: dict[str, tuple[int, ...]] = {"input_ids": (batch, tokens), "attention_mask": (batch, tokens)}
    if "pixel_values" in given:
        images = given["pixel_values"][1] if len(given["pixel_values"]) > 1 else 0
        tower = config.vision
        tiles, size = tower.max_num_tiles, tower.image_size
        expected |= {
            "pixel_values": (batch, images, tiles, tower.num_channels, size, size),
            "aspect_ratio_ids": (batch, images),
            "aspect_ratio_mask": (batch, images, tiles),
            "cross_attention_mask": (batch, tokens, images, tiles),
        }
        for name in ("aspect_ratio_ids", "cross_attention_mask"):
            if name not in given:
                raise UserError(f"pixel_values came without {name}: pass all that the image processor returns")
    for name, shape in given.items():
        if name in expected and shape != expected[name]:
            raise UserError(f"{name} must have shape {list(expected[name])}, got {list(shape)}")


def _device_ready(x: ArrayLike) -> ArrayLike:
    """``x`` in the dtype that the model takes: uint8 as it is, other integers int32, floats float32."""
    kind = jnp.uint8 if x.dtype == np.uint8 else jnp.float32 if jnp.issubdtype(x.dtype, np.floating) else jnp.int32
    return x.astype(kind)
