"""KV cache of decoding, in two segments: a prefix that sequences share, and the suffix that is a sequence's own.

The sequences of a batch are the candidates of questions, those of the first question first. A prefix and the images
belong to a question. So ten candidates read one prefix, and nothing of it is copied.

    question 0   prefix [capacity] + images    sequences 0, 1, 2   suffix [capacity] each
    question 1   prefix [capacity] + images    sequences 3, 4, 5   suffix [capacity] each
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llava_cot_jax.model.config import TextConfig
from llava_cot_jax.model.sharding import constrain


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
        return constrain(jnp.zeros(shape, dtype), "batch", "kv_heads", None, None)

    return tuple(None if cross else LayerCache(zeros(), zeros()) for cross in config.is_cross)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prefix:
    """Segment of the cache that all sequences of a question share.

    Attributes:
        layers: Keys and values of the self-attention layers, [questions, kv_heads, capacity, head_dim].
        lengths: int32, number of tokens of each prefix. What lies beyond has no meaning.
    """

    layers: CacheLayers
    lengths: Int[Array, " questions"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of the text tokens before those that the model takes next.

    Attributes:
        suffix: Keys and values of each sequence's own tokens, [batch, kv_heads, capacity, head_dim]. Those of new
            tokens are written here.
        lengths: int32, number of tokens of each suffix, which is the index of the next token in it.
        prefix: Shared tokens before the suffix; None where there are none.
    """

    suffix: CacheLayers
    lengths: Int[Array, " batch"]
    prefix: Prefix | None = None

    def positions(self, tokens: int) -> Int[Array, "batch tokens"]:
        """Return the positions of the next ``tokens`` tokens of each sequence, int32."""
        start = self.lengths
        if self.prefix is not None:
            start = start + jnp.repeat(self.prefix.lengths, start.shape[0] // self.prefix.lengths.shape[0])
        return start[:, None] + jnp.arange(tokens)
