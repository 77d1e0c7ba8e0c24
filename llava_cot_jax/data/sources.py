"""Where a data set is named: a prepared directory, or the shapes world."""

from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from llava_cot_jax.data.rows import Rows
    from llava_cot_jax.data.shapes.rows import Split

SHAPES = "shapes"
"""Names the embedded data, which needs no files."""


def open_rows(data: str, split: str) -> "Rows":
    """The rows of a data set.

    Args:
        data: a directory that ``llava_cot_jax.prepare`` made, perhaps copied into a bucket, or "shapes".

    Raises:
        UserError: no such data set, or no such split of it.
    """
    if data == SHAPES:
        from llava_cot_jax.data.shapes.rows import ShapesRows

        return ShapesRows(cast("Split", split))
    from llava_cot_jax.data.prepared import PreparedRows

    return PreparedRows(data, split)
