"""Low-rank adapters (LoRA; Hu et al., arXiv 2106.09685) beside the weights of a model: their names and declarations."""

from llava_cot_jax.model.parameters import TEXT_LAYERS, Parameter, Params


def adapter_paths(path: str) -> tuple[str, str]:
    """Return the paths of lora_a and lora_b of the weight at ``path``."""
    projection = path.removesuffix("weight")
    return projection + "lora_a", projection + "lora_b"


def declare_adapter(weight: Parameter, rank: int) -> tuple[Parameter, Parameter]:
    """Return the declarations of lora_a [..., rank, in] and lora_b [..., out, rank] of a weight [..., out, in]."""
    *layers, n_out, n_in = weight.shape
    *layers_axis, out_axis, in_axis = weight.axes

    def tensors(name: str) -> tuple[str, ...]:
        return tuple(tensor.removesuffix("weight") + name for tensor in weight.tensors)

    a_shape, a_axes = (*layers, rank, n_in), (*layers_axis, None, in_axis)
    b_shape, b_axes = (*layers, n_out, rank), (*layers_axis, out_axis, None)
    return (
        Parameter(a_shape, a_axes, "normal", n_in**-0.5, tensors("lora_a"), weight.stacked),
        Parameter(b_shape, b_axes, "zeros", 0.0, tensors("lora_b"), weight.stacked),
    )


def reads_text(path: str) -> bool:
    """Whether the projection at ``path`` is applied to text tokens: one of a text layer, but for an image's keys and
    values."""
    return path.startswith(TEXT_LAYERS) and not path.endswith(("cross_attn.k_proj.weight", "cross_attn.v_proj.weight"))


def with_adapter(params: Params, adapter: Params) -> Params:
    """Return parameters with the matrices of an adapter beside the weights that it is for."""
    beside = {name: node for name, node in adapter.items() if name not in params}
    return {name: with_adapter(p, adapter[name]) if name in adapter else p for name, p in params.items()} | beside
