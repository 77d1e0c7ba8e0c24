"""Tests of rows in other forms than LLaVA-CoT-100k's own, from the annotations to the steps of a run."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import tensorflow_datasets as tfds
from rich.table import Table

from llava_cot_jax.cli import progress_bar
from llava_cot_jax.data.prepared import PreparedRows
from llava_cot_jax.data.raw import shards
from llava_cot_jax.data.raw.preparation import prepare_dataset
from llava_cot_jax.data.rows import Turn
from llava_cot_jax.data.settings import LoaderSettings, PrepareSettings
from llava_cot_jax.errors import UserError
from llava_cot_jax.prepare import main
from llava_cot_jax.training.loop import train
from llava_cot_jax.training.settings import TrainSettings
from tests.data.raw.raw_set import RawSet, make_raw_set
from tests.data.rows import staged

MANY = ["sqa/train/0/image.png", "chartqa/train/1/image.png", "vg/train/2/image.png"]
ANSWER = staged("I look.", "Dots.", "None.", "No")


def said(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


ROWS = [
    {"id": "one", "image": MANY[:1], "conversations": said("<image>\nWhat is <image> here?", "An ![a](<image>).")},
    {"id": "three", "image": MANY, "conversations": said("<image><image>\nSame?", ANSWER, "<image>\nAnd this?", "No")},
    {"id": "none", "conversations": [{"from": "system", "value": "Be brief."}, *said("What is red?", ANSWER)]},
    {"id": "again", "image": MANY[0], "conversations": said("<image>\nWhat?", ANSWER, "<image>\nWhere?", "There.")},
]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> RawSet:
    raw = make_raw_set(tmp_path_factory.mktemp("raw"), faults=False)
    raw.write_folder(raw.annotations.parent / "images")
    return raw


def arguments(raw: RawSet, folder: Path, rows: list[dict], *more: str) -> list[str]:
    """Arguments that prepare ``rows`` in ``folder``."""
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    images = raw.annotations.parent / "images"
    files = ["--annotations", str(folder / "a.jsonl"), "--images", str(images), "--output", str(folder / "out")]
    return [*files, "--workers", "0", "--validation_share", "0", *more]


@pytest.fixture(scope="module")
def prepared(raw: RawSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forms")
    main(arguments(raw, folder, ROWS))
    return folder / "out"


def test_every_form_is_read_as_written(raw: RawSet, prepared: Path) -> None:
    rows = PreparedRows(prepared, "train")
    assert [rows[i].images for i in range(4)] == [
        (raw.files[MANY[0]],),
        tuple(raw.files[name] for name in MANY),
        (),
        (raw.files[MANY[0]],),
    ]
    assert (
        [rows[i].turns for i in range(4)]
        == [rows.turns(i) for i in range(4)]
        == [
            (Turn("What is <image> here?", "An ![a](<image>).", images=1),),
            (Turn("Same?", ANSWER, images=2), Turn("And this?", "No", images=1)),
            (Turn("What is red?", ANSWER, system="Be brief."),),
            (Turn("What?", ANSWER, images=1), Turn("Where?", "There.")),
        ]
    )


def test_they_are_counted_and_named(raw: RawSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(arguments(raw, tmp_path, ROWS))
    printed = capsys.readouterr().out
    sources = json.loads((tmp_path / "out/prepared.json").read_text())["sources"]
    totals: Counter[str] = sum(map(Counter, sources.values()), Counter())
    assert totals == {
        "rows": 4,
        "train": 4,
        "0 images": 1,
        "3 images": 1,
        "unstaged answers": 3,
        "system turns": 1,
        "markers kept as text": 1,
        "markers in later turns": 2,
        "more markers than images": 1,
    }
    assert {row["id"]: row["remarks"] for row in map(json.loads, (tmp_path / "out/remarks.jsonl").open())} == {
        "one": ["markers kept as text"],
        "three": ["markers in later turns"],
        "none": ["system turns"],
        "again": ["more markers than images", "markers in later turns"],
    }
    assert "markers kept as text, system turns are named in remarks.jsonl" in printed
    _, total, _, _ = printed.splitlines()[-4:]
    assert total.split() == ["all", "4", "4", "0", "1", "1", "3", "1", "2", "1", "1"]


def test_they_are_shown(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--show", str(prepared), "--checkpoint", "shapes", "--sheet", str(tmp_path / "sheet.png")])
    printed = capsys.readouterr().out
    assert "row 1 (three) from sqa: image 40 x 30, image 41 x 31, image 43 x 32, 2 of 2 turns" in printed
    assert "<|image|><|image|>Same?<|eot_id|>" in printed and "<|image|>And this?<|eot_id|>" in printed
    assert "row 2 (none) from (unknown): no image, 1 of 1 turns" in printed
    assert "Be brief.<|eot_id|>" in printed


def test_rows_without_an_image_have_no_sheet(raw: RawSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(arguments(raw, tmp_path, ROWS[2:3]))
    main(["--show", str(tmp_path / "out"), "--sheet", str(tmp_path / "sheet.png")])
    assert "no image, 1 of 1 turns" in capsys.readouterr().out and not (tmp_path / "sheet.png").exists()


def test_rows_that_share_an_image_are_in_one_split(raw: RawSet, tmp_path: Path) -> None:
    """A chain of rows, each of which shares an image with the next."""
    names = sorted(name for name in raw.files if "train" in name)[:12]
    rows = [{"image": list(pair), "conversations": said("Same?", "No")} for pair in pairwise(names)]
    main(arguments(raw, tmp_path, rows, "--validation_share", "0.5"))
    assert list(json.loads((tmp_path / "out/prepared.json").read_text())["splits"].values()) == [11]


@pytest.mark.slow
def test_a_run_trains_on_all_of_them(raw: RawSet, tmp_path: Path) -> None:
    main(arguments(raw, tmp_path, ROWS * 2))
    shown: list[object] = []
    settings = TrainSettings(
        str(tmp_path / "run"),
        "shapes",
        str(tmp_path / "out"),
        steps=2,
        dtype="float32",
        eval_examples=0,
        loader=LoaderSettings(batch_size=8),
    )
    train(settings, log=shown.append, progress_bar=progress_bar)
    (table,) = (each for each in shown if isinstance(each, Table))
    cells = dict(zip(*(column.cells for column in table.columns), strict=True))
    assert cells["rows"] == "8; 2 with 0 images; 4 with 1 image; 2 with 3 images; 0 of 8 rows skipped"
    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    first, second = (line for line in lines if "loss" in line)
    assert second["loss"] < first["loss"] and first["trained_tokens"] > 200


def test_a_set_of_version_1_is_read(raw: RawSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 1 had one image in each record, and no number of images beside the conversations."""
    features = {name: kind for name, kind in shards.FEATURES.items() if name not in ("images", "image_paths")}
    features |= {"image": tfds.features.Image(), "image_path": tfds.features.Text()}
    old = tfds.features.FeaturesDict(features)

    def encode(example: dict) -> dict:
        (image,), (path,) = example["images"], example["image_paths"]
        kept = {name: value for name, value in example.items() if name in features}
        return old.encode_example(kept | {"image": image, "image_path": path})

    settings = PrepareSettings(raw.annotations, raw.annotations.parent / "images", tmp_path / "old", validation_share=0)
    with monkeypatch.context() as patch:
        serializer = tfds.core.ExampleSerializer(old.get_serialized_info())
        patch.setattr(shards, "_SERIALIZER", serializer)
        patch.setattr(shards.LlavaCot100k, "VERSION", tfds.core.Version("1.0.0"))
        patch.setattr(shards.LlavaCot100k, "_info", lambda self: tfds.core.DatasetInfo(builder=self, features=old))
        patch.setattr(shards, "FEATURES", type("Old", (), {"encode_example": staticmethod(encode)}))
        prepare_dataset(settings)
    path = tmp_path / "old/train.turns.jsonl"
    path.write_text(path.read_text().replace('"images": 1, ', ""))
    rows, row = PreparedRows(tmp_path / "old", "train"), raw.rows[1]
    assert (rows[0].id, rows[0].images) == (row["id"], (raw.files[row["image"]],))
    assert rows.turns(0)[0].images == 1 and len(rows) == len(raw.rows)
    with pytest.raises(UserError, match="was prepared with other version: name another output, or remove it"):
        main(arguments(raw, tmp_path, ROWS, "--output", str(tmp_path / "old"), "--annotations", str(raw.annotations)))
