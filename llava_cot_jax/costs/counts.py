"""What the work costs: the FLOPs and bytes that MFU, bench and plan share.

FLOPs are those of matrix products, two for a multiplication and an addition, from the model's own
arithmetic. Norms, rotations and softmax are left out, as in every published MFU. Two counts of the
same pass differ in what they take for work:

* the useful one, for MFU: a query attends to the keys that a causal mask shows it, and tokens that
  only fill up a shape cost nothing;
* ``as_computed``, what ``attention`` in plain JAX really multiplies: masked scores and fill too.

All tiles of an image are work in both, used or not, and so is the tower's own fill (1608 tokens a
tile of 1601): the features of the others depend on them. What the backward pass computes again, by
activation checkpointing or in ``attention``'s blocks of long queries, is in neither.
"""

import math
from collections.abc import Collection, Iterable
from typing import Any, Literal

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxprs_in_params

from llava_cot_jax.model.choices import Checkpointing
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.layers import QUERY_BLOCK
from llava_cot_jax.model.parameters import parameters
from llava_cot_jax.model.text_decoder import IMAGE_TOKEN_MULTIPLE
from llava_cot_jax.model.vision_tower import TOKEN_MULTIPLE

Part = Literal["tower", "projector", "embedding", "self", "cross", "head"]
"""What is trained or frozen, loaded or not: ``self`` and ``cross`` are the text layers of either kind."""

PARTS: tuple[Part, ...] = ("tower", "projector", "embedding", "self", "cross", "head")


def part_of(config: MllamaConfig, path: str) -> Part:
    """The part that a parameter belongs to, by its path in either layout; the last norm goes with ``self``."""
    room, *name = path.split(".")
    if room == "vision_model":
        return "tower"
    if room == "multi_modal_projector":
        return "projector"
    match name:
        case ["model", "layers", index, *_]:  # a slot of stacked layers is of the kind of the first of them
            return "cross" if config.text.is_cross[int(index)] else "self"
        case ["model", "embed_tokens", *_]:
            return "embedding"
        case ["lm_head", *_]:
            return "head"
    return "self"


def parts_of(config: MllamaConfig, paths: Iterable[str]) -> frozenset[Part]:
    """The parts that parameters belong to: of those a run trains, the ``trained`` of the counts below.

    A part that is trained even in one parameter counts as trained in all. Of the adapters that a run
    trains these are the ``adapted`` ones, and likewise count as if all their projections had one.
    """
    return frozenset(part_of(config, path) for path in paths)


def parameter_counts(config: MllamaConfig) -> dict[Part, int]:
    """Parameters of each part."""
    counts: dict[Part, int] = dict.fromkeys(PARTS, 0)
    for path, parameter in parameters(config, "unrolled").items():
        counts[part_of(config, path)] += math.prod(parameter.shape)
    return counts


def parameters_per_step(config: MllamaConfig, images: bool) -> int:
    """Parameters that one step of decoding reads.

    These are the text layers and lm_head, but not the cross layers' key and value projections,
    whose work is cached; of the embedding a step reads one row a token, which is nothing.
    """
    read: set[Part] = {"self", "cross", "head"} if images else {"self", "head"}
    cached = ("cross_attn.k_proj.weight", "cross_attn.v_proj.weight", "cross_attn.k_norm.weight")
    table = parameters(config, "unrolled")
    return sum(
        math.prod(p.shape) for path, p in table.items() if part_of(config, path) in read and not path.endswith(cached)
    )


def cache_values(config: MllamaConfig) -> tuple[int, int]:
    """Numbers that the caches of all layers hold of one text token, and of one image token."""
    cross = sum(config.text.is_cross)
    return (config.text.num_hidden_layers - cross) * _keys_values(config), cross * _keys_values(config)


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
    """Bytes that one step of decoding must read: divided by a chip's bandwidth, the floor of its time.

    A cache that is copied to each of N candidates is that of N questions with one candidate each.

    Args:
        config: the model's.
        questions: answered at a time.
        candidates: of each question; they share its prefix and its images.
        prefix: tokens that a question's candidates share.
        suffix: tokens that each candidate has of its own.
        image_tokens: of each question, as the cache holds them; 0 is a question without an image.
        weight_bytes: bytes of a weight; 1 is int8.
        cache_bytes: bytes of a number in the caches.

    Returns:
        By what is read: ``weights``, ``prefix``, ``suffix``, ``image``.
    """
    text_token, image_token = cache_values(config)
    return {
        "weights": parameters_per_step(config, images=image_tokens > 0) * weight_bytes,
        "prefix": questions * prefix * text_token * cache_bytes,
        "suffix": questions * candidates * suffix * text_token * cache_bytes,
        "image": questions * image_tokens * image_token * cache_bytes,
    }


def vision_flops(
    config: MllamaConfig,
    images: int,
    *,
    trained: Collection[Part] = (),
    adapted: Collection[Part] = (),
    as_computed: bool = False,
) -> dict[str, int]:
    """FLOPs of the images of one row, up to the keys and values that the text attends to.

    Args:
        config: the model's.
        images: of the row.
        trained: the parts whose gradients are taken, as ``training_flops`` explains; none is a forward pass.
        adapted: the parts that hold adapters, as explained there too.
        as_computed: count fill too, as the module explains.

    Returns:
        By kind: ``tower``, ``tower attention``, ``projector``, ``cross keys and values``.
    """
    tower, text = config.vision, config.text
    width, tiles = tower.hidden_size, images * tower.max_num_tiles
    tokens = tower.max_num_tiles * _filled(tower.tile_tokens, TOKEN_MULTIPLE)  # of an image, which attends to itself
    blocks = tower.num_hidden_layers + tower.num_global_layers
    queries = _queries(tokens) if as_computed else tokens
    seen = images * tower.image_tokens
    kept = _filled(seen, IMAGE_TOKEN_MULTIPLE) if as_computed else seen

    learns = "tower" in trained
    flows = learns or "tower" in adapted  # whether a gradient must pass back through the blocks
    patches = 2 * tiles * tower.patches * width * tower.num_channels * tower.patch_size**2
    products = 2 * blocks * images * tokens * (4 * width**2 + 2 * width * tower.intermediate_size)
    first = 2 * images * tokens * 3 * width**2  # q, k and v of the first block, before which nothing is adapted
    scores = 4 * blocks * images * queries * tokens * width
    project = 2 * seen * tower.output_size * text.hidden_size
    keys_values = 2 * sum(text.is_cross) * kept * text.hidden_size * _keys_values(config)
    return {
        "tower": _product(patches, learns, False)
        + _product(first, learns, learns)
        + _product(products - first, learns, flows),
        "tower attention": _attention(scores, flows, flows),
        "projector": _product(project, "projector" in trained, flows),
        "cross keys and values": _product(keys_values, "cross" in trained, _images_learn(trained, adapted)),
    }


def text_flops(
    config: MllamaConfig,
    tokens: int,
    image_tokens: int,
    *,
    prefix: int = 0,
    scored: int | None = None,
    trained: Collection[Part] = (),
    adapted: Collection[Part] = (),
    as_computed: bool = False,
) -> dict[str, int]:
    """FLOPs of one row's text: a row of training, a prompt's prefill or, of one token, a step of decoding.

    Args:
        config: the model's.
        tokens: of the row.
        image_tokens: that each sees; 0 skips the cross layers.
        prefix: cached tokens before them that they see too.
        scored: tokens that go through lm_head; None is all.
        trained: as for ``vision_flops``.
        adapted: as for ``vision_flops``.
        as_computed: count masked scores and fill too; ``prefix`` and ``tokens`` together are then
            the capacity of the cache, where there is one.

    Returns:
        By kind: ``text``, ``text attention``, ``cross attention``, ``head``.
    """
    text, hidden = config.text, config.text.hidden_size
    if as_computed:
        queries = _queries(tokens)
        causal, across = queries * (prefix + tokens), queries * _filled(image_tokens, IMAGE_TOKEN_MULTIPLE)
    else:
        causal, across = tokens * prefix + tokens * (tokens + 1) // 2, tokens * image_tokens
    mlp = 3 * hidden * text.intermediate_size

    counts = dict.fromkeys(("text", "text attention", "cross attention", "head"), 0)
    flows = "embedding" in trained  # whether a gradient must pass back through what a layer gets
    for cross in text.is_cross:
        if cross and not image_tokens:
            continue
        learns, adapts = (("cross" if cross else "self") in parts for parts in (trained, adapted))
        into_flows = flows or learns  # the norm before the projections is trained with them
        q_flows = into_flows or adapts
        kv_flows = (learns or adapts or _images_learn(trained, adapted)) if cross else q_flows
        flows = q_flows or kv_flows
        into = hidden**2 if cross else hidden * (hidden + _keys_values(config))
        counts["text"] += _product(2 * tokens * into, learns, into_flows)
        counts["text"] += _product(2 * tokens * (hidden**2 + mlp), learns, flows)
        pairs = across if cross else causal
        counts["cross attention" if cross else "text attention"] += _attention(4 * pairs * hidden, q_flows, kv_flows)
    scored = tokens if scored is None else scored
    counts["head"] = _product(2 * scored * hidden * text.vocab_size, "head" in trained, flows)
    return counts


def training_flops(
    config: MllamaConfig,
    tokens: int,
    images: int,
    *,
    scored: int | None = None,
    trained: Collection[Part] = PARTS,
    adapted: Collection[Part] = (),
    as_computed: bool = False,
) -> dict[str, int]:
    """FLOPs of a training step for one row, forward and backward; a batch is the sum of its rows.

    To the forward pass, a product of weights adds as much again where its weights are trained, and
    as much again where a gradient must pass back through its input: where anything is trained
    before it. So all that is trained costs three forward passes, but the patch embedding (two:
    pixels need no gradient); a frozen tower costs one; frozen text between trained parts costs two.

    Parts that hold adapters pass gradients back and, unless they are trained too, take none of their
    weights. The adapters' own products are in no count: forward, one has rank (in + out) / (in out)
    of its projection's FLOPs, in the text layers of the 11B from 0.5 to 2 % at rank 16.

    Args and returns: as for ``vision_flops`` and ``text_flops`` together; ``trained`` is
    ``parts_of`` the trained parameters of the model, ``adapted`` of the adapters.
    """
    vision = vision_flops(config, images, trained=trained, adapted=adapted, as_computed=as_computed)
    seen = images * config.vision.image_tokens
    text = text_flops(config, tokens, seen, scored=scored, trained=trained, adapted=adapted, as_computed=as_computed)
    return vision | text


def recomputed_flops(config: MllamaConfig, tokens: int, images: int, *, checkpointing: Checkpointing) -> dict[str, int]:
    """FLOPs that a training step computes a second time for one row, where all is trained, as computed in plain JAX.

    The logits always are; so are the scores of long queries, which attend in blocks. With ``dots`` so is all of
    attention, whose products are not kept; with ``full`` each layer, but for its last product, which no gradient
    needs unless a gate is behind it.

    Args:
        config: the model's.
        tokens: of the row, as many as a whole number of the loss's chunks has.
        images: of the row.
        checkpointing: what of a layer is saved.

    Returns:
        By the kinds of ``training_flops``.
    """
    once = training_flops(config, tokens, images, trained=(), as_computed=True)
    again = dict.fromkeys(once, 0)
    again["head"] = once["head"]
    tower, text = config.vision, config.text
    queries = {
        "tower attention": tower.max_num_tiles * _filled(tower.tile_tokens, TOKEN_MULTIPLE),
        "text attention": tokens,
        "cross attention": tokens,
    }
    for kind, count in queries.items():
        again[kind] = (once[kind] // 2 if count > 2 * QUERY_BLOCK else 0) + (
            once[kind] if checkpointing != "none" else 0
        )
    if checkpointing == "full":
        last = images * queries["tower attention"] * tower.intermediate_size * tower.hidden_size
        patches = images * tower.max_num_tiles * tower.patches * tower.hidden_size
        outside = 2 * patches * tower.num_channels * tower.patch_size**2
        down = 2 * tokens * text.hidden_size * text.intermediate_size
        again["tower"] = once["tower"] - outside - 2 * tower.num_hidden_layers * last
        again["cross keys and values"] = once["cross keys and values"]
        again["text"] = once["text"] - (text.num_hidden_layers - sum(text.is_cross)) * down
    return again


def _images_learn(trained: Collection[Part], adapted: Collection[Part]) -> bool:
    """Whether a gradient must pass back through the image tokens."""
    return not {"tower", "projector"}.isdisjoint([*trained, *adapted])


def _keys_values(config: MllamaConfig) -> int:
    """Width of a token's keys and values together, in one text layer."""
    return 2 * config.text.num_key_value_heads * config.text.head_dim


def _filled(n: int, multiple: int) -> int:
    return n + -n % multiple


def _queries(n: int) -> int:
    """Queries that ``attention`` computes for ``n``: long ones go in whole blocks."""
    return n if n <= 2 * QUERY_BLOCK else _filled(n, QUERY_BLOCK)


def _product(forward: int, weights: bool, inputs: bool) -> int:
    """FLOPs of a product, with the backward ones for the weights' gradient and the input's."""
    return forward * (1 + weights + inputs)


def _attention(forward: int, queries: bool, keys_values: bool) -> int:
    """FLOPs of the two products of attention, with the backward ones, each half of ``forward``.

    Those give the gradients of the weights of attention, of the queries, of the keys and of the values.
    """
    return forward + forward // 2 * ((queries or keys_values) + queries + 2 * keys_values)


def count_flops(jaxpr: ClosedJaxpr | Jaxpr) -> int:
    """FLOPs of the products and convolutions of a traced program; a ``cond`` counts as its dearest branch.

    Raises:
        ValueError: a product in a ``while`` loop, whose trips are unknown, or a kernel that cannot be seen into.
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
