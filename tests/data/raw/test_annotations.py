"""Tests that rows are checked against the format, and that faulty rows are skipped with their fault."""

import hashlib
import json
from pathlib import Path

import pytest

from llava_cot_jax.data.raw.annotations import (
    in_validation,
    make_turns,
    open_annotations,
    read_annotations,
    read_conversations,
)
from llava_cot_jax.data.raw.images import ImageFolder
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


@pytest.mark.parametrize("line", [b"[" * 100_000, b'{"id": "\xff"}', b"nonsense", b'{"id": 1' + b"0" * 5000 + b"}"])
def test_what_is_no_json(images: ImageFolder, tmp_path: Path, line: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(line)
    (row,) = read_annotations(tmp_path / "a.jsonl", images).skipped
    assert row.reason == "broken JSON"
    assert row.detail


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
            ([{"from": "human", "value": 3}, *said("b", first=1)], "turn 1 is empty"),
            (["a", "b"], "turn 1 is from None"),
        ],
    )
    def test_faults(self, conversations: list, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make_turns(conversations, images=1)


PATHS = [f"sqa/{i}.png" for i in range(20_000)]


class TestValidation:
    def test_share(self) -> None:
        # Six standard deviations of a fair draw.
        assert abs(sum(in_validation(path, 0.01) for path in PATHS) - 200) < 85
        assert abs(sum(in_validation(path, 0.5) for path in PATHS) - 10_000) < 425
        assert not any(in_validation(path, 0) for path in PATHS)

    def test_a_larger_share_keeps_what_a_smaller_one_has(self) -> None:
        assert {p for p in PATHS if in_validation(p, 0.01)} < {p for p in PATHS if in_validation(p, 0.02)}
