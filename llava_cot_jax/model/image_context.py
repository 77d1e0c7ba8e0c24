"""Images as the cross-attention layers see them: their keys and values, and which text token sees which tile."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer

from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.kv_cache import CacheLayers


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ImageContext:
    """Images of a batch of questions, and what each text token sees of them.

    Attributes:
        tile_mask: Whether a text token attends to a tile, [batch, tokens, images * tiles + 1]. The last entry stands
            for the padding of the image tokens, which no token sees.
        attention_gate: Whether the attention of a cross-attention layer adds anything to a text token.
        mlp_gate: Whether the MLP of a cross-attention layer adds anything to a text token.
        states: Projected image tokens, from which each layer computes its keys and values; None where ``layers`` is
            given.
        layers: Keys and values of the image tokens in the cross-attention layers, for decoding; None where ``states``
            is given.
        last_token: int32, index of the last token of each prompt, whose mask holds for all tokens after it. None
            outside decoding.
    """

    tile_mask: Bool[Array, "batch tokens tiles"]
    attention_gate: Bool[Array, "batch tokens"]
    mlp_gate: Bool[Array, "batch tokens"]
    states: Float[Array, "questions image_tokens hidden"] | None = None
    layers: CacheLayers | None = None
    last_token: Int[Array, " questions"] | None = None

    def at(
        self, positions: Int[Array, "batch n"], text_only: Bool[Array, " questions"] | bool = False
    ) -> "ImageContext":
        """Return the context with the masks of the tokens at ``positions`` of sequences that begin with the prompt.

        Args:
            positions: int32, positions of tokens; the sequences of the first question come first.
            text_only: Whether a question's tokens see no image, so that no cross-attention layer adds anything.
        """
        assert self.last_token is not None
        batch, n = positions.shape
        index = jnp.minimum(positions.reshape(self.last_token.shape[0], -1), self.last_token[:, None])
        sees_images = ~jnp.broadcast_to(jnp.asarray(text_only), self.last_token.shape)[:, None]
        tile_mask = jnp.take_along_axis(self.tile_mask, index[..., None], axis=1).reshape(batch, n, -1)
        gates = (jnp.take_along_axis(gate, index, axis=1) for gate in (self.attention_gate, self.mlp_gate))
        attention_gate, mlp_gate = ((gate & sees_images).reshape(batch, n) for gate in gates)
        return replace(self, tile_mask=tile_mask, attention_gate=attention_gate, mlp_gate=mlp_gate)


def cross_attention_mask(
    config: MllamaConfig,
    mask: Integer[Array, "batch tokens images tiles"],
    is_image: Bool[Array, "batch images"] | None = None,
) -> tuple[Bool[Array, "batch tokens n"], Bool[Array, "batch tokens"], Bool[Array, "batch tokens"]]:
    """Return ``tile_mask``, ``attention_gate`` and ``mlp_gate`` of ``ImageContext`` for a mask of 0 and 1.

    A token without an image gets nothing from a cross-attention layer under the convention ``meta``. Under those of
    transformers it attends to every tile of the images, and only the MLP adds nothing.

    Args:
        config: Configuration of the model.
        mask: Which tiles each token sees.
        is_image: Whether an image is one of the sequence's own and does not only fill up the batch. With it, a sequence
            gets what transformers computes for it alone. None counts every image, as transformers does in a batch.
    """
    visible = mask.astype(bool).reshape(*mask.shape[:2], -1)
    sees_image = attention_gate = visible.any(axis=-1)
    if config.convention != "meta":
        own = jnp.ones_like(mask[:, 0, :, 0], bool) if is_image is None else is_image
        every_tile = jnp.repeat(own, mask.shape[-1], axis=1)
        visible = visible | (~sees_image[..., None] & every_tile[:, None])
        attention_gate = jnp.broadcast_to(own.any(axis=1, keepdims=True), sees_image.shape)
    return jnp.pad(visible, ((0, 0), (0, 0), (0, 1))), attention_gate, sees_image
