"""KV cache of decoding: a chain of segments that sequences share, and the suffix that is a sequence's own.

Each row of a segment is shared by a group of consecutive sequences, and each level of the chain divides the groups of
the level before it. So ten candidates read one question, sixteen continuations read one candidate, and nothing of a
question, a candidate or an image is ever copied. Images belong to a question.

    question 0 + images    candidate 0    sequences 0, 1   suffix [capacity] each
                           candidate 1    sequences 2, 3   suffix [capacity] each
    question 1 + images    candidate 2    sequences 4, 5   suffix [capacity] each
                           candidate 3    sequences 6, 7   suffix [capacity] each
"""

from dataclasses import dataclass, replace
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llava_cot_jax.model.config import TextConfig
from llava_cot_jax.model.sharding import constrain

_Tree = TypeVar("_Tree")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer, of text tokens or of image tokens.

    Attributes:
        keys: Keys, normed or rotated as attention takes them.
        values: Values.
    """

    keys: Float[Array, "batch kv_heads capacity head_dim"]
    values: Float[Array, "batch kv_heads capacity head_dim"]

    @jax.named_scope("update_cache")
    def update(self, new: "LayerCache", lengths: Int[Array, " batch"]) -> "LayerCache":
        """Return the cache with the tokens of ``new`` written from index ``lengths`` on."""

        def write(old: jax.Array, new: jax.Array, length: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice(old, new, (0, length, 0))

        write_batch = jax.vmap(write)
        return LayerCache(write_batch(self.keys, new.keys, lengths), write_batch(self.values, new.values, lengths))


CacheLayers = tuple[LayerCache | None, ...]
"""One entry per text layer; None where the layer is of the other kind (self-attention or cross-attention)."""


def init_cache(config: TextConfig, batch: int, capacity: int, dtype: jnp.dtype) -> CacheLayers:
    """Return zeros for ``capacity`` tokens of each sequence in every self-attention layer."""
    shape = (batch, config.num_key_value_heads, capacity, config.head_dim)

    def zeros() -> jax.Array:
        return jnp.zeros(shape, dtype)

    return constrain_batch(tuple(None if cross else LayerCache(zeros(), zeros()) for cross in config.is_cross))


def constrain_batch(tree: _Tree) -> _Tree:
    """Constrain the sharding of arrays whose first axis is the batch: that axis, and the heads of caches, are sharded.

    A program whose results are its next call's arguments needs this: the compiler could return them sharded otherwise
    than it took them, and the next call would be compiled anew.
    """

    def constrain_one(x: LayerCache | jax.Array) -> LayerCache | jax.Array:
        if isinstance(x, LayerCache):
            return jax.tree.map(lambda each: constrain(each, "batch", "kv_heads", None, None), x)
        return constrain(x, "batch", *[None] * (x.ndim - 1))

    return jax.tree.map(constrain_one, tree, is_leaf=lambda x: isinstance(x, LayerCache))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Segment:
    """Segment of the cache, each row of which a group of consecutive sequences shares.

    Attributes:
        layers: Keys and values of the self-attention layers, [groups, kv_heads, capacity, head_dim].
        lengths: int32, number of tokens of each row. What lies beyond has no meaning.
    """

    layers: CacheLayers
    lengths: Int[Array, " groups"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of the text tokens before those that the model takes next.

    Attributes:
        suffix: Keys and values of each sequence's own tokens, [batch, kv_heads, capacity, head_dim]. Those of new
            tokens are written here.
        lengths: int32, number of tokens of each suffix, which is the index of the next token in it.
        prefix: Shared segments before the suffix, root first. The number of groups of each divides the number of
            sequences.
    """

    suffix: CacheLayers
    lengths: Int[Array, " batch"]
    prefix: tuple[Segment, ...] = ()

    def positions(self, tokens: int) -> Int[Array, "batch tokens"]:
        """Return the positions of the next ``tokens`` tokens of each sequence, int32."""
        start = self.lengths
        for segment in self.prefix:
            start = start + jnp.repeat(segment.lengths, start.shape[0] // segment.lengths.shape[0])
        return start[:, None] + jnp.arange(tokens)

    def layer(self, index: int) -> "KVCache":
        """Return the cache of one layer alone."""
        prefix = tuple(replace(segment, layers=(segment.layers[index],)) for segment in self.prefix)
        return replace(self, suffix=(self.suffix[index],), prefix=prefix)
