"""Keys and values that decoding keeps."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeyValue:
    """Keys and values of one layer: of the tokens so far, or of the images.

    Attributes:
        keys: [batch, kv_heads, tokens, head_dim], normed or rotated as attention wants them.
        values: likewise.
    """

    keys: jax.Array
    values: jax.Array

    def padded(self, capacity: int) -> "KeyValue":
        """The same with room for ``capacity`` tokens."""
        room = ((0, 0), (0, 0), (0, capacity - self.keys.shape[2]), (0, 0))
        return KeyValue(jnp.pad(self.keys, room), jnp.pad(self.values, room))

    def write(self, new: "KeyValue", start: jax.Array) -> "KeyValue":
        """The same with the tokens of ``new`` in the slots from ``start`` [batch] on."""

        def put(old: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice(old, new, (0, start, 0))

        write = jax.vmap(put)
        return KeyValue(write(self.keys, new.keys, start), write(self.values, new.values, start))


Cache = tuple[KeyValue | None, ...]
"""One entry a text layer: of its tokens, or of the images in a cross layer (None where there are none).

The token at position p of a row is in slot p, so slots up to a query's position are what it sees.
"""
