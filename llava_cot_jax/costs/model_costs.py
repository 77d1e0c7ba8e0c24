"""FLOPs and bytes of the model's work, shared by MFU, ``bench`` and ``plan``.

FLOPs are those of matrix products, two for a multiplication and an addition, from the model's own
arithmetic. Norms, rotary embeddings and softmax are left out, as in every published MFU. There are two
counts of the same pass:

* the useful one, for MFU: a query attends to the keys that a causal mask shows it, and padding tokens
  cost nothing;
* ``as_computed``: what ``blockwise_attention`` really multiplies: masked scores and padding too, and in the backward
  pass the scores again, but not the small products that make its masks.

Both count all tiles of an image, used or not, and the vision tower's own padding (1608 tokens for a
tile of 1601), because the features of the other tokens depend on them. Neither counts what the backward
pass recomputes because activation remat does not save it.
"""

import math
from collections.abc import Collection, Iterable
from typing import Any, Literal

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxprs_in_params

from llava_cot_jax.model.blockwise_attention import query_blocks
from llava_cot_jax.model.choices import RematPolicy
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.parameters import parameters
from llava_cot_jax.model.text_decoder import IMAGE_TOKEN_MULTIPLE
from llava_cot_jax.model.vision_tower import TOKEN_MULTIPLE
from llava_cot_jax.rounding import round_up

ModelPart = Literal["tower", "projector", "embedding", "self", "cross", "head"]
"""Part of the model that is trained or frozen as a whole. ``self`` and ``cross`` are the two kinds of text layers."""

MODEL_PARTS: tuple[ModelPart, ...] = ("tower", "projector", "embedding", "self", "cross", "head")


def part_of(config: MllamaConfig, path: str) -> ModelPart:
    """Return the part that a parameter belongs to, from its path in either layout. The last norm counts as ``self``."""
    room, *name = path.split(".")
    if room == "vision_model":
        return "tower"
    if room == "multi_modal_projector":
        return "projector"
    match name:
        case ["model", "layers", index, *_]:  # layers that are stacked together are all of one kind
            return "cross" if config.text.is_cross[int(index)] else "self"
        case ["model", "embed_tokens", *_]:
            return "embedding"
        case ["lm_head", *_]:
            return "head"
    return "self"


def parts_of(config: MllamaConfig, paths: Iterable[str]) -> frozenset[ModelPart]:
    """Return the parts that parameters belong to, as the arguments ``trained`` and ``adapted`` take them.

    A part counts as trained as a whole if a single parameter of it is trained, and as adapted in all its
    projections if a single one has an adapter.
    """
    return frozenset(part_of(config, path) for path in paths)


def parameter_counts(config: MllamaConfig) -> dict[ModelPart, int]:
    """Number of parameters in each part of the model."""
    counts: dict[ModelPart, int] = dict.fromkeys(MODEL_PARTS, 0)
    for path, parameter in parameters(config, "unrolled").items():
        counts[part_of(config, path)] += math.prod(parameter.shape)
    return counts


def parameters_per_step(config: MllamaConfig, images: bool) -> int:
    """Number of parameters that one decoding step reads.

    These are the text layers and lm_head, without the key and value projections of the cross layers,
    whose results are cached. The few rows of the embedding that a step reads are left out.
    """
    read: set[ModelPart] = {"self", "cross", "head"} if images else {"self", "head"}
    cached = ("cross_attn.k_proj.weight", "cross_attn.v_proj.weight", "cross_attn.k_norm.weight")
    table = parameters(config, "unrolled")
    return sum(
        math.prod(p.shape) for path, p in table.items() if part_of(config, path) in read and not path.endswith(cached)
    )


def kv_cache_values_per_token(config: MllamaConfig) -> tuple[int, int]:
    """Number of values that the KV caches of all layers hold for one text token, and for one image token."""
    cross = sum(config.text.is_cross)
    return (config.text.num_hidden_layers - cross) * _key_value_width(config), cross * _key_value_width(config)


def bytes_per_step(
    config: MllamaConfig,
    *,
    questions: int,
    candidates: int,
    prefix: int,
    suffix: int,
    image_tokens: int,
    weight_bytes: int = 2,
    cache_bytes: int = 2,
) -> dict[str, int]:
    """Bytes that one decoding step must read. Divided by a chip's HBM bandwidth, they are the least time it can take.

    Candidates that each hold a copy of the prefix count as questions with one candidate each.

    Args:
        config: Configuration of the model.
        questions: Number of questions that are answered together.
        candidates: Number of candidates per question. They share its prefix and its images.
        prefix: Number of tokens that a question's candidates share.
        suffix: Number of further tokens of each candidate.
        image_tokens: Number of cached image tokens per question; 0 is a question without an image.
        weight_bytes: Bytes per weight; 1 is int8.
        cache_bytes: Bytes per value in the KV caches.

    Returns:
        Bytes of the ``weights``, and of the cached ``prefix``, ``suffix`` and ``image``.
    """
    text_token, image_token = kv_cache_values_per_token(config)
    return {
        "weights": parameters_per_step(config, images=image_tokens > 0) * weight_bytes,
        "prefix": questions * prefix * text_token * cache_bytes,
        "suffix": questions * candidates * suffix * text_token * cache_bytes,
        "image": questions * image_tokens * image_token * cache_bytes,
    }


def padded_tower_tokens(config: MllamaConfig) -> int:
    """Number of tokens that the vision tower computes for one image: those of all its tiles, with their padding."""
    return config.vision.max_num_tiles * round_up(config.vision.tile_tokens, TOKEN_MULTIPLE)


def padded_image_tokens(config: MllamaConfig, images: int = 1) -> int:
    """Number of image tokens that the keys and values of ``images`` images have room for, padding included."""
    return round_up(images * config.vision.image_tokens, IMAGE_TOKEN_MULTIPLE)


def vision_flops(
    config: MllamaConfig,
    images: int,
    *,
    trained: Collection[ModelPart] = (),
    adapted: Collection[ModelPart] = (),
    as_computed: bool = False,
) -> dict[str, int]:
    """FLOPs of the images of one sequence, up to the keys and values that the text attends to.

    Args:
        config: Configuration of the model.
        images: Number of images of the sequence.
        trained: Parts whose gradients are computed, as ``training_flops`` explains. Without any, the FLOPs are
            those of a forward pass.
        adapted: Parts that have adapters, as ``training_flops`` explains.
        as_computed: Whether what the module's docstring lists under this name counts too.

    Returns:
        FLOPs of each kind: ``tower``, ``tower attention``, ``projector``, ``cross keys and values``; and
        ``tower scores again`` in the backward pass, 0 unless ``as_computed``.
    """
    tower, text = config.vision, config.text
    width, tiles = tower.hidden_size, images * tower.max_num_tiles
    tokens = padded_tower_tokens(config)  # they attend to those of the same image
    blocks = tower.num_hidden_layers + tower.num_global_layers
    queries = _padded_queries(tokens) if as_computed else tokens
    seen = images * tower.image_tokens
    kept = padded_image_tokens(config, images) if as_computed else seen

    is_trained = "tower" in trained
    has_gradient = is_trained or "tower" in adapted  # whether a gradient must pass back through the blocks
    patches = 2 * tiles * tower.patches * width * tower.num_channels * tower.patch_size**2
    products = 2 * blocks * images * tokens * (4 * width**2 + 2 * width * tower.intermediate_size)
    first = 2 * images * tokens * 3 * width**2  # q, k and v of the first block, before which nothing is adapted
    scores = 4 * blocks * images * queries * tokens * width
    project = 2 * seen * tower.output_size * text.hidden_size
    keys_values = 2 * sum(text.is_cross) * kept * text.hidden_size * _key_value_width(config)
    return {
        "tower": _matmul_flops(patches, is_trained, False)
        + _matmul_flops(first, is_trained, is_trained)
        + _matmul_flops(products - first, is_trained, has_gradient),
        "tower attention": _attention_flops(scores, has_gradient, has_gradient),
        "projector": _matmul_flops(project, "projector" in trained, has_gradient),
        "cross keys and values": _matmul_flops(
            keys_values, "cross" in trained, _image_tokens_have_gradient(trained, adapted)
        ),
        "tower scores again": scores // 2 if as_computed and has_gradient else 0,
    }


def text_flops(
    config: MllamaConfig,
    tokens: int,
    image_tokens: int,
    *,
    prefix: int = 0,
    scored: int | None = None,
    trained: Collection[ModelPart] = (),
    adapted: Collection[ModelPart] = (),
    as_computed: bool = False,
) -> dict[str, int]:
    """FLOPs of the text of one sequence: a training example, the prefill of a prompt, or a decoding step of one token.

    Args:
        config: Configuration of the model.
        tokens: Number of tokens that are computed.
        image_tokens: Number of image tokens that each token attends to; 0 skips the cross layers.
        prefix: Number of cached tokens before them that they attend to as well.
        scored: Number of tokens that go through lm_head; None is all of them.
        trained: Parts whose gradients are computed, as for ``vision_flops``.
        adapted: Parts that have adapters, as for ``vision_flops``.
        as_computed: Whether what the module's docstring lists under this name counts too. Where there is a cache,
            ``prefix`` and ``tokens`` together are then its capacity.

    Returns:
        FLOPs of each kind: ``text``, ``text attention``, ``cross attention``, ``head``; and ``text scores
        again`` in the backward pass, of the attention of either kind, 0 unless ``as_computed``.
    """
    text, hidden = config.text, config.text.hidden_size
    if as_computed:
        queries = _padded_queries(tokens)
        causal, across = queries * (prefix + tokens), queries * round_up(image_tokens, IMAGE_TOKEN_MULTIPLE)
    else:
        causal, across = tokens * prefix + tokens * (tokens + 1) // 2, tokens * image_tokens
    mlp = 3 * hidden * text.intermediate_size

    counts = dict.fromkeys(("text", "text attention", "cross attention", "head", "text scores again"), 0)
    flows = "embedding" in trained  # whether a gradient must pass back through a layer's input
    for cross in text.is_cross:
        if cross and not image_tokens:
            continue
        learns, adapts = (("cross" if cross else "self") in parts for parts in (trained, adapted))
        into_flows = flows or learns  # the norm before the projections is trained with them
        q_flows = into_flows or adapts
        kv_flows = (learns or adapts or _image_tokens_have_gradient(trained, adapted)) if cross else q_flows
        flows = q_flows or kv_flows
        into = hidden**2 if cross else hidden * (hidden + _key_value_width(config))
        counts["text"] += _matmul_flops(2 * tokens * into, learns, into_flows)
        counts["text"] += _matmul_flops(2 * tokens * (hidden**2 + mlp), learns, flows)
        pairs = across if cross else causal
        counts["cross attention" if cross else "text attention"] += _attention_flops(
            4 * pairs * hidden, q_flows, kv_flows
        )
        if as_computed and flows:
            counts["text scores again"] += 2 * pairs * hidden
    scored = tokens if scored is None else scored
    counts["head"] = _matmul_flops(2 * scored * hidden * text.vocab_size, "head" in trained, flows)
    return counts


def training_flops(
    config: MllamaConfig,
    tokens: int,
    images: int,
    *,
    scored: int | None = None,
    trained: Collection[ModelPart] = MODEL_PARTS,
    adapted: Collection[ModelPart] = (),
    as_computed: bool = False,
) -> dict[str, int]:
    """FLOPs of a training step for one example, forward and backward. Those of a batch are the sum over its examples.

    A matrix product costs its forward FLOPs once more where its weights are trained, and once more where
    a gradient must pass back through its input, that is, where anything before it is trained. So a
    trained part costs three forward passes, apart from the patch embedding (two: pixels need no
    gradient); a frozen vision tower costs one; frozen text between trained parts costs two.

    Gradients pass back through parts that have adapters; their own weights get none unless they are
    trained too. The FLOPs of the adapters themselves are not counted: in the forward pass an adapter takes
    rank (in + out) / (in out) of its projection's FLOPs, in the text layers of the 11B 0.5 to 2 % at rank 16.

    Args:
        config: Configuration of the model.
        tokens: Number of tokens of the example.
        images: Number of images of the example.
        scored: Number of tokens that go through lm_head; None is all of them.
        trained: Parts of the model that are trained, as ``parts_of`` returns them for the trained parameters.
        adapted: Parts of the model that have adapters, as ``parts_of`` returns them for the adapters.
        as_computed: Whether what the module's docstring lists under this name counts too.

    Returns:
        FLOPs of the kinds of ``vision_flops`` and ``text_flops``.
    """
    vision = vision_flops(config, images, trained=trained, adapted=adapted, as_computed=as_computed)
    seen = images * config.vision.image_tokens
    text = text_flops(config, tokens, seen, scored=scored, trained=trained, adapted=adapted, as_computed=as_computed)
    return vision | text


def recomputed_flops(config: MllamaConfig, tokens: int, images: int, *, remat: RematPolicy) -> dict[str, int]:
    """FLOPs that a training step recomputes for one example, where all parts are trained, in plain JAX.

    The logits are always recomputed. With ``dots`` all of attention is recomputed. With ``full`` each layer is, without
    its last product, which no gradient needs unless a gate follows it. The scores that the backward pass of attention
    makes again, whatever is saved, are not among these: ``training_flops`` has them.

    Args:
        config: Configuration of the model.
        tokens: Number of tokens of the example, a multiple of the loss's chunk length.
        images: Number of images of the example.
        remat: Activations of a layer that are saved for the backward pass.

    Returns:
        FLOPs of the kinds of ``training_flops``.
    """
    once = training_flops(config, tokens, images, trained=(), as_computed=True)
    recomputed = dict.fromkeys(once, 0)
    recomputed["head"] = once["head"]
    tower, text = config.vision, config.text
    if remat != "none":
        recomputed |= {kind: once[kind] for kind in ("tower attention", "text attention", "cross attention")}
    if remat == "full":
        last = images * padded_tower_tokens(config) * tower.intermediate_size * tower.hidden_size
        patches = images * tower.max_num_tiles * tower.patches * tower.hidden_size
        outside = 2 * patches * tower.num_channels * tower.patch_size**2
        down = 2 * tokens * text.hidden_size * text.intermediate_size
        recomputed["tower"] = once["tower"] - outside - 2 * tower.num_hidden_layers * last
        recomputed["cross keys and values"] = once["cross keys and values"]
        recomputed["text"] = once["text"] - (text.num_hidden_layers - sum(text.is_cross)) * down
    return recomputed


def _image_tokens_have_gradient(trained: Collection[ModelPart], adapted: Collection[ModelPart]) -> bool:
    """Whether a gradient must pass back through the image tokens that the text attends to."""
    return not {"tower", "projector"}.isdisjoint([*trained, *adapted])


def _key_value_width(config: MllamaConfig) -> int:
    """Number of values in a token's keys and values together, in one text layer."""
    return 2 * config.text.num_key_value_heads * config.text.head_dim


def _padded_queries(n: int) -> int:
    """Number of queries that ``blockwise_attention`` computes for ``n`` queries: some fill up the last block."""
    return math.prod(query_blocks(n))


def _matmul_flops(forward: int, weights: bool, inputs: bool) -> int:
    """FLOPs of a matrix product, with those of the gradients of its weights and of its inputs where they are needed."""
    return forward * (1 + weights + inputs)


def _attention_flops(forward: int, queries: bool, keys_values: bool) -> int:
    """FLOPs of the two matrix products of attention and of their gradients where they are needed.

    The gradients of the attention weights, queries, keys and values take half of ``forward`` each.
    """
    return forward + forward // 2 * ((queries or keys_values) + queries + 2 * keys_values)


def count_flops(jaxpr: ClosedJaxpr | Jaxpr) -> int:
    """FLOPs of the matrix products and convolutions of a traced program. A ``cond`` counts as its costliest branch.

    Raises:
        ValueError: There is a product in a ``while`` loop, whose trip count is unknown, or an opaque kernel.
    """
    return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation: JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name in ("dot_general", "conv_general_dilated"):
        kernel: Any = equation.invars[1].aval
        if name == "dot_general":
            (_, contracted), _ = params["dimension_numbers"]
            summed = math.prod(kernel.shape[axis] for axis in contracted)
        else:
            summed = kernel.size // kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        out: Any = equation.outvars[0].aval
        return 2 * out.size * summed
    if name in ("pallas_call", "shard_map") or name.startswith("dot_product_attention"):
        raise ValueError(f"the FLOPs of a {name} cannot be counted: trace the program with plain attention")
    inner = [count_flops(jaxpr) for jaxpr in jaxprs_in_params(params)]
    if name == "while" and any(inner):
        raise ValueError("the FLOPs of a while loop cannot be counted: how often it runs is unknown")
    if name == "cond":
        return max(inner)
    return sum(inner) * (params["length"] if name == "scan" else 1)
