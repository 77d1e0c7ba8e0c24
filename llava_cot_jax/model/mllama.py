"""Llama-3.2-Vision as a Flax module, and the pure functions of its parameters that it calls."""

import functools
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jaxtyping import Array, Float

from llava_cot_jax.checks import check_bool, check_choice, check_instance
from llava_cot_jax.errors import UserError
from llava_cot_jax.model import text_decoder, vision_tower
from llava_cot_jax.model.attention import causal_mask
from llava_cot_jax.model.checkpoint.adapter_settings import read_adapter_settings
from llava_cot_jax.model.checkpoint.folder import read_config, resolve_checkpoint
from llava_cot_jax.model.checkpoint.generation_settings import ignored_settings
from llava_cot_jax.model.checkpoint.reading import check_weight_dtype
from llava_cot_jax.model.checkpoint.sharded_loading import load_params, load_verifier_adapter
from llava_cot_jax.model.checkpoint.sharded_saving import save_params
from llava_cot_jax.model.choices import RematPolicy
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.convention import Convention
from llava_cot_jax.model.fresh_parameters import init_params
from llava_cot_jax.model.image_context import ImageContext, cross_attention_mask
from llava_cot_jax.model.inputs import ArrayLike, as_arrays, check_inputs, check_tiles
from llava_cot_jax.model.layers import int8_linear, product
from llava_cot_jax.model.low_rank import with_adapter
from llava_cot_jax.model.parameters import Parameter, ParamLayout, Params, parameters
from llava_cot_jax.model.quantization import quantize_params
from llava_cot_jax.model.sharding import (
    check_mesh,
    check_surroundings,
    constrain,
    parameter_sharding,
    use_mesh,
    without_surroundings,
)
from llava_cot_jax.paths import as_path
from llava_cot_jax.progress import OnProgress

_LOG = logging.getLogger(__name__)

SUBMODELS = ("vision_model", "multi_modal_projector", "language_model")


class Mllama(nnx.Module):
    """Llama-3.2-Vision: a vision tower, and a language model whose cross-attention layers attend to its features.

    The parameters are ``nnx.Param``s named as in the published checkpoint, e.g.
    ``model.language_model.model.layers["3"].cross_attn.q_proj.weight`` [out, in].

    Args:
        config: Sizes and convention.
        rngs: Source of initial parameters (the stream ``params``), which are the same in either layout and on any
            mesh. None where ``arrays`` are given.
        layout: ``"unrolled"``, one array per layer, for decoding; ``"stacked"``, scanned over, for training.
        dtype: Dtype of the parameters, and so of the activations.
        mesh: Devices that hold the parameters (``sharding.make_mesh``); None is the default device.
        remat: What the forward pass of a layer saves for the backward pass.
        arrays: Existing parameters by their paths in ``parameters(config, layout)``, in place of initial ones.

    Raises:
        UserError: The mesh does not divide the model, or an argument is not of its type.
    """

    vision_model: Any
    multi_modal_projector: Any
    language_model: Any

    def __init__(
        self,
        config: MllamaConfig,
        *,
        rngs: nnx.Rngs | None = None,
        layout: ParamLayout = "unrolled",
        dtype: Any = jnp.float32,
        mesh: Mesh | None = None,
        remat: RematPolicy = "none",
        arrays: dict[str, jax.Array] | None = None,
    ) -> None:
        _check_settings(config, layout, remat)
        if mesh is not None:
            check_mesh(config, mesh)
        self.config = config
        self.layout: ParamLayout = layout
        self.mesh = mesh
        self.remat: RematPolicy = remat
        self._verifier_adapter: Any = None
        if arrays is None:
            if rngs is None:
                raise UserError("give rngs, from which initial parameters are drawn, or arrays")
            check_instance("rngs", rngs, nnx.Rngs, "give flax.nnx.Rngs(0), or with another seed")
            arrays = init_params(parameters(config, layout), rngs.params(), check_weight_dtype(dtype), mesh)
        check_instance("arrays", arrays, dict, "give the parameters by their paths")
        self._set_params(arrays)

    def __call__(
        self,
        input_ids: ArrayLike,
        *,
        pixel_values: ArrayLike | None = None,
        aspect_ratio_ids: ArrayLike | None = None,
        aspect_ratio_mask: ArrayLike | None = None,
        cross_attention_mask: ArrayLike | None = None,
        attention_mask: ArrayLike | None = None,
        output_hidden_states: bool = False,
    ) -> Any:
        """Return the logits of the token after every token. The arguments are what a transformers processor returns.

        Args:
            input_ids: int [batch, tokens].
            pixel_values: Tiles [batch, images, tiles, channels, size, size], normalised float or uint8; None for a
                batch without images.
            aspect_ratio_ids: int [batch, images]; 0 where a sequence has fewer images.
            aspect_ratio_mask: 0 or 1 [batch, images, tiles], which tiles are used; by default what the ids imply.
            cross_attention_mask: 0 or 1 [batch, tokens, images, tiles], which tiles a token sees.
            attention_mask: 0 or 1 [batch, tokens]; 0 is padding, on either side.
            output_hidden_states: Whether the text layers' hidden states are returned too.

        Returns:
            Logits, float32 [batch, tokens, vocab]. They have no meaning at padding. There is none for ``<|image|>``,
            whose id ``config.image_token_index`` is the size of the vocabulary: as a label it is out of range, which
            makes a loss that gathers NaN. ``causal_lm_loss`` leaves it out.

            With ``output_hidden_states``, a pair of the logits and a tuple of the hidden states, each
            [batch, tokens, hidden], as transformers gives them: the input of each layer in order, and the state after
            the final norm, of which the logits are made. Layers that a batch without images skips have theirs too.

        Raises:
            UserError: There are pixel values without the ids or the cross-attention mask that belong to them, or shapes
                contradict the configuration or each other, or an id is beyond its table. Ids that are being traced
                have no values to check; there, one beyond the table acts as the last.
        """
        inputs = as_arrays(
            {
                "input_ids": input_ids,
                "pixel_values": pixel_values,
                "aspect_ratio_ids": aspect_ratio_ids,
                "aspect_ratio_mask": aspect_ratio_mask,
                "cross_attention_mask": cross_attention_mask,
                "attention_mask": attention_mask,
            }
        )
        check_inputs(self.config, inputs)
        check_bool("output_hidden_states", output_hidden_states)
        return self._run(_logits_and_states if output_hidden_states else _all_logits, inputs)

    def vision_features(
        self, pixel_values: ArrayLike, aspect_ratio_ids: ArrayLike, aspect_ratio_mask: ArrayLike | None = None
    ) -> jax.Array:
        """Return features of images before the projector, [batch, images, tiles, patches + 1, features].

        The arguments are those of a call of the model.

        Raises:
            UserError: An array has a wrong shape, or an aspect ratio id is beyond those of the configuration.
        """
        images = {
            "pixel_values": pixel_values,
            "aspect_ratio_ids": aspect_ratio_ids,
            "aspect_ratio_mask": aspect_ratio_mask,
        }
        arrays = as_arrays(images)
        check_tiles(self.config, arrays)
        return self._run(_features, arrays)

    def _run(self, function: Callable[..., Any], inputs: Mapping[str, ArrayLike]) -> Any:
        """Compile and call ``function`` with the parameters and ``inputs``."""
        params = self._own_params
        check_surroundings(self.mesh, params, inputs)
        given = {name: _to_model_dtype(x) for name, x in inputs.items()}
        static = {"config": self.config, "mesh": self.mesh, "remat": self.remat}
        with without_surroundings():
            return _run_compiled(params, given, function=function, **static)

    @property
    def params(self) -> Params:
        """Parameters as nested dicts of arrays, which the pure functions take.

        Those of the verifier's adapter, if there is one, are among them. Prefill and sampling leave them aside, but for
        the tokens of the verifier's question.
        """
        adapter = self._verifier_adapter
        return self._own_params if adapter is None else with_adapter(self._own_params, _as_arrays(adapter))

    @property
    def _own_params(self) -> Params:
        """Parameters without the verifier's adapter."""
        # Not through nnx.state, which leaves reference cycles that keep every array until a garbage collection.
        return {name: _as_arrays(getattr(self, name)) for name in SUBMODELS}

    @property
    def dtype(self) -> Any:
        """Dtype of the parameters, and so of the activations."""
        return self.language_model.model.norm.weight.dtype

    @property
    def is_quantized(self) -> bool:
        """Whether the text layers' projections are in int8."""
        return "scale" in self.language_model.lm_head

    def quantize(self) -> None:
        """Convert the text layers' projections and lm_head to int8 in place, for decoding (see ``quantization``).

        Raises:
            UserError: The layers are stacked.
        """
        if self.layout != "unrolled":
            raise UserError("stacked weights are for training: call to_layout('unrolled') before quantize()")
        if not self.is_quantized:
            flat = flatten_dict(self._own_params, sep=".")
            self._set_params({})  # ``flat`` alone keeps the arrays now
            with without_surroundings() if self.mesh is None else jax.set_mesh(self.mesh):
                quantized = quantize_params(flat)
            self._set_params(quantized)

    def to_layout(self, layout: ParamLayout) -> None:
        """Change the layout in place, one parameter at a time, so that there are never two copies of the model.

        Raises:
            UserError: The parameters are in int8, or there is no such layout.
        """
        check_choice("layout", layout, get_args(ParamLayout))
        if layout == self.layout:
            return
        if self.is_quantized:
            raise UserError("int8 weights are for decoding: load the model anew to train it")
        if self._verifier_adapter is not None:
            raise UserError("a verifier's adapter is for decoding: load the model anew without it to train it")
        old, new = parameters(self.config, self.layout), parameters(self.config, layout)
        flat = flatten_dict(self.params, sep=".")
        self._set_params({})  # ``flat`` alone keeps the arrays now, so that each is freed once it is converted
        tensors: dict[str, jax.Array] = {}
        for path, parameter in old.items():
            if parameter.stacked:
                layers = _jit_to_mesh(_unstack, new[parameter.tensors[0]], self.mesh)(flat.pop(path))
                tensors |= zip(parameter.tensors, jax.block_until_ready(layers), strict=True)
            else:
                tensors[path] = flat.pop(path)
        arrays: dict[str, jax.Array] = {}
        for path, parameter in new.items():
            layers = [tensors.pop(tensor) for tensor in parameter.tensors]
            stack = _jit_to_mesh(_stack, parameter, self.mesh)
            arrays[path] = jax.block_until_ready(stack(layers)) if parameter.stacked else layers[0]
        self.layout = layout
        self._set_params(arrays)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        config: MllamaConfig | None = None,
        convention: Convention | None = None,
        dtype: Any = None,
        mesh: Mesh | None = None,
        layout: ParamLayout = "unrolled",
        remat: RematPolicy = "none",
        adapter: str | Path | None = None,
        verifier_adapter: str | Path | None = None,
        on_progress: OnProgress | None = None,
    ) -> Self:
        """Load the model of a Hugging Face checkpoint, read straight into sharded arrays.

        Args:
            path_or_hub_id: Folder, or ``"organisation/name"`` on the hub.
            config: Configuration that ``folder.read_config`` read from the checkpoint. None reads it.
            convention: Convention that the model was trained with, if ``config`` is None. None takes config.json's, and
                where it states none, what ``convention.find_convention`` assumes, with a warning. LLaVA-CoT's released
                weights are ``"transformers_4"`` and do not state it.
            dtype: float32, float16 or bfloat16; None is the checkpoint's own.
            mesh: Devices that hold the parameters. Each process reads only the bytes of its own shards.
            layout: Layout of the parameters.
            remat: What the forward pass of a layer saves for the backward pass.
            adapter: LoRA adapter in the form of the PEFT library to merge into the weights: its folder, or its id on
                the hub. One that was trained in transformers 5 needs ``convention="transformers_5"``.
            verifier_adapter: Adapter of a run with ``lora.tokens`` probe, in the same form. It acts on the tokens of
                the verifier's question alone, so that answers stay as they are. It is for the unrolled layout.
            on_progress: Called with the number of bytes that this process has read, and is to read.

        Raises:
            UserError: There is no such checkpoint, or it is of another model, or tensors are missing, unexpected,
                doubled, not finite or of another shape, or the adapter does not fit it, or the mesh does not divide
                the model, or an argument is not of its type.
        """
        merged = None if adapter is None else read_adapter_settings(adapter)
        verifier = None if verifier_adapter is None else read_adapter_settings(verifier_adapter, for_verifier=True)
        if verifier and layout != "unrolled":
            raise UserError("a verifier's adapter is for decoding: load it with the layout 'unrolled'")
        folder = resolve_checkpoint(path_or_hub_id)
        config = read_config(folder, convention) if config is None else config
        _check_settings(config, layout, remat)  # before the weights are read
        if ignored := ignored_settings(folder):
            stated = ", ".join(f"{name} = {json.dumps(value)}" for name, value in ignored.items())
            _LOG.warning(f"{folder} asks for settings of generation that are not honoured here: {stated}")
        arrays = load_params(
            folder, config, layout=layout, dtype=dtype, mesh=mesh, adapter=merged, on_progress=on_progress
        )
        model = cls.from_arrays(config, arrays, layout=layout, mesh=mesh, remat=remat)
        if verifier:
            matrices = unflatten_dict(load_verifier_adapter(verifier, config, model.dtype, mesh), sep=".")
            model._verifier_adapter = nnx.data(_as_params(matrices))
        return model

    def save_pretrained(self, path: str | Path) -> None:
        """Write a checkpoint that transformers loads: safetensors of at most 5 GB a file, their index, config.json.

        An adapter of the verifier is not part of it.

        Where there are several processes, all must call this. The first writes, one gathered tensor at a time.

        Raises:
            UserError: The parameters are in int8, or the folder is not empty or cannot be written. No incomplete file
                is left there.
        """
        if self.is_quantized:
            raise UserError("int8 weights are not written: save the model before quantize()")
        save_params(flatten_dict(self._own_params, sep="."), self.config, as_path(path))

    @classmethod
    def from_arrays(
        cls,
        config: MllamaConfig,
        arrays: dict[str, jax.Array],
        *,
        layout: ParamLayout,
        mesh: Mesh | None = None,
        remat: RematPolicy = "none",
    ) -> Self:
        """Return a model of existing parameters, by their paths in ``parameters(config, layout)``."""
        return cls(config, arrays=arrays, layout=layout, mesh=mesh, remat=remat)

    def _set_params(self, arrays: dict[str, jax.Array]) -> None:
        """Set the parameters of this module, by their paths."""
        tree = unflatten_dict(arrays, sep=".")
        for name in SUBMODELS:
            setattr(self, name, _as_params(tree.get(name, {})))


def _as_arrays(node: Any) -> Any:
    return {k: _as_arrays(v) for k, v in node.items()} if isinstance(node, nnx.Dict) else node.get_value()


def _as_params(node: Any) -> Any:
    return nnx.Dict({k: _as_params(v) for k, v in node.items()}) if isinstance(node, dict) else nnx.Param(node)


def _jit_to_mesh(function: Callable[..., Any], parameter: Parameter, mesh: Mesh | None) -> Callable[..., Any]:
    """Compile ``function`` so that its results are laid out as ``mesh`` holds ``parameter``."""

    def on_mesh(given: Any) -> Any:
        with use_mesh(mesh):
            return function(given)

    compiled = jax.jit(on_mesh, out_shardings=None if mesh is None else parameter_sharding(parameter, mesh))

    def call(given: Any) -> Any:
        with without_surroundings():
            return compiled(given)

    return call


def _stack(layers: list[jax.Array]) -> jax.Array:
    return jnp.stack(layers)


def _unstack(stack: jax.Array) -> list[jax.Array]:
    return list(jnp.unstack(stack))


def cross_attention_states(
    params: Params, config: MllamaConfig, inputs: Mapping[str, jax.Array], remat: RematPolicy = "none"
) -> Float[Array, "batch image_tokens hidden"]:
    """Return the projected image tokens of each sequence; ``inputs`` are those of ``hidden_states``."""
    features = _features(params, config, inputs, remat)
    return text_decoder.project(params["multi_modal_projector"], features)


@jax.named_scope("lm_head")
def compute_logits(params: Params, hidden: Float[Array, "*batch hidden"]) -> Float[Array, "*batch vocab"]:
    """Return the float32 logits of hidden states."""
    head = params["language_model"]["lm_head"]
    if "scale" in head:
        return int8_linear(hidden, head)
    return product(hidden, head["weight"], jnp.float32)


def _features(
    params: Params, config: MllamaConfig, inputs: Mapping[str, jax.Array], remat: RematPolicy
) -> Float[Array, "batch images tiles tile_tokens features"]:
    """Return the features of all images of a batch, which go through the vision tower side by side."""
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
        remat=remat,
    )
    return features.reshape(*ids.shape, *features.shape[1:])


def hidden_states(
    params: Params,
    config: MllamaConfig,
    inputs: Mapping[str, jax.Array],
    remat: RematPolicy = "none",
    adapted: text_decoder.AdaptedTokens = True,
) -> Float[Array, "batch tokens hidden"]:
    """Return the hidden state of every token, ready for lm_head.

    Args:
        params: Parameters of the model, in either layout.
        config: Configuration of the model.
        inputs: Arrays by the names of the arguments of ``Mllama``.
        remat: What the forward pass of a layer saves for the backward pass.
        adapted: Text tokens that the adapters of text layers act on, where the parameters have some.
    """
    return _forward(params, config, inputs, remat, adapted=adapted)[0]


def _forward(
    params: Params,
    config: MllamaConfig,
    inputs: Mapping[str, jax.Array],
    remat: RematPolicy,
    output_hidden_states: bool = False,
    adapted: text_decoder.AdaptedTokens = True,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Return the last hidden states, and those before each text layer if they are wanted."""
    ids = inputs["input_ids"]
    present = inputs.get("attention_mask", jnp.ones_like(ids)).astype(bool)
    positions = jnp.maximum(jnp.cumsum(present, axis=-1) - 1, 0)
    images = None
    if "pixel_values" in inputs:
        states = cross_attention_states(params, config, inputs, remat)
        images = ImageContext(*cross_attention_mask(config, inputs["cross_attention_mask"]), states=states)
    text_params = params["language_model"]["model"]
    mask = causal_mask(present)
    forward = functools.partial(text_decoder.forward, output_hidden_states=output_hidden_states, adapted=adapted)
    return forward(text_params, config, ids, positions, mask, images, remat)


def _all_logits(params: Params, config: MllamaConfig, inputs: Mapping[str, jax.Array], remat: RematPolicy) -> jax.Array:
    hidden = hidden_states(params, config, inputs, remat)
    return constrain(compute_logits(params, hidden), "batch", None, "vocab")


def _logits_and_states(
    params: Params, config: MllamaConfig, inputs: Mapping[str, jax.Array], remat: RematPolicy
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    hidden, before = _forward(params, config, inputs, remat, output_hidden_states=True)
    return constrain(compute_logits(params, hidden), "batch", None, "vocab"), (*before, hidden)


@functools.partial(jax.jit, static_argnames=("function", "config", "mesh", "remat"))
def _run_compiled(
    params: Params,
    inputs: Mapping[str, jax.Array],
    *,
    function: Callable[..., Any],
    config: MllamaConfig,
    mesh: Mesh | None,
    remat: RematPolicy,
) -> Any:
    with use_mesh(mesh):
        return function(params, config, inputs, remat)


def _check_settings(config: Any, layout: Any, remat: Any) -> None:
    """Check the settings of a model that do not depend on its parameters."""
    check_instance("config", config, MllamaConfig, "give an MllamaConfig, or use Mllama.from_pretrained")
    check_choice("layout", layout, get_args(ParamLayout))
    check_choice("remat", remat, get_args(RematPolicy))


def _to_model_dtype(x: ArrayLike) -> ArrayLike:
    """Cast to the dtype that the model takes: uint8 stays, other integers become int32, floats float32."""
    kind = jnp.uint8 if x.dtype == np.uint8 else jnp.float32 if jnp.issubdtype(x.dtype, np.floating) else jnp.int32
    return x.astype(kind)
