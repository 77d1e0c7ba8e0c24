"""Questions that are rolled out: which rows of which data, their right answers, and their images."""

import json
import logging
from pathlib import Path

import pytest
from PIL import Image

from llava_cot_jax.data.prepared import PreparedRows
from llava_cot_jax.data.raw.preparation import prepare_dataset
from llava_cot_jax.data.settings import PrepareSettings
from llava_cot_jax.data.shapes.rows import ShapesRows
from llava_cot_jax.errors import UserError
from llava_cot_jax.evaluation.question_sets import Matching
from llava_cot_jax.processing.images import open_image
from llava_cot_jax.values.questions import open_questions
from tests.data.rows import staged


def test_the_shapes_world_is_of_the_training_split_unless_another_is_named():
    for split, name in ((None, "train"), ("validation", "validation")):
        found, world = open_questions("shapes", split, 6, 3, Matching(), 4), ShapesRows(name)
        assert [row.id for row in found.rows] == [f"{name}-{i}" for i in (6, 7, 8)]
        for i, row, known in zip((6, 7, 8), found.rows, found.known, strict=True):
            assert (row.question, row.images) == (world[i].turns[0].question, [f"images/{name}-{i}.png"])
            assert known.right.answers == (world.answer(i),)
            (file,) = row.sources
            assert open_image(file).tobytes() == world[i].images[0].tobytes()
    again = open_questions("shapes", None, 7, 1, Matching(), 4)
    assert again.rows[0].seed == open_questions("shapes", None, 6, 3, Matching(), 4).rows[1].seed is not None


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A prepared data set of four rows, of which one has no stages, and one a system turn."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "raw").mkdir()
    answers = [
        staged("s", "c", "r", "The answer is B."),
        "no stages",
        staged("s", "c", "r", "red"),
        staged(*"scr", "A"),
    ]
    with (folder / "rows.jsonl").open("w") as file:
        for i, answer in enumerate(answers):
            Image.new("RGB", (8 + i, 9)).save(folder / "raw" / f"{i}.png")
            said = [{"from": "human", "value": f"<image>\nWhat is {i}?"}, {"from": "gpt", "value": answer}]
            print(json.dumps({"id": str(i), "image": f"{i}.png", "conversations": said}), file=file)
    prepare_dataset(PrepareSettings(folder / "rows.jsonl", folder / "raw", folder / "out", validation_share=0.0))
    return folder / "out"


def test_prepared_data_has_the_conclusion_for_the_right_answer(prepared, caplog):
    rows = PreparedRows(prepared, "train")
    numbers = {rows.turns(i)[0].question: i for i in range(4)}
    with caplog.at_level(logging.WARNING):
        found = open_questions(str(prepared), None, 0, None, Matching(), 0)
    told = {row.question: known.right for row, known in zip(found.rows, found.known, strict=True)}
    assert {question: right.answers for question, right in told.items()} == {
        "What is 0?": ("The answer is B.",),
        "What is 2?": ("red",),
        "What is 3?": ("A",),
    }
    assert "1 of 4 rows" in caplog.text and "no conclusion that can be compared" in caplog.text
    for row in found.rows:
        index = numbers[row.question]
        assert (row.id, row.images) == (f"train-{index}", [f"images/train-{index}"])
        assert list(row.sources) == list(rows[index].images)
    letters = open_questions(str(prepared), None, 0, None, Matching("option"), 0)
    assert sorted(str(known.right.answers[0]) for known in letters.known) == ["A", "B"]


def test_a_file_of_ones_own(tmp_path):
    rows = [
        {"id": i, "question": "What?", "answer": 3, "image": image}
        for i, image in enumerate(("a.png", "sub/b.jpg", "/x/c.png", "../d.png", "data:image/png;base64,AAAA"))
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = open_questions(str(tmp_path / "own.jsonl"), None, 1, 4, Matching(), 0)
    assert [row.id for row in found.rows] == [1, 2, 3, 4]
    names = [name for row in found.rows for name in row.images]
    assert names[0] == "images/sub/b.jpg" and len(set(names)) == 4
    assert not [name for name in names if ".." in name or not name.startswith("images/") or "base64" in name]
    assert names[1].endswith(".png")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("shapes", "tests", 0, None), "split is 'tests'; it must be one of train, validation, test"),
        (("shapes", None, -1, None), "first is -1; it must be at least 0"),
        (("shapes", None, 0, 0), "limit is 0; it must be at least 1"),
        (("shapes", None, 50_000, None), "shapes has no row 50000: lower --first"),
        (("own.jsonl", "train", 0, None), "--split has no meaning with --data own.jsonl, which is a file"),
        (("nowhere", None, 0, None), "nowhere is no prepared data set"),
    ],
)
def test_what_cannot_be_used(given, message):
    with pytest.raises(UserError, match=message):
        open_questions(*given, Matching(), 0)
