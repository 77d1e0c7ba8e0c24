"""Keys and values that decoding keeps, in two parts: a prefix that rows share, and what is a row's own.

Rows are the candidates of questions, all of the first question first; a prefix and the images belong to
a question. So ten candidates read one prefix, and nothing of it is copied to them.

    question 0   prefix [slots] + images    rows 0, 1, 2   own [slots] each
    question 1   prefix [slots] + images    rows 3, 4, 5   own [slots] each
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from llava_cot_jax.model.config import TextConfig
from llava_cot_jax.model.sharding import constrain


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeyValue:
    """Keys and values of one layer: of text tokens in their slots, or of image tokens.

    Attributes:
        keys: [batch, kv_heads, slots, head_dim], normed or rotated as attention wants them.
        values: likewise.
    """

    keys: jax.Array
    values: jax.Array

    def write(self, new: "KeyValue", start: jax.Array) -> "KeyValue":
        """The same with the tokens of ``new`` in the slots from ``start`` int32 [batch] on."""

        def put(old: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice(old, new, (0, start, 0))

        write = jax.vmap(put)
        return KeyValue(write(self.keys, new.keys, start), write(self.values, new.values, start))


Layers = tuple[KeyValue | None, ...]
"""One entry a text layer; None where a layer is of the other kind."""


def empty(config: TextConfig, rows: int, slots: int, dtype: jnp.dtype) -> Layers:
    """Room for ``slots`` tokens of each row in every self-attention layer."""
    shape = (rows, config.num_key_value_heads, slots, config.head_dim)

    def zeros() -> jax.Array:
        return constrain(jnp.zeros(shape, dtype), "batch", "kv_heads", None, None)

    return tuple(None if cross else KeyValue(zeros(), zeros()) for cross in config.is_cross)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prefix:
    """What the rows of a question share.

    Attributes:
        layers: of the self-attention layers, [questions, kv_heads, slots, head_dim].
        length: int32 [questions], tokens; slots beyond hold nothing of meaning.
    """

    layers: Layers
    length: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Memory:
    """What appended tokens attend to besides themselves.

    Attributes:
        own: a row's own tokens, [rows, kv_heads, slots, head_dim]; appended ones are written here.
        start: int32 [rows], tokens of each row that are there already: the slot of the first appended one.
        prefix: what comes before a row's own tokens; None where nothing does.
        images: of the cross-attention layers, [questions, kv_heads, image_tokens, head_dim]; all None without
            images.
    """

    own: Layers
    start: jax.Array
    prefix: Prefix | None
    images: Layers

    def positions(self, tokens: int) -> jax.Array:
        """Of ``tokens`` appended ones: int32 [rows, tokens]."""
        start = self.start
        if self.prefix is not None:
            start = start + jnp.repeat(self.prefix.length, start.shape[0] // self.prefix.length.shape[0])
        return start[:, None] + jnp.arange(tokens)
