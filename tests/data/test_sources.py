"""Tests of data sets by their names, alone and several together."""

import pickle
from pathlib import Path

import pytest

from llava_cot_jax.data.prepared import PreparedRows
from llava_cot_jax.data.raw.preparation import prepare_dataset
from llava_cot_jax.data.rows import Mixture
from llava_cot_jax.data.settings import PrepareSettings
from llava_cot_jax.data.shapes.rows import ShapesRows
from llava_cot_jax.data.sources import open_training_rows, open_validation_rows
from llava_cot_jax.errors import UserError
from tests.data.raw.raw_set import make_raw_set


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A prepared data set with rows to validate on, and one without."""
    folder = tmp_path_factory.mktemp("sets")
    raw = make_raw_set(folder, faults=False)
    images = raw.write_folder(folder / "images")
    prepare_dataset(PrepareSettings(raw.annotations, images, folder / "split", validation_share=0.3))
    prepare_dataset(PrepareSettings(raw.annotations, images, folder / "whole", validation_share=0))
    return str(folder / "split"), str(folder / "whole")


def test_rows_of_several_sets(folders: tuple[str, str]) -> None:
    rows = open_training_rows({folders[0]: 2, "shapes": 0.5, folders[1]: 1})
    assert isinstance(rows, Mixture) and rows.weights == (2.0, 0.5, 1.0)
    first, second, third = PreparedRows(folders[0], "train"), ShapesRows("train"), PreparedRows(folders[1], "train")
    assert len(rows) == len(first) + len(second) + len(third)
    for index, (part, inside) in {
        0: (first, 0),
        len(first) - 1: (first, len(first) - 1),
        len(first): (second, 0),
        len(first) + len(second) - 1: (second, len(second) - 1),
        len(first) + len(second): (third, 0),
        len(rows) - 1: (third, len(third) - 1),
    }.items():
        assert rows.turns(index) == part.turns(inside) and rows[index].id == part[inside].id
    again = pickle.loads(pickle.dumps(rows))
    assert again.fingerprint == rows.fingerprint and again[0] == rows[0]
    for index in (-1, len(rows)):
        with pytest.raises(IndexError):
            rows[index]
    others = [open_training_rows({name: 1 for name in names}) for names in (folders, folders[::-1], folders[:1])]
    assert len({each.fingerprint for each in others}) == 3
    assert open_training_rows("shapes") == ShapesRows("train")


def test_rows_to_validate_on(folders: tuple[str, str]) -> None:
    split, whole = folders
    shapes, held_out = ShapesRows("validation"), PreparedRows(split, "validation")

    def ids(*arguments) -> list[str]:
        rows = open_validation_rows(*arguments)
        return [rows[i].id for i in range(len(rows))]

    assert ids("shapes", None, 3) == [shapes[i].id for i in range(3)]
    assert ids({split: 5, "shapes": 0.1}, None, 7) == [each[i].id for each in (held_out, shapes) for i in range(3)]
    assert ids("shapes", split, 1000) == [held_out[i].id for i in range(len(held_out))]
    assert ids({"shapes": 1, split: 1}, whole, 2) == [PreparedRows(whole, "train")[i].id for i in range(2)]
    with pytest.raises(UserError, match="no rows in split 'validation'"):
        open_validation_rows(whole, None, 3)
    with pytest.raises(UserError, match="nowhere is no prepared data set"):
        open_validation_rows("shapes", str(Path(whole) / "nowhere"), 3)


def test_the_same_data_by_two_names(folders: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folders[0])
    with pytest.raises(
        UserError, match=r"/split and .*/link are the same data: name them once, with the sum of the wei"
    ):
        open_training_rows({folders[0]: 1, "shapes": 1, str(tmp_path / "link"): 1})
