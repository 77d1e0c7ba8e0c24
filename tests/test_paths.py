"""Buckets, as an emulator of Google Cloud Storage serves them over HTTP: the same results as from a disk."""

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from gcp_storage_emulator import server as emulator

from llava_cot_jax import Mllama, Processor
from llava_cot_jax.convert import main as convert
from llava_cot_jax.data.prepared import PreparedRows
from llava_cot_jax.data.raw import preparation
from llava_cot_jax.data.settings import PrepareSettings
from llava_cot_jax.data.sources import open_rows
from llava_cot_jax.errors import TransientError, UserError
from llava_cot_jax.files import usable_cache
from llava_cot_jax.model.checkpoint import reading, writing
from llava_cot_jax.model.checkpoint.folder import read_config, resolve_checkpoint
from llava_cot_jax.model.checkpoint.reading import StoredTensor, locate_tensors, read_slices
from llava_cot_jax.model.checkpoint.sharded_loading import load_params
from llava_cot_jax.model.checkpoint.sharded_saving import save_params
from llava_cot_jax.model.parameters import ParamLayout
from llava_cot_jax.model.sharding import make_mesh
from llava_cot_jax.paths import as_path, bucket_filesystem, files_in, is_remote, reading_errors
from llava_cot_jax.prepare import main as prepare
from tests.buckets import bucket_folder, bucket_host, upload  # noqa: F401 - fixtures
from tests.data.raw.raw_set import make_raw_set
from tests.demo import write_demo

FIXTURE = Path(__file__).parent / "fixtures/mllama_tiny"
CONFIG = read_config(FIXTURE)
BYTES = 2_024_492  # of the fixture's tensors


@pytest.fixture(scope="module")
def model(host: None) -> Path:
    """The tiny checkpoint."""
    return upload(FIXTURE, as_path("gs://bucket/model"))


class TestNames:
    def test_local_paths_are_those_of_pathlib(self) -> None:
        assert as_path("a/b") == as_path(Path("a/b")) == Path.cwd() / "a/b"
        assert isinstance(as_path("a/b"), Path)
        assert as_path("~/a") == Path.home() / "a"
        assert not is_remote("a/b") and not is_remote(as_path("/a/b"))

    def test_of_a_bucket(self) -> None:
        path = as_path("gs://bucket/a/")
        assert str(path) == "gs://bucket/a"
        assert path == as_path(path) == as_path(Path("gs://bucket/a"))
        assert is_remote(path) and is_remote("gs://bucket/a") and is_remote(Path("gs://bucket/a"))

    def test_urls_of_this_machine(self) -> None:
        for url in ("file:///a%20b/c%C3%A9.png", "file://localhost/a%20b/cé.png"):
            assert as_path(url) == Path("/a b/cé.png")
        for url in ("file://other/a", "file://"):
            with pytest.raises(UserError, match=f"^{url} names no file of this machine"):
                as_path(url)

    @pytest.mark.parametrize("value", [None, 3, ["a"], b"a"])
    def test_what_is_no_text(self, value: object) -> None:
        with pytest.raises(UserError, match=r"^a path is .*; name a file or a folder$"):
            as_path(value)

    @pytest.mark.parametrize("name", ["s3://bucket/a", "https://storage.googleapis.com/a", "ftp://a/b"])
    def test_other_schemes(self, name: str) -> None:
        scheme = name.partition("://")[0]
        with pytest.raises(UserError, match=f"^{name}: {scheme}:// is not supported; give a local path or gs://"):
            as_path(name)

    def test_no_bucket(self) -> None:
        with pytest.raises(UserError, match=r"^gs:// names no bucket"):
            as_path("gs://")

    def test_without_gcsfs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "gcsfs", None)
        with pytest.raises(UserError, match=r"^gs://bucket/a needs gcsfs: pip install 'llava-cot-jax\[gcs\]'$"):
            as_path("gs://bucket/a")
        assert as_path("a") == Path.cwd() / "a"


class TestRefusals:
    @pytest.fixture(autouse=True)
    def guarded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two more buckets, which answer as Google does without credentials and without permission."""
        answer = emulator.RequestHandler.do_GET

        def guard(handler: Any) -> None:
            for bucket, status, message in (
                ("private", 401, "Anonymous caller does not have storage.objects.list access."),
                ("closed", 403, "somebody@example.com does not have storage.objects.list access."),
            ):
                if f"/b/{bucket}/" in handler.path:
                    handler.send_response(status)
                    handler.end_headers()
                    handler.wfile.write(json.dumps({"error": {"code": status, "message": message}}).encode())
                    return
            answer(handler)

        monkeypatch.setattr(emulator.RequestHandler, "do_GET", guard)

    @pytest.mark.parametrize("read", [resolve_checkpoint, Processor.from_pretrained, lambda p: open_rows(p, "train")])
    @pytest.mark.parametrize(
        ("bucket", "reason"),
        [
            ("private", "needs credentials: run `gcloud auth application-default login`"),
            ("closed", "is closed to your credentials: ask for the role Storage Object User on the bucket"),
        ],
    )
    def test_no_access(self, read: Callable[[str], Any], bucket: str, reason: str) -> None:
        with pytest.raises(UserError, match=f"^gs://{bucket}/a(/[a-z.]+)? {reason}$"):
            read(f"gs://{bucket}/a")

    def test_no_network(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        async def at_once(_: float) -> None:
            """Instead of gcsfs's wait before it tries again."""

        monkeypatch.setattr("gcsfs.retry.asyncio.sleep", at_once)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://localhost:1")
        with pytest.raises(
            TransientError, match=r"^gs://bucket/a cannot be reached, is there a network\? \(.*localhost:1"
        ):
            resolve_checkpoint("gs://bucket/a")
        assert not caplog.records  # one line is enough

    def test_a_cache_is_done_without(
        self, monkeypatch: pytest.MonkeyPatch, warnings_of: pytest.LogCaptureFixture, folder: Path
    ) -> None:
        """Within seconds, although every access to a bucket that is out of reach is repeated for minutes."""
        assert usable_cache(folder, "programs") == folder and not warnings_of.messages
        assert usable_cache(as_path("gs://nowhere/a"), "programs") is None
        monkeypatch.setattr("llava_cot_jax.files.BUCKET_SECONDS", 0.01)
        at_end = Event()
        monkeypatch.setattr(type(folder), "write_bytes", lambda *_: at_end.wait())
        assert usable_cache(folder, "programs") is None
        at_end.set()
        told = [message.partition(";")[0] for message in warnings_of.messages]
        assert told == [
            "programs cannot be kept in gs://nowhere/a: does not exist (or its bucket does not)",
            f"programs cannot be kept in {folder}: the bucket did not answer within 0.01 s",
        ]

    @pytest.mark.parametrize("name", ["gs://nowhere/a", "gs://bucket/a"])
    def test_nothing_there(self, name: str, tmp_path: Path) -> None:
        for read in (resolve_checkpoint, Mllama.from_pretrained, lambda name: convert([name, str(tmp_path / "out")])):
            with pytest.raises(UserError, match=f"^{name} does not exist"):
                read(name)
        with pytest.raises(UserError, match=f"^{name}/config.json does not exist"):
            Processor.from_pretrained(name)
        with pytest.raises(UserError, match=f"^{name} is no prepared data set"):
            open_rows(name, "train")

    def test_writing_to_no_bucket(self) -> None:
        with pytest.raises(UserError, match=r"^gs://nowhere/a does not exist \(or its bucket does not\)$"):
            convert([str(FIXTURE), "gs://nowhere/a"])

    def test_preparing(self) -> None:
        arguments = ["--annotations", "a.jsonl", "--images", "images", "--output", "gs://bucket/a"]
        with pytest.raises(UserError, match="name a local folder, then copy it by `gcloud storage cp -r"):
            prepare(arguments)

    def test_the_users_own_mistakes_pass(self, folder: Path) -> None:
        with pytest.raises(UserError, match=r"^mine$"), reading_errors(folder):
            raise UserError("mine")
        with pytest.raises(KeyError), reading_errors(folder):
            raise KeyError


class TestCheckpoint:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("sizes", "layout"),
        [
            (None, "stacked"),
            ((8, 1, 1), "unrolled"),
            ((1, 8, 1), "unrolled"),
            ((4, 1, 2), "stacked"),
            ((2, 2, 2), "unrolled"),
        ],
        ids=str,
    )
    def test_same_arrays_as_from_a_disk(
        self, model: Path, sizes: tuple[int, int, int] | None, layout: ParamLayout, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mesh = None if sizes is None else make_mesh(*sizes)
        expected = load_params(FIXTURE, CONFIG, layout=layout, mesh=mesh)
        counts = count_requests(monkeypatch)
        progress: list[tuple[int, int]] = []
        arrays = load_params(model, CONFIG, layout=layout, mesh=mesh, on_progress=lambda *c: progress.append(c))
        assert arrays.keys() == expected.keys()
        for path, array in expected.items():
            assert arrays[path].sharding == array.sharding
            np.testing.assert_array_equal(arrays[path], array)
        header = counts[0] + counts[1]
        assert sum(counts) - header == BYTES
        assert progress[-1] == (BYTES, BYTES)

    @pytest.mark.slow
    def test_several_files(self, folder: Path) -> None:
        arrays = load_params(FIXTURE, CONFIG, layout="stacked")
        save_params(arrays, CONFIG, folder, max_file_bytes=700_000)
        assert len(files_in(folder)) > 4
        again = load_params(resolve_checkpoint(folder), read_config(folder), layout="stacked")
        assert all(np.array_equal(again[path], arrays[path]) for path in arrays)
        missing = next(iter(sorted(folder.glob("*.safetensors"))))
        missing.unlink()
        with pytest.raises(UserError, match=f"^{missing} does not exist, though model.safetensors.index.json names it"):
            locate_tensors(folder, CONFIG)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda whole: whole[:4], "a header of"),
            (lambda whole: whole[:1000], "a header of"),
            (lambda whole: whole[:-1], "bytes, but by its header"),
            (lambda whole: whole + b"\0", "bytes, but by its header"),
            (lambda whole: whole[:8] + b"?" + whole[9:], "Expecting value"),
            (lambda whole: whole.replace(b'"shape":[64]', b'"shape":[63]', 1), "do not match its shape or the"),
            (lambda whole: whole.replace(b'"dtype"', b'"dtypo"', 1), "dtype"),
        ],
    )
    def test_damaged(self, folder: Path, change: Callable[[bytes], bytes], reason: str) -> None:
        whole = (FIXTURE / "model.safetensors").read_bytes()
        changed = change(whole)
        assert changed != whole
        (folder / "model.safetensors").write_bytes(changed)
        with pytest.raises(UserError, match=rf"^{folder}/model\.safetensors is damaged or cut short \(.*{reason}"):
            locate_tensors(folder, CONFIG)

    def test_cut_short_after_the_check(self, folder: Path) -> None:
        upload(FIXTURE, folder)
        stored = locate_tensors(folder, CONFIG)["language_model.lm_head.weight"]
        stored.file.write_bytes((FIXTURE / "model.safetensors").read_bytes()[: stored.offset + 100])
        with pytest.raises(UserError, match=r"model\.safetensors ended early"):
            read_slices(stored, {((0, 256), (0, 64)): np.empty((256, 64), np.float32)})


def count_requests(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes that each request for a part of a weight file brings, from now on."""
    counts: list[int] = []
    read = reading._read_range

    def counting(path: Path, start: int, stop: int) -> bytes:
        content = read(path, start, stop)
        counts.append(len(content))
        return content

    monkeypatch.setattr(reading, "_read_range", counting)
    return counts


class TestReading:
    """Boxes of a tensor of three axes, of rows of 320 bytes, against numpy's slices."""

    @pytest.mark.parametrize(
        ("boxes", "read"),
        [
            ([((0, 6), (0, 8), (0, 10))], 6 * 320),
            ([((2, 5), (0, 8), (0, 10))], 3 * 320),
            ([((3, 4), (1, 3), (0, 10))], 80),
            ([((0, 3), (0, 4), (0, 10)), ((0, 3), (4, 8), (0, 10)), ((3, 6), (0, 8), (0, 10))], 6 * 320),
            ([((0, 6), (0, 2), (0, 10)), ((0, 6), (6, 8), (0, 10))], 6 * 320),
            ([((1, 3), (2, 4), (5, 9))], None),
        ],
    )
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("request_bytes", [1, 700, 1 << 20])
    def test_boxes(
        self,
        folder: Path,
        boxes: list[reading.TensorSlice],
        read: int | None,
        dtype: str,
        request_bytes: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(reading, "_REQUEST_BYTES", request_bytes)
        counts = count_requests(monkeypatch)
        values = np.arange(480, dtype=np.float32).reshape(6, 8, 10)
        (folder / "raw").write_bytes(b"head" + values.tobytes())
        stored = StoredTensor("x", folder / "raw", 4, values.shape, "F32")
        shards = {box: np.empty(reading.slice_shape(box), dtype) for box in boxes}
        count = read_slices(stored, shards)
        assert count == sum(counts) == reading.bytes_to_read(stored, boxes)
        assert read in (None, count)
        for box, shard in shards.items():
            np.testing.assert_array_equal(shard, values[tuple(slice(*span) for span in box)].astype(dtype))

    @pytest.mark.parametrize(
        ("request_bytes", "requests", "read"), [(1, 100, 800), (400, 10, 3_680), (1 << 20, 1, 3_968)]
    )
    def test_narrow_shards_are_read_with_what_lies_between(
        self, folder: Path, request_bytes: int, requests: int, read: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two of ten columns of float32, a hundred rows: a request for many of them, of all between."""
        monkeypatch.setattr(reading, "_REQUEST_BYTES", request_bytes)
        counts = count_requests(monkeypatch)
        values = np.arange(1000, dtype=np.float32).reshape(100, 10)
        (folder / "raw").write_bytes(values.tobytes())
        stored = StoredTensor("x", folder / "raw", 0, values.shape, "F32")
        shard = np.empty((100, 2), np.float32)
        assert read_slices(stored, {((0, 100), (4, 6)): shard}) == read
        assert (len(counts), sum(counts)) == (requests, read)
        np.testing.assert_array_equal(shard, values[:, 4:6])


class TestWriting:
    def test_convert_there_and_back(self, folder: Path, tmp_path: Path) -> None:
        source = shutil.copytree(FIXTURE, tmp_path / "source", ignore=shutil.ignore_patterns("*.npz"))
        (source / "chat_template.jinja").write_text("{}")
        convert([str(source), str(folder)])
        assert files_in(folder) == files_in(source)
        convert([str(folder), str(tmp_path / "back")])
        for name in files_in(source) - {"config.json", "model.safetensors"}:
            assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
        assert read_config(tmp_path / "back") == CONFIG

    def test_save_pretrained(self, folder: Path) -> None:
        model = Mllama.from_pretrained(FIXTURE)
        model.save_pretrained(str(folder))
        assert files_in(folder) == {"config.json", "model.safetensors"}
        again = Mllama.from_pretrained(str(folder))
        assert again.config == model.config
        held, expected = flatten_dict(again.params, sep="."), flatten_dict(model.params, sep=".")
        assert all(np.array_equal(held[path], expected[path]) for path in expected)

    def test_what_is_there_stays(self, folder: Path) -> None:
        (folder / "notes").write_text("mine")
        with pytest.raises(UserError, match=f"^{folder} exists and is not empty"):
            convert([str(FIXTURE), str(folder)])
        assert files_in(folder) == {"notes"}

    def test_onto_itself(self, folder: Path) -> None:
        upload(FIXTURE, folder)
        with pytest.raises(UserError, match="is the checkpoint to be converted"):
            convert([str(folder), f"{folder}/"])

    @pytest.mark.parametrize("failing", ["_write_value", "write_json"])
    @pytest.mark.parametrize("dies", [False, True])
    def test_half_written_is_no_checkpoint(
        self, folder: Path, failing: str, dies: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Deleted where the process can still do so; and where it dies, nothing that loads is left."""
        calls, write = 0, getattr(writing, failing)

        def fail(*arguments: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == (100 if failing == "_write_value" else 1):
                raise OSError("Forbidden: quota\nused up")
            write(*arguments)

        monkeypatch.setattr(writing, failing, fail)
        if dies:
            monkeypatch.setattr(bucket_filesystem(), "rm", None)
        with pytest.raises(UserError, match=f"^{folder} is closed to your credentials"):
            convert([str(FIXTURE), str(folder)])
        monkeypatch.undo()
        assert bucket_filesystem().exists(str(folder)) == dies
        with pytest.raises(UserError, match=r"holds no config\.json" if dies else "does not exist"):
            resolve_checkpoint(folder)


class TestProcessor:
    @pytest.fixture(scope="class")
    def demo(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        path = tmp_path_factory.mktemp("demo") / "model"
        write_demo(path)
        return path

    def test_same_as_from_a_disk(self, folder: Path, demo: Path) -> None:
        upload(demo, folder)
        ours, local = Processor.from_pretrained(str(folder)), Processor.from_pretrained(demo)
        messages = [{"role": "user", "content": "What is this?"}]
        assert ours.prompt(messages) == local.prompt(messages)
        assert ours.config == local.config
        assert pickle.loads(pickle.dumps(ours)).prompt(messages) == local.prompt(messages)

    def test_faults_are_named_where_they_are(self, folder: Path, demo: Path) -> None:
        upload(demo, folder)
        (folder / "tokenizer.json").write_text("{")
        with pytest.raises(UserError, match=f"^the tokenizer in {folder} cannot be read"):
            Processor.from_pretrained(folder)
        (folder / "tokenizer.json").unlink()
        with pytest.raises(UserError, match=f"^{folder} lacks tokenizer.json: copy"):
            Processor.from_pretrained(folder)


class TestPreparedRows:
    @pytest.fixture(scope="class")
    def local(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """In two shards for training."""
        root = tmp_path_factory.mktemp("raw")
        raw = make_raw_set(root, faults=False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(preparation, "SHARD_ROWS", 30)
            settings = PrepareSettings(raw.annotations, raw.write_folder(root / "images"), root / "out")
            preparation.prepare_dataset(settings)
        return root / "out"

    @pytest.fixture
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        return tmp_path / "llava_cot_jax/turns"

    def test_same_as_from_a_disk(self, folder: Path, local: Path, cache: Path) -> None:
        rows, expected = open_rows(str(upload(local, folder)), "train"), PreparedRows(local, "train")
        assert rows.fingerprint == expected.fingerprint
        assert [rows[i] for i in range(len(rows))] == [expected[i] for i in range(len(expected))]
        again = pickle.loads(pickle.dumps(rows))
        assert (again[3], again.turns(3)) == (expected[3], expected.turns(3))
        assert len(list(cache.iterdir())) == 1

    def test_conversations_that_were_replaced_are_read_anew(self, folder: Path, local: Path, cache: Path) -> None:
        upload(local, folder)
        turns = PreparedRows(folder, "train").turns(0)
        path = folder / "train.turns.jsonl"
        path.write_bytes(path.read_bytes().replace(turns[0].question[-9:].encode(), b"something", 1))
        assert PreparedRows(folder, "train").turns(0)[0].question == turns[0].question[:-9] + "something"

    def test_what_is_missing_is_named(self, folder: Path, local: Path, cache: Path) -> None:
        upload(local, folder)
        shard = next(iter(sorted(folder.glob("*-train.array_record-*"))))
        shard.unlink()
        with pytest.raises(UserError, match=f"record 0 of the split 'train' is damaged: restore {shard}"):
            PreparedRows(folder, "train")[0]
        (folder / "train.turns.jsonl").unlink()
        with pytest.raises(UserError, match=rf"^{folder}/train\.turns\.jsonl does not exist"):
            PreparedRows(folder, "train").turns(0)
