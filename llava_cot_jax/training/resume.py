"""Continuation of a run from a checkpoint: what may have changed since, its base, and its place in the data."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from llava_cot_jax.data.loader import Loader
from llava_cot_jax.data.place import Place
from llava_cot_jax.errors import UserError
from llava_cot_jax.training.base import Base, check_same_base
from llava_cot_jax.training.layout import relocated
from llava_cot_jax.training.run import Run
from llava_cot_jax.training.run_folder import changed_settings, changed_versions


def check_unchanged(run: Run, before: Mapping[str, Any], description: Mapping[str, Any], accept_changes: bool) -> None:
    """Check that a run is resumed with the settings and data with which it was started.

    Raises:
        UserError: Something changed that affects the result, and the user did not accept changes.
    """
    before = {**before, "settings": relocated(before["settings"], run.folder)}
    if versions := changed_versions(before, description):
        run.log(f"the newest checkpoint was written with other versions: {'; '.join(versions)}")
    if changes := changed_settings(before, description):
        if not accept_changes:
            raise UserError(
                f"the run was begun with other settings or data: {'; '.join(changes)}. Restore them, name another "
                "output, or resume with the changes by --accept_changes"
            )
        run.log(f"resuming with changes: {'; '.join(changes)}")


def base_description(run: Run, before: Mapping[str, Any] | None, accept_changes: bool) -> dict[str, Any] | None:
    """Return the identity of the weights that the run started from, as its checkpoints store it.

    Args:
        run: Run whose model is loaded as far as it is needed.
        before: Description of the run in the checkpoint that it goes on from, if there is one.
        accept_changes: Whether the user accepts other weights.

    Raises:
        UserError: The run goes on with frozen parameters from other weights, and the user did not accept changes.
    """
    stored, found = Base.of(before or {}), run.initial_model.find_base()
    if found is None:  # nothing of it was needed
        return asdict(stored) if stored else None
    if before and accept_changes and stored and stored.digest != found.digest:
        run.log(f"resuming with other frozen weights: the run started from {stored}, now there is {found}")
    elif before:
        check_same_base(stored, found, "put them back, or resume with these by --accept_changes")
    return asdict(found)


def place_description(loader: Loader, step: int) -> dict[str, Any]:
    """Return the place of a run in its data after ``step`` steps, as its checkpoints store it.

    Args:
        loader: Loader of the rows to train on.
        step: Number of steps that are done.
    """
    return {
        "rows": loader.rows_fingerprint,
        "start": loader.start.to_json(),
        "now": loader.place(step).to_json(),
    }


def resume_data(run: Run, before: Mapping[str, Any], description: Mapping[str, Any], loader: Loader) -> None:
    """Let a loader go on where a run was in its data.

    With the same batches as before, they go on. With others (another batch size, seed, or maximum length), the rows of
    the present epoch that were seen are left out of the rest of it, and the others are divided anew. Of other data,
    nothing was seen: the epoch begins anew.

    Args:
        run: Run that is resumed.
        before: Description of the run in the checkpoint that it goes on from.
        description: Description of the run now.
        loader: Loader of the rows to train on, which is changed.

    Raises:
        UserError: The checkpoint does not know its place in the data, and its batches would be others now.
    """
    stored = before.get("place")
    if before["data"] == description["data"]:
        if stored:
            loader.start_at(Place.from_json(stored["start"]))
        return
    if not stored:
        raise UserError(
            "the newest checkpoint is of a version that stored no place in the data, and the data's batches are others "
            "now: restore the settings of the data, or name another output"
        )
    place = Place.from_json(stored["now"])
    if stored["rows"] != loader.rows_fingerprint:
        place = replace(place, seen=None)
        run.log(f"the data has other rows than before: epoch {place.epoch + 1} begins anew with them")
    loader.start_at(place)
