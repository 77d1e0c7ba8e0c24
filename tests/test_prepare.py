"""Tests of the prepare command: its output, counts and errors, and results that no interruption changes."""

import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import tensorflow_datasets as tfds
from PIL import Image

from llava_cot_jax import cli
from llava_cot_jax.data.prepared import PreparedRows
from llava_cot_jax.data.raw import checks, preparation
from llava_cot_jax.data.raw.preparation import prepare_dataset
from llava_cot_jax.data.raw.work_folder import WorkFolder
from llava_cot_jax.data.settings import PrepareSettings
from llava_cot_jax.data.workers import parallel
from llava_cot_jax.errors import UserError
from llava_cot_jax.prepare import main
from tests.data.raw.raw_set import SOURCES, RawSet, make_raw_set

ROOT = Path(__file__).parents[1]

SMALL = {"SHARD_BYTES": 40_000, "CHECK_IMAGES": 8}
"""Makes several shards and several chunks of checks of the small set."""


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> RawSet:
    """A raw data set with every fault, in a split zip."""
    raw = make_raw_set(tmp_path_factory.mktemp("raw"))
    raw.write_parts(raw.annotations.parent / "hub")
    return raw


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(preparation, name, value)


def arguments(raw: RawSet, output: Path, *more: str) -> list[str]:
    """Arguments of a run in one process that skips unusable rows; ``more`` overrides them."""
    files = ["--annotations", str(raw.annotations), "--images", str(raw.annotations.parent / "hub")]
    numbers = ["--allow_missing", str(len(raw.skipped)), "--validation_share", "0.1", "--workers", "0"]
    return [*files, "--output", str(output), *numbers, *more]


@pytest.fixture(scope="module")
def undisturbed(raw: RawSet) -> dict[str, bytes]:
    """Output of an undisturbed run, by file name."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(preparation, name, value)
        main(arguments(raw, raw.annotations.parent / "undisturbed"))
    return tree(raw.annotations.parent / "undisturbed")


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(command: list[str], before: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, after the Python code ``before``."""
    code = (
        "import os, signal\n"
        # A shell's background jobs, and all that they start, ignore it.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"from llava_cot_jax import cli\nfrom llava_cot_jax.data.raw import preparation, work_folder\n"
        f"vars(preparation).update({SMALL})\n{before}\n"
        "import runpy; runpy.run_module('llava_cot_jax.prepare', run_name='__main__')"
    )
    process = [sys.executable, "-c", code, *command]
    # Into files: a pipe would stay open as long as any worker lives.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        ended = subprocess.run(process, stdout=out, stderr=err, cwd=ROOT, start_new_session=True)
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(process, ended.returncode, out.read(), err.read())


def count_calls(patch: pytest.MonkeyPatch, module: ModuleType, name: str) -> list[object]:
    """Let a function of a module go on as before, and return a list of its first arguments."""
    calls, original = [], getattr(module, name)

    def counted(first: object, *more: object) -> object:
        calls.append(first)
        return original(first, *more)

    patch.setattr(module, name, counted)
    return calls


class TestResult:
    def test_every_fault_is_counted_and_named(
        self, raw: RawSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out, count = tmp_path / "out", len(raw.skipped)
        with pytest.raises(UserError, match=rf"^{count} of {count + len(raw.rows)} rows .* --allow_missing {count}$"):
            main(arguments(raw, out, "--allow_missing", str(count - 1)))
        refused = capsys.readouterr().out
        assert not out.exists()
        names = tmp_path / "out.preparing/result/skipped.jsonl"
        assert {row["line"]: row["reason"] for row in map(json.loads, names.open())} == raw.skipped

        main(arguments(raw, out))
        images = len({row["image"] for row in raw.rows.values()}) + 2  # and two that are broken
        reused = f"0 images were checked now, and {images} in an earlier run\n"
        assert capsys.readouterr().out == reused + refused
        assert {row["line"]: row["reason"] for row in map(json.loads, (out / "skipped.jsonl").open())} == raw.skipped
        description = json.loads((out / "prepared.json").read_text())
        totals: Counter[str] = sum(map(Counter, description["sources"].values()), Counter())
        assert totals == {
            "rows": count + len(raw.rows),
            "train": description["splits"]["train"],
            "validation": description["splits"]["validation"],
            **Counter(raw.skipped.values()),
            "unstaged answers": 1,
            "repeated ids": 1,
        }
        assert totals["train"] + totals["validation"] == len(raw.rows)
        assert set(description["sources"]) == {*SOURCES, "(unknown)"}
        # Missing images are counted by source; a path that leads out has none.
        missing = {name: row.get("missing image", 0) for name, row in description["sources"].items()}
        assert +Counter(missing) == {"chartqa": 1, "(unknown)": 2}
        assert description["unnamed_images"] == 1
        assert list(tmp_path.iterdir()) == [tmp_path / "out"]

    def test_the_table(self, raw: RawSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        main(arguments(raw, tmp_path / "out"))
        *_, last, total, images = capsys.readouterr().out.splitlines()
        source, rows, train, validation, *others = last.split()
        assert (source, rows, int(train) + int(validation)) == ("vg", "10", 10)
        assert set(others) == {"0"}
        assert images == "files that no row names: 1"
        cells = [int(cell) for cell in total.split()[1:]]
        assert total.split()[0] == "all"
        assert cells[0] == sum(cells[1:3]) + sum(cells[3:10]) == len(raw.rows) + len(raw.skipped)

    def test_tfds_opens_it(self, raw: RawSet, tmp_path: Path) -> None:
        main(arguments(raw, tmp_path / "out", "--validation_share", "0.3"))
        builder = tfds.builder_from_directory(tmp_path / "out")
        found, images = {}, {}
        for split in ("train", "validation"):
            records = builder.as_data_source(split)
            lines = [int(record["line"]) for record in records]
            assert lines == sorted(lines)
            assert builder.info.splits[split].num_shards > 1
            images[split] = {path for record in records for path in record["image_paths"]}
            for line, record in zip(lines, records, strict=True):
                row = raw.rows[line]
                assert record["id"].decode() == row["id"]
                assert list(record["images"]) == [raw.files[row["image"]]]
                found[line] = row
        assert found == raw.rows
        assert images["train"].isdisjoint(images["validation"])

    def test_a_folder_and_a_zip_give_the_same(self, raw: RawSet, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
        for images in (raw.write_folder(tmp_path / "folder", "images"), raw.write_zip(tmp_path / "whole.zip", "./")):
            main(arguments(raw, tmp_path / f"of_{images.name}", "--images", str(images)))
            result = tree(tmp_path / f"of_{images.name}")
            assert result.pop("prepared.json") != undisturbed["prepared.json"]
            assert result.items() <= undisturbed.items()

    def test_without_validation(self, raw: RawSet, tmp_path: Path) -> None:
        main(arguments(raw, tmp_path / "out", "--validation_share", "0"))
        assert len(PreparedRows(tmp_path / "out", "train")) == len(raw.rows)
        with pytest.raises(UserError, match="no rows in split 'validation', only in train"):
            PreparedRows(tmp_path / "out", "validation")

    def test_smaller_images(self, raw: RawSet, tmp_path: Path) -> None:
        main(arguments(raw, tmp_path / "out", "--max_side", "40"))
        rows = PreparedRows(tmp_path / "out", "train")
        for row in (rows[i] for i in range(len(rows))):
            kept = row.images[0] in raw.files.values()
            assert kept == (row.source == "sqa" or "unusual" in row.id), row.id  # the others are wider

    def test_limit(self, raw: RawSet, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()  # an empty folder is as good as none
        main(arguments(raw, tmp_path / "out", "--limit", "10"))
        description = json.loads((tmp_path / "out/prepared.json").read_text())
        assert sum(description["splits"].values()) == sum(line <= 10 for line in raw.rows)


class TestNames:
    def test_images_by_other_names(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        raw = make_raw_set(tmp_path, faults=False)
        folder = raw.write_folder(tmp_path / "images")
        rows = [json.loads(line) for line in raw.annotations.open()]
        for i, respell in enumerate(
            (
                lambda path: path.replace("/", "\\"),
                str.upper,
                lambda path: f"{folder}/{path}",
                lambda path: f"/elsewhere/pictures/{path}",
            )
        ):
            rows[i]["image"] = respell(rows[i]["image"])
        (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, rows)))
        command = arguments(raw, tmp_path / "out", "--images", str(folder), "--allow_missing", "0")
        main([*command, "--output", str(tmp_path / "named")])
        capsys.readouterr()
        main([*command, "--annotations", str(tmp_path / "other.jsonl")])
        *_, table = capsys.readouterr().out.split("source", 1)
        assert "spelling  path  folder" in table
        (sqa,) = (line.split() for line in table.splitlines() if line.startswith("sqa "))
        assert sqa[4:] == ["2", "1", "1", "0", "0"]
        same = tree(tmp_path / "named")
        assert {**tree(tmp_path / "out"), "prepared.json": same["prepared.json"]} == same  # and so are the splits

    def test_a_folder_too_deep(self, tmp_path: Path) -> None:
        """The images of one set, which has files of the same names as the others, are not taken for all."""
        raw = make_raw_set(tmp_path, faults=False)
        folder = raw.write_folder(tmp_path / "data/pictures")
        command = arguments(raw, tmp_path / "out", "--images", str(folder / "vg"), "--allow_missing", "0")
        with pytest.raises(UserError) as refusal:
            main(command)
        names = tmp_path / "out.preparing/result/skipped.jsonl"
        assert str(refusal.value) == (
            f"45 of 55 rows cannot be used, {names} says why (line 1, missing image: train/0/image.png is there, but "
            f"rows with another folder in place of sqa name it too, but {folder} has 45 of 45 images that are missing: "
            "name it by --images): correct them, or leave them out by --allow_missing 45"
        )
        assert not [line for line in names.open() if json.loads(line)["source"] == "vg"]


class TestForms:
    def test_files_in_another_form_in_place_of_images(self, raw: RawSet, tmp_path: Path) -> None:
        rows = [raw.rows[1] | {"image": name} for name in ("a.png", "b.png")]
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (tmp_path / "images").mkdir()
        (tmp_path / "images/a.png").write_bytes(gzip.compress(b"", mtime=0))
        (tmp_path / "images/b.png").write_bytes(b"<svg/>")
        files = ["--annotations", str(tmp_path / "a.jsonl"), "--images", str(tmp_path / "images")]
        with pytest.raises(UserError, match="none of the 2 rows can be used"):
            main(arguments(raw, tmp_path / "out", *files))
        skipped = map(json.loads, (tmp_path / "out.preparing/result/skipped.jsonl").open())
        assert [row["detail"] for row in skipped] == [
            "it is a file compressed by gzip: put the image in its place",
            "it is an XML file: put the image in its place",
        ]

    def test_turns_of_chat_apis_give_the_same_rows(self, raw: RawSet, tmp_path: Path) -> None:
        names = {"human": "user", "gpt": "assistant"}
        other = dict(raw.rows[1])
        turns = other.pop("conversations")
        other["messages"] = [{"role": names[turn["from"]], "content": turn["value"]} for turn in turns]
        for name, row in {"llava": raw.rows[1], "chat": other}.items():
            (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
            files = ["--annotations", str(tmp_path / f"{name}.jsonl"), "--validation_share", "0"]
            main(arguments(raw, tmp_path / name, *files))
        llava, chat = (PreparedRows(tmp_path / name, "train") for name in ("llava", "chat"))
        assert llava[0] == chat[0] and llava.turns(0) == chat.turns(0)

    def test_rows_without_an_id_repeat_none(self, raw: RawSet, tmp_path: Path) -> None:
        rows = [{key: value for key, value in raw.rows[1].items() if key != "id"} | more for more in ({}, {"id": None})]
        rows += [raw.rows[1], raw.rows[1]]
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
        main(arguments(raw, tmp_path / "out", "--annotations", str(tmp_path / "a.jsonl")))
        (counts,) = json.loads((tmp_path / "out/prepared.json").read_text())["sources"].values()
        assert (counts["rows"], counts["repeated ids"]) == (4, 1)

    def test_an_array_gives_the_same_rows(self, raw: RawSet, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
        rows = [raw.rows[line] for line in sorted(raw.rows)]
        (tmp_path / "rows.json").write_text(json.dumps(rows, indent=2, ensure_ascii=False))
        main(arguments(raw, tmp_path / "out", "--annotations", str(tmp_path / "rows.json"), "--allow_missing", "0"))
        for name in ("train.turns.jsonl", "validation.turns.jsonl"):
            assert (tmp_path / "out" / name).read_bytes() == undisturbed[name]

    @pytest.mark.parametrize("quoted", [True, False])
    def test_a_pattern_of_parts(self, raw: RawSet, tmp_path: Path, quoted: bool) -> None:
        hub = raw.annotations.parent / "hub"
        named = [f"{hub}/image.zip.part-*"] if quoted else [str(path) for path in sorted(hub.iterdir())]
        main(arguments(raw, tmp_path / "out", "--limit", "4", "--images", *named))
        (tmp_path / "prepare.yaml").write_text(json.dumps({"images": named}))
        main(arguments(raw, tmp_path / "again", "--limit", "4", "--config", str(tmp_path / "prepare.yaml")))
        assert tree(tmp_path / "again") == tree(tmp_path / "out")

    def test_pointers_in_place_of_images(self, raw: RawSet, tmp_path: Path) -> None:
        folder = raw.write_folder(tmp_path / "images")
        for path in [*folder.rglob("*.png"), *folder.rglob("*.jpg")]:
            path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        with pytest.raises(UserError, match=r"none of the \d+ rows .* broken image: it is a pointer of Git LFS"):
            main(arguments(raw, tmp_path / "out", "--images", str(folder)))


class TestDisk:
    def test_the_zip_is_never_joined_nor_unpacked(self, tmp_path: Path) -> None:
        """The disk never holds more than the images once, as records, and a little."""
        raw = make_raw_set(tmp_path, faults=False, scale=5)
        parts = raw.write_parts(tmp_path / "hub", size=1_000_000)
        before = {part: part.stat().st_mtime_ns for part in parts}
        images = sum(len(raw.files[row["image"]]) for row in raw.rows.values())
        assert images > 4_000_000
        used: list[int] = []

        def measure(*_: int) -> None:
            files = [path for path in tmp_path.rglob("*") if path.is_file() and path.parent != tmp_path / "hub"]
            used.append(sum(path.stat().st_size for path in files))

        @contextmanager
        def progress(*_: str) -> Iterator[Callable[[int, int], None]]:
            yield measure

        preparation.SHARD_BYTES = 2_000_000
        prepare_dataset(PrepareSettings(raw.annotations, tmp_path / "hub", tmp_path / "out"), progress=progress)
        measure()
        assert len(used) > 10
        assert max(used) < images * 1.2
        assert {part: part.stat().st_mtime_ns for part in (tmp_path / "hub").iterdir()} == before


class TestAgain:
    def test_what_is_prepared_is_not_prepared_anew(
        self, raw: RawSet, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        main(arguments(raw, tmp_path / "out"))
        table, before = capsys.readouterr().out, tree(tmp_path / "out")
        (tmp_path / "out.preparing").mkdir()  # as a kill after the last step leaves it
        monkeypatch.setattr(preparation, "prepare_dataset", None)
        main(arguments(raw, tmp_path / "out", "--allow_missing", "0"))
        assert capsys.readouterr().out == f"{tmp_path / 'out'} was prepared before\n{table}"
        assert tree(tmp_path / "out") == before
        assert not (tmp_path / "out.preparing").exists()
        with pytest.raises(
            UserError, match="was prepared with other max_side and validation_share: name another output"
        ):
            main(arguments(raw, tmp_path / "out", "--max_side", "9", "--validation_share", "0"))

    def test_checks_are_kept(self, raw: RawSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(UserError, match="rows cannot be used"):
            main(arguments(raw, tmp_path / "out", "--allow_missing", "0"))
        monkeypatch.setattr(checks, "open_image", None)
        main(arguments(raw, tmp_path / "out"))

    def test_what_was_mended_is_checked_and_nothing_else(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        raw = make_raw_set(tmp_path)
        folder = raw.write_folder(tmp_path / "images")
        command = arguments(raw, tmp_path / "out", "--images", str(folder), "--allow_missing", "0")
        with pytest.raises(UserError, match=rf"^{len(raw.skipped)} of "):
            main(command)
        good = raw.files["sqa/train/0/image.png"]
        (folder / "chartqa/train/9").mkdir()
        (folder / "chartqa/train/9/absent.png").write_bytes(good)  # it was missing
        (folder / "ai2d/short.png").write_bytes(good)  # it was broken
        lines = raw.annotations.read_bytes().splitlines(keepends=True)
        broken = next(line for line, reason in raw.skipped.items() if reason == "broken JSON")
        lines[broken - 1] = lines[-1]
        raw.annotations.write_bytes(b"".join([b"\n", *lines]))  # so that every row has another number too
        opened = count_calls(monkeypatch, checks, "open_image")
        capsys.readouterr()
        with pytest.raises(UserError, match=rf"^{len(raw.skipped) - 3} of "):
            main(command)
        assert opened == [good, good]
        assert capsys.readouterr().out.startswith("2 images were checked now, and 46 in an earlier run\n")
        main([*command, "--allow_missing", str(len(raw.skipped))])
        main([*command, "--output", str(tmp_path / "fresh"), "--allow_missing", str(len(raw.skipped))])
        assert tree(tmp_path / "out") == tree(tmp_path / "fresh")

    def test_shards_of_other_data_are_written_anew(
        self, raw: RawSet, tmp_path: Path, undisturbed: dict[str, bytes], caplog: pytest.LogCaptureFixture
    ) -> None:
        lines = raw.annotations.read_bytes().splitlines(keepends=True)
        (tmp_path / "fewer.jsonl").write_bytes(b"".join(lines[:20]))
        with pytest.MonkeyPatch.context() as patch, pytest.raises(TypeError):
            patch.setattr(preparation, "version", None)  # after all shards
            main(arguments(raw, tmp_path / "out", "--annotations", str(tmp_path / "fewer.jsonl")))
        with pytest.raises(UserError, match=r"finished work of a run with other max_side: .* remove .*scratch"):
            main(arguments(raw, tmp_path / "out", "--max_side", "20"))
        main(arguments(raw, tmp_path / "out"))
        assert "the annotations and images changed since" in caplog.text
        assert tree(tmp_path / "out") == undisturbed

    def test_a_shard_that_was_damaged_in_between(
        self, raw: RawSet, tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(TypeError):
            patch.setattr(preparation, "version", None)
            main(arguments(raw, tmp_path / "out"))
        shard = sorted((tmp_path / "out.preparing/result").glob("*.array_record-*"))[1]
        os.truncate(shard, shard.stat().st_size - 1)
        with pytest.raises(UserError, match=f"^{shard} is damaged: remove it and run the same command again$"):
            main(arguments(raw, tmp_path / "out"))
        shard.unlink()
        main(arguments(raw, tmp_path / "out"))
        assert tree(tmp_path / "out") == undisturbed

    def test_other_settings_after_a_refusal(self, raw: RawSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(UserError, match="rows cannot be used"):
            main(arguments(raw, tmp_path / "out", "--allow_missing", "0"))
        monkeypatch.setattr(checks, "open_image", None)
        main(arguments(raw, tmp_path / "out", "--validation_share", "0", "--max_side", "20"))
        rows = PreparedRows(tmp_path / "out", "train")
        assert len(rows) == len(raw.rows)
        assert max(Image.open(io.BytesIO(rows[0].images[0])).size) == 20

    def test_damaged_settings_of_a_run_begin_anew(
        self, raw: RawSet, tmp_path: Path, capsys: pytest.CaptureFixture[str], warnings_of: pytest.LogCaptureFixture
    ) -> None:
        with pytest.raises(UserError):
            main(arguments(raw, tmp_path / "out", "--allow_missing", "0"))
        settings = tmp_path / "out.preparing/settings.json"
        settings.write_text("cut")
        main(arguments(raw, tmp_path / "out"))
        assert warnings_of.messages == [f"{settings} is damaged: the output is written anew"]
        assert "0 images were checked now" in capsys.readouterr().out

    def test_one_at_a_time(self, raw: RawSet, tmp_path: Path) -> None:
        with WorkFolder(tmp_path / "out"), pytest.raises(UserError, match=r"out is being prepared by another process"):
            main(arguments(raw, tmp_path / "out"))


class TestRefusal:
    """The error is one line, before anything is written."""

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (["--annotations", "{tmp}/nowhere"], "annotations {tmp}/nowhere cannot be read: No such file or directory"),
            (
                ["--images", "{tmp}/nowhere"],
                "there is no {tmp}/nowhere, and no parts such as nowhere.part-aa beside it",
            ),
            (
                ["--images", "gs://bucket/image.zip"],
                "gs://bucket/image.zip is not on this machine, and raw data are read from a disk: copy it here first, "
                "as by `gcloud storage cp -r gs://bucket/image.zip .`",
            ),
            (["--annotations", "{tmp}"], "annotations {tmp} is a folder: name a file in it, such as train.jsonl"),
            (["--max_side", "0"], "max_side is 0; it must be at least 1"),
            (["--limit", "-1"], "limit is -1; it must be at least 1"),
            (["--workers", "-1"], "workers is -1; it must be at least 0"),
            (["--allow_missing", "-1"], "allow_missing is -1; it must be at least 0"),
            (["--validation_share", "1"], "validation_share is 1.0; it must be at least 0 and less than 1"),
            (["--output", "{tmp}/file"], "{tmp}/file exists and is no prepared data set: name another output"),
            (["--output", "{tmp}/file/out"], "{tmp}/file/out cannot be written: Not a directory"),
            (["--output", "{tmp}"], "{tmp} exists and is no prepared data set: name another output"),
        ],
    )
    def test_mistakes(
        self, raw: RawSet, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
    ) -> None:
        (tmp_path / "file").touch()
        before = set(tmp_path.iterdir())
        more = [argument.format(tmp=tmp_path) for argument in more]
        with pytest.raises(SystemExit, match="2"):
            cli.run(lambda: main(arguments(raw, tmp_path / "out", *more)))
        assert capsys.readouterr() == ("", f"error: {message.format(tmp=tmp_path)}\n")
        assert set(tmp_path.iterdir()) == before

    def test_parts_that_are_missing_or_cut_short(self, raw: RawSet, tmp_path: Path) -> None:
        parts = raw.write_parts(tmp_path / "hub")
        command = arguments(raw, tmp_path / "out", "--images", str(tmp_path / "hub/image.zip"))
        os.truncate(parts[-1], 10)
        with pytest.raises(
            UserError, match=rf"^{parts[-1]} is cut short, or parts after it are missing: fetch it again"
        ):
            main(command)
        parts[2].unlink()
        with pytest.raises(UserError, match=rf"^{tmp_path}/hub lacks image\.zip\.part-ac, though it has"):
            main(command)
        assert list(tmp_path.iterdir()) == [tmp_path / "hub"]

    def test_no_row_is_left(self, raw: RawSet, tmp_path: Path) -> None:
        (tmp_path / "train.jsonl").write_text("{}\n[]\n")
        with pytest.raises(UserError, match="none of the 2 rows can be used"):
            main(arguments(raw, tmp_path / "out", "--annotations", str(tmp_path / "train.jsonl")))
        assert not (tmp_path / "out").exists()


def workers_alive(pids: list[int]) -> list[int]:
    """Return those of the processes that are alive."""

    def alive(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        except FileNotFoundError:
            return False

    return [pid for pid in pids if alive(pid)]


AT_PROGRESS = """
import contextlib, multiprocessing
@contextlib.contextmanager
def progress_bar(label, unit):
    def on_progress(done, total):
        if label == {label!r} and 0 < done < total:
            print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
            {action}
    yield on_progress
cli.progress_bar = progress_bar
"""
"""Does something as soon as some of the work is done, but not all, and tells the workers."""

AT_CALL = """
import itertools
calls, original = itertools.count(1), {name}
def counted(*arguments):
    if next(calls) == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)
{name} = counted
"""


@pytest.mark.slow
class TestInterruption:
    def test_kills_of_one_process_leave_no_trace(
        self, raw: RawSet, tmp_path: Path, undisturbed: dict[str, bytes]
    ) -> None:
        """Killed four times: while checking, in the middle of a shard, while finishing, and just before the end."""
        out, work = tmp_path / "out", tmp_path / "out.preparing"
        kills = {
            "os.fsync": 4,
            "preparation.ShardWriter._record": 20,
            "preparation.LlavaCot100k._example_writer": 1,
            "work_folder.WorkFolder.remove": 1,
        }
        left = []
        for name, number in kills.items():
            result = run(arguments(raw, out), before=AT_CALL.format(name=name, number=number))
            assert result.returncode == -signal.SIGKILL, result.stderr
            left.append({path.name for path in work.rglob("*")})
        assert len([name for name in left[0] if re.fullmatch(r"[0-9a-f]{16}\.json", name)]) == 2
        assert any(name.endswith(".partial") for name in left[1])
        assert "dataset_info.json" not in left[2]
        assert out.exists()
        main(arguments(raw, out))
        assert tree(out) == undisturbed
        assert list(tmp_path.iterdir()) == [tmp_path / "out"]

    def test_a_kill_takes_the_workers_along(self, raw: RawSet, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
        out, work = tmp_path / "out", tmp_path / "out.preparing"
        with pytest.raises(UserError, match="rows cannot be used"):
            main(arguments(raw, out, "--allow_missing", "0"))  # so that everything is checked
        killing = AT_PROGRESS.format(label="writing", action="os.kill(os.getpid(), signal.SIGKILL)")
        result = run(arguments(raw, out, "--workers", "2"), before=killing)
        assert result.returncode == -signal.SIGKILL, result.stderr
        pids = list(map(int, result.stdout.splitlines()[-1].split()))
        assert len(pids) == 2
        for _ in range(1000):
            if not workers_alive(pids):
                break
            time.sleep(0.01)
        survivors = workers_alive(pids)
        for pid in survivors:
            os.kill(pid, signal.SIGKILL)
        assert not survivors
        assert list((work / "result").glob("*.array_record-*"))
        assert not out.exists()
        main(arguments(raw, out))
        assert tree(out) == undisturbed

    def test_ctrl_c(self, raw: RawSet, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
        """Sent to all processes of the group, as a terminal does."""
        out = tmp_path / "out"
        interrupting = AT_PROGRESS.format(label="checking", action="os.killpg(0, signal.SIGINT)")
        result = run(arguments(raw, out, "--workers", "2"), before=interrupting)
        assert (result.returncode, result.stderr) == (130, "interrupted\n")
        pids = list(map(int, result.stdout.split()))
        assert len(pids) == 2
        assert not workers_alive(pids)
        main(arguments(raw, out))
        assert tree(out) == undisturbed

    def test_a_worker_that_dies_is_said(self) -> None:
        with pytest.raises(UserError, match="a worker process died; it may have run out of memory: use fewer workers"):
            list(parallel(os._exit, [1], workers=1))

    def test_full_disk(self, raw: RawSet, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
        """The command runs on a disk of its own, which grows a little after each run that it stops."""
        disk = tmp_path / "disk"
        disk.mkdir()
        command = arguments(raw, disk / "out")
        script = f"""
import os, shutil, subprocess, sys
sys.path.insert(0, {str(ROOT)!r})
from llava_cot_jax import cli
from llava_cot_jax.data.raw import preparation
from llava_cot_jax.prepare import main
vars(preparation).update({SMALL})
size = 16
while True:
    try:
        cli.run(lambda: main({command!r}))
        break
    except SystemExit as end:
        assert end.code == 2
    assert not os.path.exists({str(disk / "out")!r})
    assert not any(".partial" in name for _, _, names in os.walk({str(disk)!r}) for name in names)
    size += 16
    subprocess.run(["mount", "-o", f"remount,size={{size}}k", {str(disk)!r}], check=True)
shutil.copytree({str(disk / "out")!r}, {str(tmp_path / "copy")!r})
"""
        shell = f'mount -t tmpfs -o size=16k tmpfs {disk} && exec "$0" -c "$1"'
        result = subprocess.run(
            ["unshare", "--map-root-user", "--mount", "sh", "-c", shell, sys.executable, script],
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        complaints = result.stderr.splitlines()
        assert len(complaints) > 10
        expected = f"error: no space left on the disk of {disk / 'out'}: free some, then run the same command again"
        assert set(complaints) == {expected}
        assert tree(tmp_path / "copy") == undisturbed
