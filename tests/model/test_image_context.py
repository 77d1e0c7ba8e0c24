"""What each text token sees of the images, for a sequence in a batch and for the same one alone."""

from dataclasses import replace
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.convention import Convention
from llava_cot_jax.model.image_context import cross_attention_mask

COUNTS, TOKENS, TILES = (0, 1, 3), 6, 4


@pytest.fixture
def mask() -> jax.Array:
    """Which tiles the tokens of three sequences see of their images. The first two tokens see none."""
    mask = np.random.default_rng(0).integers(0, 2, (len(COUNTS), TOKENS, max(COUNTS), TILES))
    mask[:, :2] = 0
    for row, count in enumerate(COUNTS):
        mask[row, :, count:] = 0
    return jnp.asarray(mask)


@pytest.mark.parametrize("convention", get_args(Convention))
def test_with_its_own_images_a_sequence_sees_what_it_sees_alone(small: MllamaConfig, mask, convention):
    config = replace(small, convention=convention)
    is_image = jnp.arange(max(COUNTS)) < jnp.array(COUNTS)[:, None]
    tiles, *gates = (np.asarray(x) for x in cross_attention_mask(config, mask, is_image))
    for row, count in enumerate(COUNTS):
        if not count:  # the cross-attention layers are skipped
            assert not np.any(gates, where=np.arange(len(COUNTS))[:, None] == row)
            continue
        alone, *gates_alone = cross_attention_mask(config, mask[row : row + 1, :, :count])
        padding = (0, 0), (0, (max(COUNTS) - count) * TILES)
        np.testing.assert_array_equal(tiles[row], np.pad(np.asarray(alone[0]), padding))
        np.testing.assert_array_equal([gate[row] for gate in gates], [gate[0] for gate in gates_alone])


@pytest.mark.parametrize("convention", get_args(Convention))
def test_without_them_a_batch_is_seen_as_in_transformers(small: MllamaConfig, mask, convention):
    """There, a token that sees no image attends to all of the batch's places for images."""
    tiles, attention_gate, mlp_gate = cross_attention_mask(replace(small, convention=convention), mask)
    seen = np.asarray(mask.reshape(len(COUNTS), TOKENS, -1), bool)
    blind = ~seen.any(axis=-1)
    np.testing.assert_array_equal(mlp_gate, ~blind)
    np.testing.assert_array_equal(attention_gate, ~blind if convention == "meta" else np.ones_like(blind))
    want = seen if convention == "meta" else seen | blind[..., None]
    np.testing.assert_array_equal(tiles, np.pad(want, ((0, 0), (0, 0), (0, 1))))
