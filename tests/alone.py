"""A row of a batch as a batch of its own."""

import numpy as np


def alone(batch: dict[str, np.ndarray], row: int) -> dict[str, np.ndarray]:
    """Return the arrays of one row, without the images that fill up its place in the batch, or without any."""
    own = {name: x[row : row + 1] for name, x in batch.items()}
    count = int((own["aspect_ratio_ids"] > 0).sum())
    for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
        own[name] = own[name][:, :count]
    own["cross_attention_mask"] = own["cross_attention_mask"][:, :, :count]
    return own if count else {name: x for name, x in own.items() if name in ("input_ids", "attention_mask")}
