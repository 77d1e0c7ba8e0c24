"""Opening of data sets by their names: prepared folders, folders of values, the shapes world, and mixtures of them."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, cast

from llava_cot_jax.data.settings import VerifierSettings
from llava_cot_jax.errors import UserError
from llava_cot_jax.paths import as_path, reading_errors

if TYPE_CHECKING:
    from llava_cot_jax.data.rows import Rows
    from llava_cot_jax.data.shapes.rows import Split

SHAPES_DATA = "shapes"
"""Name of the data set that is drawn by the package and needs no files."""


VALUES_FILE = "values.jsonl"
"""Name of the file of a folder of values, by which such a folder is known."""


def open_rows(data: str, split: str, verifier: VerifierSettings | None = None) -> "Rows":
    """Open the rows of a split of a data set.

    Args:
        data: Folder made by ``llava-cot prepare`` or ``llava-cot rollout``, on a disk or in a bucket, or ``shapes``.
        split: Name of the split, such as ``train``; of values, also ``all``.
        verifier: How a verifier learns from values; None is the default.

    Raises:
        UserError: The data set or its split does not exist.
    """
    if data == SHAPES_DATA:
        from llava_cot_jax.data.shapes.rows import ShapesRows

        return ShapesRows(cast("Split", split))
    if _has_values(data):
        from llava_cot_jax.data.values import ValueRows

        return ValueRows(as_path(data) / VALUES_FILE, split, verifier or VerifierSettings())
    from llava_cot_jax.data.prepared import PreparedRows

    return PreparedRows(data, split)


def open_training_rows(data: str | Mapping[str, float], verifier: VerifierSettings | None = None) -> "Rows":
    """Open the rows to train on: the split ``train`` of a data set, or of several.

    Args:
        data: Name of a data set, or the weight of each by their names, as in ``TrainSettings.data``.
        verifier: How a verifier learns from values; None is the default.

    Raises:
        UserError: A data set or its split does not exist, two are the same, or none of those of values has a stage of
            the verifier's settings.
    """
    from llava_cot_jax.data.rows import Mixture

    parts = {name: open_rows(name, "train", verifier) for name in ([data] if isinstance(data, str) else data)}
    if verifier and verifier.stage_weights:
        _check_stages(parts.values(), verifier.stage_weights)
    if isinstance(data, str):
        return parts[data]
    names: dict[str, str] = {}
    for name, rows in parts.items():
        if (other := names.setdefault(rows.fingerprint, name)) != name:
            raise UserError(f"{other} and {name} are the same data: name them once, with the sum of the weights")
    return Mixture(tuple(parts.values()), tuple(map(float, data.values())))


def open_validation_rows(
    data: str | Mapping[str, float], validation_data: str | None, count: int, verifier: VerifierSettings | None = None
) -> "Rows":
    """Open the rows to validate on.

    Args:
        data: Data set or data sets to train on. Where there is no other to validate on, the rows are those of their
            splits ``validation``, as many of each.
        validation_data: Data set to validate on alone: its split ``validation`` if it has one, otherwise ``train``. Of
            values it is all of them or, where they are trained on too, their split ``validation``.
        count: Maximum number of rows.
        verifier: How a verifier learns from values; None is the default.

    Raises:
        UserError: A data set or its split does not exist.
    """
    from llava_cot_jax.data.rows import FirstRows, Mixture

    if validation_data is not None:
        is_trained = as_path(validation_data) in map(as_path, [data] if isinstance(data, str) else data)
        return FirstRows(_open_whole(validation_data, verifier, is_trained), count)
    if isinstance(data, str):
        return FirstRows(open_rows(data, "validation", verifier), count)
    share = max(1, count // len(data))
    parts = tuple(FirstRows(open_rows(name, "validation", verifier), share) for name in data)
    return Mixture(parts, (1.0,) * len(parts))


def _check_stages(parts: "Iterable[Rows]", weights: Mapping[str, float]) -> None:
    """Check that each stage that has a weight occurs in a data set of values, if there are any.

    Raises:
        UserError: One does not.
    """
    from llava_cot_jax.data.values import ValueRows

    known = dict.fromkeys(stage for rows in parts if isinstance(rows, ValueRows) for stage in rows.stages)
    if known and (unknown := [stage for stage in weights if stage not in known]):
        raise UserError(
            f"verifier.stage_weights has the stage {unknown[0]}, which no values have: their stages are "
            f"{', '.join(known)}"
        )


def _has_values(data: str) -> bool:
    """Whether a data set is a folder of values."""
    folder = as_path(data)
    with reading_errors(folder):
        return data != SHAPES_DATA and (folder / VALUES_FILE).exists()


def _open_whole(data: str, verifier: VerifierSettings | None, is_trained: bool) -> "Rows":
    """Open all of a data set that can be validated on.

    Args:
        data: Name of the data set.
        verifier: How a verifier learns from values.
        is_trained: Whether the split ``train`` is trained on.
    """
    if _has_values(data):
        return open_rows(data, "validation" if is_trained else "all", verifier)
    try:
        return open_rows(data, "validation", verifier)
    except UserError:
        return open_rows(data, "train", verifier)
