"""Tests that rows are checked against the format, and that faulty rows are skipped with their fault."""

import hashlib
import json
import random
from dataclasses import asdict
from pathlib import Path

import pytest

from llava_cot_jax.data.raw.annotations import (
    UNKNOWN_SOURCE,
    AnnotationRow,
    in_validation,
    link_images,
    make_turns,
    open_annotations,
    read_annotations,
    read_conversations,
)
from llava_cot_jax.data.raw.images import ImageFolder
from llava_cot_jax.data.raw.names import Found, Match
from llava_cot_jax.data.rows import Turn
from llava_cot_jax.errors import UserError
from tests.data.raw.raw_set import RawSet, make_raw_set


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> RawSet:
    return make_raw_set(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def images(raw: RawSet) -> ImageFolder:
    return ImageFolder(raw.write_folder(raw.annotations.parent / "images"))


def test_every_planted_fault_and_no_other(raw: RawSet, images: ImageFolder) -> None:
    read = read_annotations(raw.annotations, images)
    seen_by_decoding = {line: reason for line, reason in raw.skipped.items() if reason == "broken image"}
    assert {row.line: row.reason for row in read.skipped} | seen_by_decoding == raw.skipped
    assert [entry.line for entry in read.entries] == sorted([*raw.rows, *seen_by_decoding])
    assert read.sha256 == hashlib.sha256(raw.annotations.read_bytes()).hexdigest()


def test_a_row_is_found_again_by_its_place(raw: RawSet, images: ImageFolder) -> None:
    entries = [entry for entry in read_annotations(raw.annotations, images).entries if entry.line in raw.rows]
    with open_annotations(raw.annotations) as file:
        for entry in reversed(entries):
            row = raw.rows[entry.line]
            assert (entry.id, entry.image_paths) == (row["id"], (row["image"],))
            assert entry.source == row["image"].split("/")[0]
            assert read_conversations(file, entry) == row["conversations"]


def test_limit_counts_lines(raw: RawSet, images: ImageFolder) -> None:
    read = read_annotations(raw.annotations, images, limit=7)
    assert [row.line for row in read.entries] == [1, 2, 4, 5, 7]
    assert [row.line for row in read.skipped] == [3, 6]


def test_blank_lines_are_no_rows(raw: RawSet, images: ImageFolder, tmp_path: Path) -> None:
    lines = raw.annotations.read_bytes().splitlines()
    (tmp_path / "blank.jsonl").write_bytes(b"\n" + lines[0] + b"\n \r\n" + lines[1])
    read = read_annotations(tmp_path / "blank.jsonl", images)
    assert [entry.line for entry in read.entries] == [2, 4]
    assert read.skipped == []


@pytest.mark.parametrize(
    ("line", "detail"),
    [
        (b"Access denied", "Expecting value, at character 1: 'Access denied'"),
        (b'{"id": 1} {"id": 2}', "Extra data, at character 11: '{\"id\": 2}'"),
        (b'{"id": "abc', "Unterminated string starting, at character 8: '\"abc'"),
        (b'{"id": 1', "Expecting ',' delimiter, at its end"),
        (b'{"id": "\xe9"}', "byte 9 of it, 0xe9, is not UTF-8"),
    ],
)
def test_what_is_no_json_is_shown(images: ImageFolder, tmp_path: Path, line: bytes, detail: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(line)
    (row,) = read_annotations(tmp_path / "a.jsonl", images).skipped
    assert (row.reason, row.detail) == ("broken JSON", detail)


@pytest.mark.parametrize("content", ["\n \n", "[]", " [ ]\n", "\ufeff"])
def test_a_file_without_rows(images: ImageFolder, tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=r"^annotations .*a\.json has no rows: fetch it again, or name another file$"):
        read_annotations(tmp_path / "a.json", images)
    with pytest.raises(UserError, match="has no rows in its first 2 lines"):
        read_annotations(tmp_path / "a.json", images, limit=2)


def test_lines_that_end_in_commas(raw: RawSet, images: ImageFolder, tmp_path: Path) -> None:
    lines = raw.annotations.read_bytes().splitlines()[:2]
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines[0] + b",\n" + lines[1] + b" ,\r\n,\n")
    read = read_annotations(path, images)
    assert [entry.line for entry in read.entries] == [1, 2] and not read.skipped
    with open_annotations(path) as file:
        assert [read_conversations(file, entry) for entry in read.entries] == [
            json.loads(line)["conversations"] for line in lines
        ]


@pytest.mark.parametrize("line", [b"[" * 100_000, b'{"id": "\xff"}', b"nonsense", b'{"id": 1' + b"0" * 5000 + b"}"])
def test_what_is_no_json(images: ImageFolder, tmp_path: Path, line: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(line)
    (row,) = read_annotations(tmp_path / "a.jsonl", images).skipped
    assert row.reason == "broken JSON"
    assert row.detail


def test_a_row_of_another_format_is_told_by_its_keys(images: ImageFolder, tmp_path: Path) -> None:
    for content, detail in (
        ({"image": "a.png", "dialog": [{}]}, "it has no list under conversations, only image, dialog"),
        ({}, "it has no list under conversations, only nothing"),
        ({"conversations": "hello"}, "its conversations are 'hello', not a list of turns"),
        ([[1]], "it is [1], a list, not a JSON object"),
    ):
        (tmp_path / "a.jsonl").write_text(json.dumps(content))
        (row,) = read_annotations(tmp_path / "a.jsonl", images).skipped
        assert (row.reason, row.detail) == ("no conversation", detail)


@pytest.mark.parametrize("image", [None, "", [], 7, [7], ["sqa/train/0/image.png", ""], {"path": "a.png"}])
def test_no_image(images: ImageFolder, tmp_path: Path, image: object) -> None:
    talk = said("<image>\nWhat is it?", "A dot.")
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "a", "image": image, "conversations": talk}))
    (row,) = read_annotations(tmp_path / "a.jsonl", images).skipped
    assert row.reason == "no image"


def test_no_file(images: ImageFolder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"annotations .*nowhere\.jsonl cannot be read: No such file"):
        read_annotations(tmp_path / "nowhere.jsonl", images)


def said(*texts: str, first: int = 0) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[(i + first) % 2], "value": text} for i, text in enumerate(texts)]


class TestTurns:
    def test_as_they_are(self) -> None:
        turns = make_turns(said("<image>\n a? ", " b", "c?", "d\n"), images=1)
        assert turns == (Turn("a? ", " b", images=1), Turn("c?", "d\n"))

    @pytest.mark.parametrize(
        ("conversations", "message"),
        [
            ([], "there are no turns"),
            (said("a"), "the last question has no answer"),
            (said("a", "b", "c"), "the last question has no answer"),
            (said("a", "b", first=1), "turn 1 is from 'gpt', not from human"),
            ([*said("a"), *said("b")], "turn 2 is from 'human', not from gpt"),
            (said("a", " \n"), "turn 2 is empty"),
            (said("\n<image>", "b"), "turn 1 is empty"),
            ([{"from": "human", "value": 3}, *said("b", first=1)], "turn 1 has 3 in place of a text"),
            ([*said("a"), {"from": "gpt", "value": None}], "turn 2 has None in place of a text"),
            ([{"from": "human", "value": [{"type": "image"}]}], "turn 1 has .* a list in place of a text: write its"),
            ([{"from": "human"}, *said("b", first=1)], "turn 1 has no value, only from"),
            ([{}], "turn 1 has no from and no value, only nothing"),
            (["a", "b"], "turn 1 is 'a', not an object with from and value"),
        ],
    )
    def test_faults(self, conversations: list, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make_turns(conversations, images=1)

    @pytest.mark.parametrize(
        ("questions", "images", "placed"),
        [
            (["<image>\na", "b"], 1, [("a", 1), ("b", 0)]),
            (["a", "b"], 1, [("a", 1), ("b", 0)]),
            (["a", "<image>\nb"], 1, [("a", 0), ("b", 1)]),
            (["<image>\n<image>\na", "<image>\nb"], 3, [("a", 2), ("b", 1)]),
            (["<image>\na", "<image>\nb"], 1, [("a", 1), ("b", 0)]),  # too many: all come first
            (["<image>\na", "b"], 3, [("a", 3), ("b", 0)]),
            (["Tell <image> from <image>.", "b"], 2, [("Tell <image> from <image>.", 2), ("b", 0)]),
            (["a", "b"], 0, [("a", 0), ("b", 0)]),
        ],
    )
    def test_images_come_before_the_question_of_their_marker(self, questions, images, placed) -> None:
        turns = make_turns(said(questions[0], "A <image>.", questions[1], "B"), images)
        assert [(turn.question, turn.images) for turn in turns] == placed
        assert [turn.answer for turn in turns] == ["A <image>.", "B"]

    def test_the_system_speaks_first(self) -> None:
        talk = [{"from": "system", "value": "Be brief."}, *said("a", "b", "c", "d")]
        assert make_turns(talk, 1) == (Turn("a", "b", 1, system="Be brief."), Turn("c", "d"))
        assert make_turns([{"from": "system", "value": ""}, *talk[1:3]], 0) == (Turn("a", "b"),)
        with pytest.raises(ValueError, match="turn 3 is from 'system', not from human"):
            make_turns([*talk[1:3], talk[0], *talk[1:3]], 1)
        with pytest.raises(ValueError, match="the last question has no answer"):
            make_turns(talk[:1], 1)


def read_one(images: ImageFolder, folder: Path, row: dict | bytes):
    (folder / "a.jsonl").write_bytes(row if isinstance(row, bytes) else json.dumps(row).encode())
    read = read_annotations(folder / "a.jsonl", images)
    (row,) = read.entries + read.skipped
    return row


PICTURES = [f"sqa/train/{i}/image.png" for i in range(3)]


@pytest.mark.parametrize(
    ("given", "paths"),
    [
        ({"image": PICTURES[0]}, PICTURES[:1]),
        ({"image": PICTURES[:1]}, PICTURES[:1]),
        ({"image": PICTURES}, PICTURES),
        ({"images": PICTURES[1:]}, PICTURES[1:]),
        ({"images": PICTURES[2]}, PICTURES[2:]),
        ({}, []),
        ({"image": None}, []),
        ({"images": []}, []),
    ],
)
def test_images_of_a_row(images: ImageFolder, tmp_path: Path, given: dict, paths: list[str]) -> None:
    row = read_one(images, tmp_path, {"id": "a", "conversations": said("What is it?", "A dot.")} | given)
    assert row.image_paths == tuple(paths) and [image.name for image in row.images] == paths
    assert row.source == ("sqa" if paths else UNKNOWN_SOURCE)


def test_one_missing_image_of_several(images: ImageFolder, tmp_path: Path) -> None:
    talk = said("What is it?", "A dot.")
    row = read_one(images, tmp_path, {"id": "a", "image": [PICTURES[0], "sqa/gone.png"], "conversations": talk})
    assert (row.reason, row.image, row.source) == ("missing image", "sqa/gone.png", "sqa")


@pytest.mark.parametrize(
    ("texts", "count", "remarks"),
    [
        (["<image>\na", "b"], 1, []),
        (["a", "b"], 1, []),
        (["<image>\n<image>\na", "b"], 1, ["more markers than images"]),
        (["<image>\na", "b", "<image>\nc", "d"], 1, ["more markers than images", "markers in later turns"]),
        (["a", "b", "<image>\nc", "d"], 1, ["markers in later turns"]),
        (["<image>\na", "b"], 3, ["fewer markers than images"]),
        (["<image>\na", "A ![link](<image>)."], 1, ["markers kept as text"]),
        (["Is <image> a tag?", "Yes."], 0, ["markers kept as text"]),
    ],
)
def test_markers_out_of_place_are_remarked(
    images: ImageFolder, tmp_path: Path, texts: list[str], count: int, remarks: list[str]
) -> None:
    row = read_one(images, tmp_path, {"image": PICTURES[:count], "conversations": said(*texts)})
    assert list(row.remarks) == remarks


@pytest.mark.parametrize(
    "token", ["<|eot_id|>", "<|image|>", "<|begin_of_text|>", "<|reserved_special_token_247|>", "<|python_tag|>"]
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_control_token_spelled_out(images: ImageFolder, tmp_path: Path, token: str, place: int) -> None:
    talk = [{"from": "system", "value": "s"}, *said("a", "b")]
    talk[place]["value"] += f" {token} c"
    row = read_one(images, tmp_path, {"image": PICTURES[0], "conversations": talk})
    assert (row.reason, row.detail) == ("bad text", f"turn {place + 1} spells the control token {token}")


@pytest.mark.parametrize("text", ["<|other|>", "<| eot_id |>", "</s>", "<SUMMARY>", "<|reserved_special_token_|>"])
def test_what_only_looks_like_a_control_token(images: ImageFolder, tmp_path: Path, text: str) -> None:
    assert read_one(images, tmp_path, {"image": PICTURES[0], "conversations": said("a", text)}).unstaged == 1


@pytest.mark.parametrize("half", [b"\\ud83d", b"\xed\xa0\xbd"], ids=["escaped", "in bytes"])
@pytest.mark.parametrize("field", ["id", "image", "value"])
def test_half_of_a_surrogate_pair(images: ImageFolder, tmp_path: Path, half: bytes, field: str) -> None:
    row = {"id": "a", "image": PICTURES[0], "conversations": said("a", "b")}
    line = json.dumps(row).encode().replace(f'"{field}": "'.encode(), f'"{field}": "'.encode() + half)
    found = read_one(images, tmp_path, line)
    assert found.reason == ("bad text" if half.startswith(b"\\") else "broken JSON")
    json.dumps(asdict(found), ensure_ascii=False).encode()


def test_rows_that_share_an_image_are_linked() -> None:
    """Against the connected components of a graph, found by brute force."""
    draw = random.Random(0)
    # Every file has two paths, and rows name it by either.
    numbers = [[draw.randrange(80) for _ in range(draw.choice([0, 1, 1, 2, 3]))] for _ in range(40)]
    rows = [[Found(f"{number // 2}.png", f"{number:02}", Match.OTHER_FOLDER) for number in some] for some in numbers]
    linked = link_images([AnnotationRow(1, 0, 0, "", "", tuple(found), (), 0) for found in rows])
    groups = [{text for one in found for text in (one.path, one.name)} for found in rows if found]
    for _ in range(len(groups)):
        groups = [set().union(*(other for other in groups if other & group)) for group in groups]
    paths = [{text for text in group if not text.endswith(".png")} for group in groups]
    expected = {path: min(group) for group in paths for path in group}
    assert {path: linked[path] for path in expected} == expected


PATHS = [f"sqa/{i}.png" for i in range(20_000)]


class TestValidation:
    def test_share(self) -> None:
        # Six standard deviations of a fair draw.
        assert abs(sum(in_validation(path, 0.01) for path in PATHS) - 200) < 85
        assert abs(sum(in_validation(path, 0.5) for path in PATHS) - 10_000) < 425
        assert not any(in_validation(path, 0) for path in PATHS)

    def test_a_larger_share_keeps_what_a_smaller_one_has(self) -> None:
        assert {p for p in PATHS if in_validation(p, 0.01)} < {p for p in PATHS if in_validation(p, 0.02)}
