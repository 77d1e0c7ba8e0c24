"""Where a data set is named: a prepared directory, or the shapes world."""

from typing import cast

from llava_cot_jax.data.prepared import PreparedRows
from llava_cot_jax.data.rows import Rows
from llava_cot_jax.data.shapes import ShapesRows, Split

SHAPES = "shapes"
"""Names the embedded data, which needs no files."""


def open_rows(data: str, split: str) -> Rows:
    """The rows of a data set.

    Args:
        data: a directory that ``llava_cot_jax.prepare`` made, perhaps copied into a bucket, or "shapes".

    Raises:
        UserError: no such data set, or no such split of it.
    """
    return ShapesRows(cast(Split, split)) if data == SHAPES else PreparedRows(data, split)
