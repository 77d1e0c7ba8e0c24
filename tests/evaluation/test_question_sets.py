"""Questions whose right answers are known: of the shapes world, and of a user's own files."""

import base64
import csv
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_cot_jax.data.shapes.rows import ShapesRows
from llava_cot_jax.errors import UserError
from llava_cot_jax.evaluation.question_sets import EvaluationSet, Matching, open_benchmark


def opened(name: str | Path, limit: int | None = None, **matching) -> EvaluationSet:
    return open_benchmark(str(name), limit, Matching(**matching), seed=0)


def write_lines(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_questions_of_the_shapes_world():
    found, world = opened("shapes", 8), ShapesRows("test")
    assert [row.id for row in found.rows] == [f"test-{i}" for i in range(8)]
    assert [known.category for known in found.known] == ["look_up", "count", "compare", "relation"] * 2
    for i, (row, known) in enumerate(zip(found.rows, found.known, strict=True)):
        assert row.question == world[i].turns[0].question
        assert known.right.answers == (world.answer(i),)
        assert known.right.match == ("yes_no" if known.category == "compare" else "exact")
        (source,) = row.sources
        assert np.array_equal(Image.open(io.BytesIO(source)), world[i].images[0])
    assert len({row.seed for row in found.rows}) == 8
    more = opened("shapes", 9)
    assert more.rows[:8] == found.rows and more.known[:8] == found.known
    assert more.sha256 != found.sha256 == opened("shapes", 8).sha256


def test_rows_of_a_jsonl_file(tmp_path):
    path = write_lines(
        tmp_path / "own.jsonl",
        {"id": 1, "question": "What?", "answer": "red", "image": "x.png", "seed": 3, "category": "colour"},
        {"id": 2, "question": "Is it?", "answer": "yes"},
        {"id": 3, "question": "How many?", "answer": 3},
        {"id": 4, "question": "How many?", "answer": [3, "three"]},
        {"id": 5, "question": "Which?", "answer": "B", "options": ["red", "green"]},
        {"id": 6, "question": "Which?", "answer": "D", "options": {"A": "red", "D": "None"}, "match": "exact"},
    )
    found = opened(path)
    assert [known.right.match for known in found.known] == ["exact", "yes_no", "number", "exact", "option", "exact"]
    assert [known.right.answers for known in found.known][2:4] == [(3,), (3, "three")]
    assert [known.right.options for known in found.known][4:] == [
        {"A": "red", "B": "green"},
        {"A": "red", "D": "None"},
    ]
    assert found.known[0].category == "colour" and found.known[1].category is None
    assert (found.rows[0].seed, found.rows[0].sources) == (3, [str(tmp_path / "x.png")])
    assert (found.name, found.sha256) == ("own.jsonl", hashlib.sha256(path.read_bytes()).hexdigest())
    assert opened(path, limit=2).rows == found.rows[:2]
    told = opened(write_lines(tmp_path / "one.jsonl", {"id": 3, "question": "How many?", "answer": "3"}), match="exact")
    assert told.known[0].right.match == "exact"
    assert told.rows[0].seed == found.rows[2].seed  # by the id, wherever the row stands
    assert open_benchmark(str(path), None, Matching(), seed=5).rows[1].seed == (found.rows[1].seed + 5) % 2**32


WRONG = {
    '{"id": 1, "question": "What?"}': "line 1 has no right answer: give answer, a text, a number, or a list of these",
    '{"id": 1, "question": "What?", "answer": []}': "line 1 has no right answer",
    '{"id": 1, "question": "What?", "answer": null}': "line 1 has no right answer",
    '{"id": 1, "question": "What?", "answer": " "}': "line 1: the right answer is empty",
    '{"id": 1, "question": "What?", "answer": true}': "line 1: answer is True; it must be a text or a number",
    '{"id": 1, "question": "What?", "answer": {"a": 1}}': "line 1: answer is .*a dict; it must be a text or a number",
    '{"id": 1, "question": "What?", "answer": NaN}': "line 1: the right answer is nan; it must be a finite number",
    '{"id": 1, "question": "What?", "answer": "x", "match": "fuzzy"}': "line 1: match is 'fuzzy'; it must be one of ex",
    '{"id": 1, "question": "What?", "answer": "x", "match": "number"}': "line 1: the right answer 'x' is not one numbe",
    '{"id": 1, "question": "What?", "answer": "x", "category": 3}': "line 1: category is 3; it must be a text",
    '{"id": 1, "question": "What?", "answer": "C", "options": ["a"]}': "the right answer 'C' is the letter of no opti",
    '{"id": 1, "question": "What?", "answer": "A", "options": "ab"}': "line 1: options is 'ab'; it must be a list of t",
    '{"id": 1, "question": "What?", "answer": "A", "options": []}': "line 1: options is .*it must be a list of texts",
    '{"id": 1, "question": "What?", "answer": "A", "options": [1]}': "line 1: option A is 1; it must be a text",
    '{"id": 1, "question": "What?", "answer": "x", "imge": "x"}': "has the key 'imge'; the keys of a question are .*an",
    '{"id": 1, "answer": "x"}': "line 1: question is None; it must be a text",
}


@pytest.mark.parametrize("line", WRONG, ids=range(len(WRONG)))
def test_rows_that_cannot_be_used(tmp_path, line):
    (tmp_path / "own.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=WRONG[line]) as told:
        opened(tmp_path / "own.jsonl")
    assert "\n" not in str(told.value)


def picture(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (48, 48), colour).save(file, "PNG")
    return file.getvalue()


def write_table(path: Path, rows: list[dict]) -> Path:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_table_in_the_form_of_vlmevalkit(tmp_path):
    red, blue = picture("red"), picture("blue")
    encoded = [base64.b64encode(each).decode() for each in (red, blue)]
    path = write_table(
        tmp_path / "own.tsv",
        [
            {"index": "7", "image": encoded[0], "question": "Which\ncolour?", "hint": 'It is "warm".', "A": "red"}
            | {"B": "None", "D": "NA", "answer": "A", "category": "colour"},
            {"index": "1000007", "image": "7", "question": "Which?", "A": "blue", "B": "red", "answer": "B"},
            {"index": "x_1", "image": str(encoded), "question": "Are they alike?", "answer": "No"},
            {"index": "9", "image_path": "a.png", "question": "What?", "answer": "a cat", "match": "exact"},
            {"index": "10", "question": "How many?", "answer": "1,000"},
        ],
    )
    found = opened(path)
    assert [row.id for row in found.rows] == [7, 1000007, "x_1", 9, 10]
    assert found.rows[0].question == (
        'Hint: It is "warm".\nQuestion: Which\ncolour?\nOptions:\nA. red\nB. None\nD. NA\n'
        "Please select the correct answer from the options above. \n"
    )
    assert found.rows[2].question == "Are they alike?"
    assert [row.sources for row in found.rows] == [[red], [red], [red, blue], [str(tmp_path / "a.png")], []]
    assert found.rows[0].images == found.rows[1].images != found.rows[2].images
    assert [known.right.match for known in found.known] == ["option", "option", "yes_no", "exact", "number"]
    assert found.known[0].right.options == {"A": "red", "B": "None", "D": "NA"}
    assert [known.category for known in found.known] == ["colour", None, None, None, None]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"index": "1", "question": "What?"}, "own.tsv has no column answer; it needs index, question, answer"),
        ({"index": "1", "question": "What?", "answer": ""}, "line 2 has no right answer"),
        ({"index": "", "question": "What?", "answer": "x"}, "line 2: id is None; it must be"),
        ({"index": "1", "question": "", "answer": "x"}, "line 2: question is None; it must be a text"),
        ({"index": "1", "question": "What?", "answer": "C", "A": "x"}, "'C' is the letter of no option"),
        (
            {"index": "1", "question": "What?", "answer": "x", "image": "8"},
            "line 2 has the image of row '8', which th",
        ),
        ({"index": "1", "question": "What?", "answer": "x", "image": "?" * 80}, "line 2: its image is not in base64"),
        ({"index": "1", "question": "What?", "answer": "x", "image": "é" * 80}, "line 2: its image is not in base64"),
        (
            {"index": "1", "question": "What?", "answer": "x", "image": "[" * 80},
            "line 2: its images are no list of te",
        ),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, row, message):
    with pytest.raises(UserError, match=message) as told:
        opened(write_table(tmp_path / "own.tsv", [row]))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("1\tWhat\tis it?\tred\n", "line 2 has more cells than there are columns: put a tab in quotes"),
        ('1\tWhat?\t"a\n2\tWhich?\tb\n', "unexpected end of data"),
        ('1\tWhat?\t"warm" red\n', "a cell with quotes has all of them twice"),
    ],
)
def test_a_table_whose_cells_have_moved(tmp_path, rows, message):
    """A tab or a quote too many would put the cells of one row, or several rows, into others."""
    (tmp_path / "own.tsv").write_text("index\tquestion\tanswer\n" + rows)
    with pytest.raises(UserError, match=message):
        opened(tmp_path / "own.tsv")


def test_ids_that_look_alike_have_draws_of_their_own(tmp_path):
    rows = [{"id": 1, "question": "What?", "answer": "x"}, {"id": "1", "question": "What?", "answer": "x"}]
    assert len({row.seed for row in opened(write_lines(tmp_path / "own.jsonl", *rows)).rows}) == 2


def test_files_that_cannot_be_used(tmp_path):
    (tmp_path / "binary.tsv").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"binary.tsv is no text in UTF-8"):
        opened(tmp_path / "binary.tsv")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"empty.jsonl has no questions"):
        opened(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match=r"none.tsv does not exist"):
        opened(tmp_path / "none.tsv")
    with pytest.raises(
        UserError, match=r"there is no benchmark mmstr: the benchmarks are shapes, mmstar, .*, and a file of one's own"
    ):
        opened("mmstr")
    with pytest.raises(UserError, match="limit is 0; it must be at least 1"):
        opened("shapes", 0)
    (tmp_path / "empty.tsv").write_text("index\tquestion\tanswer\n")
    with pytest.raises(UserError, match=r"empty.tsv has no rows below its columns"):
        opened(tmp_path / "empty.tsv")
    twice = write_lines(tmp_path / "twice.jsonl", *[{"id": 1, "question": "What?", "answer": "x"}] * 2)
    with pytest.raises(UserError, match="line 2 has the id 1 of an earlier line"):
        opened(twice)
