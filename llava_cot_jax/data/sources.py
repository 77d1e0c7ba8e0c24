"""Opening of a data set by its name: a prepared folder, or the shapes world."""

from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from llava_cot_jax.data.rows import Rows
    from llava_cot_jax.data.shapes.rows import Split

SHAPES_DATA = "shapes"
"""Name of the data set that is drawn by the package and needs no files."""


def open_rows(data: str, split: str) -> "Rows":
    """Open the rows of a split of a data set.

    Args:
        data: Folder made by ``llava-cot prepare``, on a disk or in a bucket, or ``shapes``.
        split: Name of the split, such as ``train``.

    Raises:
        UserError: The data set or its split does not exist.
    """
    if data == SHAPES_DATA:
        from llava_cot_jax.data.shapes.rows import ShapesRows

        return ShapesRows(cast("Split", split))
    from llava_cot_jax.data.prepared import PreparedRows

    return PreparedRows(data, split)
