"""Tests of prepared rows: they equal the raw rows, and damage is found and named."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest

from llava_cot_jax.data.prepared import PreparedRows
from llava_cot_jax.data.raw import preparation
from llava_cot_jax.data.raw.preparation import prepare_dataset
from llava_cot_jax.data.rows import Row, Rows, Turn
from llava_cot_jax.data.settings import PrepareSettings
from llava_cot_jax.errors import UserError
from tests.data.raw.raw_set import RawSet, make_raw_set


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> RawSet:
    return make_raw_set(tmp_path_factory.mktemp("raw"), faults=False)


@pytest.fixture(scope="module")
def directory(raw: RawSet) -> Path:
    """A prepared data set with two shards for training."""
    folder = raw.annotations.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "SHARD_ROWS", 30)
        request = PrepareSettings(
            raw.annotations, raw.write_folder(folder / "images"), folder / "out", validation_share=0.1
        )
        prepare_dataset(request)
    return folder / "out"


@pytest.fixture
def copy(directory: Path, tmp_path: Path) -> Path:
    return shutil.copytree(directory, tmp_path / "copy")


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*-train.array_record-*"))


def expected(raw: RawSet) -> list[Row]:
    """Rows of both splits by line, made from the raw data set."""
    rows = []
    for row in raw.rows.values():
        texts = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"]]
        turns = tuple(map(Turn, texts[::2], texts[1::2], [1] + [0] * len(texts)))
        rows.append(Row(row["id"], row["image"].split("/")[0], (raw.files[row["image"]],), turns))
    return rows


class TestRows:
    def test_all_of_them_in_their_order(self, raw: RawSet, directory: Path) -> None:
        train, validation = PreparedRows(directory, "train"), PreparedRows(directory, "validation")
        assert len(shards(directory)) == 2
        assert 0 < len(validation) < 20
        rows = expected(raw)
        in_validation = [validation[i] for i in range(len(validation))]
        assert in_validation == [row for row in rows if row in in_validation]
        assert [train[i] for i in range(len(train))] == [row for row in rows if row not in in_validation]

    def test_turns_are_those_of_the_rows(self, directory: Path) -> None:
        rows = PreparedRows(directory, "train")
        assert [rows.turns(i) for i in range(len(rows))] == [rows[i].turns for i in range(len(rows))]

    def test_turns_read_no_record(self, copy: Path) -> None:
        for shard in shards(copy):
            shard.unlink()
        rows: Rows = PreparedRows(copy, "train")
        assert all(rows.turns(i) for i in range(len(rows)))

    def test_another_process_opens_them_anew(self, directory: Path) -> None:
        rows = PreparedRows(directory, "train")
        before, size = rows[3], len(pickle.dumps(rows))
        again = pickle.loads(pickle.dumps(rows))
        assert (again[3], again.turns(3), again.fingerprint) == (before, before.turns, rows.fingerprint)
        assert size < 1000

    def test_out_of_range(self, directory: Path) -> None:
        rows = PreparedRows(directory, "train")
        for index in (-1, len(rows)):
            with pytest.raises(IndexError):
                rows[index]
            with pytest.raises(IndexError):
                rows.turns(index)


class TestFingerprint:
    def test_of_directory_and_split(self, directory: Path, copy: Path) -> None:
        assert PreparedRows(directory, "train").fingerprint == PreparedRows(copy, "train").fingerprint
        assert PreparedRows(directory, "train").fingerprint != PreparedRows(directory, "validation").fingerprint

    def test_changes_with_the_set(self, directory: Path, raw: RawSet, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_bytes(raw.annotations.read_bytes().replace(b"And now?", b"And then?"))
        images = directory.parent / "images"
        fingerprints = {PreparedRows(directory, "train").fingerprint}
        requests = [
            PrepareSettings(tmp_path / "a.jsonl", images, tmp_path / "1", validation_share=0.1),
            PrepareSettings(raw.annotations, images, tmp_path / "2", validation_share=0.2),
            PrepareSettings(raw.annotations, images, tmp_path / "3", validation_share=0.1, max_side=10),
            PrepareSettings(raw.annotations, images, tmp_path / "4", validation_share=0.1, limit=50),
        ]
        for request in requests:
            prepare_dataset(request)
            fingerprints.add(PreparedRows(request.output, "train").fingerprint)
        image = images / "sqa/train/0/image.png"
        time = image.stat().st_mtime_ns
        os.utime(image, ns=(time + 1_000_000_000, time + 1_000_000_000))
        prepare_dataset(PrepareSettings(raw.annotations, images, tmp_path / "5", validation_share=0.1))
        os.utime(image, ns=(time, time))
        fingerprints.add(PreparedRows(tmp_path / "5", "train").fingerprint)
        assert len(fingerprints) == 6


class TestRefusal:
    def test_nothing_prepared(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"is no prepared data set .* make one with llava-cot prepare"):
            PreparedRows(tmp_path, "train")
        with pytest.raises(UserError, match="is no prepared data set"):
            PreparedRows(tmp_path / "nowhere", "train")

    def test_no_such_split(self, directory: Path) -> None:
        with pytest.raises(
            UserError, match=r"has no rows in split 'test', only in train and validation: name one.*validation_data"
        ):
            PreparedRows(directory, "test")

    @pytest.mark.parametrize("content", ["{", "[]", "{}", '{"splits": {"train": 3}}'])
    def test_damaged_description(self, copy: Path, content: str) -> None:
        (copy / "prepared.json").write_text(content)
        with pytest.raises(UserError, match=r"prepared\.json"):
            PreparedRows(copy, "train")

    @pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
    def test_damaged_description_of_tfds(self, copy: Path, name: str) -> None:
        (copy / name).write_text("{")
        with pytest.raises(UserError, match=f"{name}.* is damaged: prepare the data anew"):
            PreparedRows(copy, "train")[0]


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 16]))


class TestDamage:
    def test_a_flipped_bit_in_any_image(self, copy: Path) -> None:
        """The records lie in the shards uncompressed, so each image can be found there."""
        sound = PreparedRows(copy, "train")
        images = [sound[i].images[0] for i in range(len(sound))]
        for i, image in enumerate(images):
            shard = shards(copy)[i >= 30]
            assert isinstance(image, bytes)
            # Where two rows share a picture, the record of the first.
            at = shard.read_bytes().find(image[100:200])
            flip(shard, at)
            first = next(j for j, other in enumerate(images) if other == image and (j >= 30) == (i >= 30))
            with pytest.raises(
                UserError, match=rf"record {first} of the split 'train' is damaged: restore {shard}, or "
            ):
                PreparedRows(copy, "train")[first]
            neighbour = (first + 1) % len(images)
            assert PreparedRows(copy, "train")[neighbour].images[0] == images[neighbour]
            flip(shard, at)
        assert [sound[i].images[0] for i in range(len(sound))] == images

    @pytest.mark.slow
    def test_a_flipped_bit_anywhere_gives_the_row_or_an_error(self, copy: Path) -> None:
        """Record heads, texts, the shard's own index and padding too: never another row, never a crash."""
        shard = shards(copy)[0]
        sound = PreparedRows(copy, "train")
        whole = [sound[i] for i in range(30)]
        noticed = 0
        for at in range(0, shard.stat().st_size, 1499):
            flip(shard, at)
            rows = PreparedRows(copy, "train")
            failed = []
            for i, row in enumerate(whole):
                try:
                    assert rows[i] == row
                except UserError as fault:
                    assert str(shard) in str(fault)
                    failed.append(i)
            noticed += bool(failed)
            flip(shard, at)
        # The rest is padding between the records and the index.
        assert noticed > sum(len(image) for row in whole for image in row.images if isinstance(image, bytes)) / 1499

    @pytest.mark.parametrize("size", [0, 100, 65536, -1])
    def test_a_shard_cut_short(self, copy: Path, size: int) -> None:
        shard = shards(copy)[1]
        os.truncate(shard, size if size >= 0 else shard.stat().st_size - 1)
        rows = PreparedRows(copy, "train")
        assert rows[0]
        with pytest.raises(UserError, match=f"record 30 .* restore {shard}"):
            rows[30]

    def test_a_missing_shard(self, copy: Path) -> None:
        shards(copy)[1].unlink()
        with pytest.raises(UserError, match=f"restore {shards(copy)[0].with_name('llava_cot_100k-train')}.*00001"):
            PreparedRows(copy, "train")[30]


class TestConversations:
    def edit(self, copy: Path, change: slice, new: list[str]) -> None:
        path = copy / "train.turns.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        lines[change] = new
        path.write_text("".join(lines))

    def test_too_few_lines(self, copy: Path) -> None:
        self.edit(copy, slice(4, 5), [])
        count = len(PreparedRows(copy, "train"))
        with pytest.raises(UserError, match=rf"train\.turns\.jsonl has {count - 1} lines, not {count}: prepare"):
            PreparedRows(copy, "train").turns(0)

    def test_a_damaged_line(self, copy: Path) -> None:
        self.edit(copy, slice(4, 5), ["{}\n"])
        rows = PreparedRows(copy, "train")
        assert rows.turns(3)
        with pytest.raises(UserError, match=r"train\.turns\.jsonl, line 5 is damaged"):
            rows.turns(4)

    def test_a_line_of_another_row(self, copy: Path) -> None:
        line = json.dumps({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]})
        self.edit(copy, slice(4, 5), [line + "\n"])
        rows = PreparedRows(copy, "train")
        assert rows.turns(4) == (Turn("a", "b", images=1),)
        with pytest.raises(UserError, match=r"train\.turns\.jsonl, line 5 differs from its record"):
            rows[4]

    def test_none(self, copy: Path) -> None:
        (copy / "train.turns.jsonl").unlink()
        with pytest.raises(UserError, match=r"train\.turns\.jsonl does not exist"):
            PreparedRows(copy, "train").turns(0)
