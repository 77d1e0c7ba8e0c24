"""Tests of batches on the mesh: their content, resuming, errors, and the end of threads and processes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llava_cot_jax.data.batching import FILLER
from llava_cot_jax.data.chat import Chat, SkippedConversation
from llava_cot_jax.data.loader import READY, Loader
from llava_cot_jax.data.prepared import PreparedRows
from llava_cot_jax.data.raw.preparation import prepare_dataset
from llava_cot_jax.data.rows import Mixture
from llava_cot_jax.data.settings import ChatSettings, LoaderSettings, PrepareSettings
from llava_cot_jax.errors import UserError
from llava_cot_jax.processing.messages import user_turn
from tests.data.raw.raw_set import make_raw_set
from tests.data.rows import Noise, demo_processor
from tests.data.stream import BATCHES, digest, make_loader

ROOT = Path(__file__).parents[2]
CHAT = ChatSettings(max_length=140)
ROWS = Noise(100)

Batch = dict[str, np.ndarray]


def mesh_of(*shape: int) -> NamedSharding:
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(*shape, 1)
    mesh = Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def make(cache):
    def make(rows=ROWS, chat=CHAT, sharding=None, *, shuffle=True, **settings) -> Loader:
        settings = {"batch_size": 8, "num_buckets": 3, "pad_to_multiple_of": 16, "num_threads": 2} | settings
        sharding = sharding or mesh_of(4, 2)
        return Loader(rows, demo_processor(), chat, LoaderSettings(**settings), sharding, shuffle=shuffle, cache=cache)

    return make


def read(loader: Loader, start: int, stop: int) -> list[Batch]:
    with closing(loader.batches(start, stop)) as batches:
        return [{name: np.asarray(array) for name, array in batch.items()} for batch in batches]


def same(some: list[Batch], others: list[Batch]) -> bool:
    return len(some) == len(others) and all(
        a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)
        for a, b in zip(some, others, strict=True)
    )


def test_a_batch_holds_what_the_processor_makes_of_its_rows(make):
    loader = make()
    processor, chat = demo_processor(), Chat(demo_processor(), CHAT)
    for batch in read(loader, 0, 5):
        length = batch["input_ids"].shape[1]
        assert length in loader.buckets
        for i, index in enumerate(batch["row"]):
            turn = ROWS.turns(index)[0]
            messages = [*user_turn(turn.question, images=1), {"role": "assistant", "content": turn.answer}]
            prompt = processor.prompt(messages, add_generation_prompt=False)
            expected = processor([prompt], [ROWS[index].images], length=length)
            for name, array in expected.items():
                np.testing.assert_array_equal(batch[name][i], array[0], err_msg=name)
            conversation = chat.encode(ROWS.turns(index))
            tokens = len(conversation.ids)
            np.testing.assert_array_equal(batch["loss_mask"][i, :tokens], conversation.loss_mask)
            np.testing.assert_array_equal(batch["stage"][i, :tokens], conversation.stage)
            assert not batch["loss_mask"][i, tokens:].any() and not batch["stage"][i, tokens:].any()
        assert batch["pixel_values"].dtype == np.uint8 and batch["loss_mask"].dtype == bool


class Varied(Noise):
    """Rows with 1, 0, 3 or 2 images in turn."""

    def turns(self, index):
        (turn,) = super().turns(index)
        return (replace(turn, images=(1, 0, 3, 2)[index % 4]),)

    def __getitem__(self, index):
        turns = self.turns(index)
        pictures = [super(Varied, self).__getitem__(1000 * index + i).images[0] for i in range(turns[0].images)]
        return replace(super().__getitem__(index), images=tuple(pictures), turns=turns)


@pytest.mark.parametrize(("image_buckets", "padded"), [(1, {0: 0, 1: 3, 2: 3, 3: 3}), (3, {0: 0, 1: 1, 2: 2, 3: 3})])
def test_rows_have_their_images_however_many(make, image_buckets, padded):
    loader = make(Varied(40, fingerprint="varied, 40"), num_buckets=1, num_image_buckets=image_buckets, shuffle=False)
    assert loader.image_buckets == tuple(sorted(set(padded.values()) - {0}))
    processor, rows = demo_processor(), Varied(40)
    shapes = set()
    for i, batch in enumerate(read(loader, 0, loader.batches_per_epoch)):
        used = [int(row) for row in batch["row"] if row != FILLER]
        count = max(padded[len(rows[row].images)] for row in used)
        shapes.add(count)
        assert batch.get("aspect_ratio_ids", np.zeros((8, 0))).shape == (8, count)
        assert loader.images(i).tolist() == [len(rows[row].images) for row in used]
        for place, row in enumerate(used):
            tokens = [batch["input_ids"][place, : batch["attention_mask"][place].sum()].tolist()]
            expected = processor.collate(tokens, [rows[row].images], length=batch["input_ids"].shape[1])
            own = len(rows[row].images)
            for name, array in expected.items():
                got = batch[name][place]
                if name == "cross_attention_mask":
                    assert not got[:, own:].any()
                    got = got[:, :own]
                elif name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
                    got = got[:own]
                np.testing.assert_array_equal(got, array[0], err_msg=name)
            assert own or not batch.get("cross_attention_mask", np.zeros((8, 1)))[place].any()
    assert shapes == set(padded.values())


def test_a_process_whose_rows_have_no_image_makes_the_shapes_of_the_others():
    """With several processes each makes its own part of a batch."""
    inputs = demo_processor().collate([[1, 2]], [[]], length=4, num_images=2)
    other = demo_processor().collate([[1, 640, 640]], [[Varied(4)[3].images[0]] * 2], length=4, num_images=2)
    assert {name: x.shape for name, x in inputs.items()} == {name: x.shape for name, x in other.items()}
    assert not inputs["cross_attention_mask"].any()


def test_rows_that_are_skipped_never_come(make):
    loader = make()
    rows = {row for batch in read(loader, 0, loader.batches_per_epoch) for row in batch["row"].tolist()}
    assert rows.isdisjoint(loader.index.skipped) and len(loader.index.skipped) == 12
    for row in loader.index.skipped:
        with pytest.raises(SkippedConversation):
            Chat(demo_processor(), CHAT).encode(ROWS.turns(row))


def test_batches_lie_on_the_mesh_as_asked(make):
    sharding = mesh_of(2, 2)
    (batch,) = make(sharding=sharding).batches(0, 1)
    for array in batch.values():
        assert array.sharding.is_equivalent_to(sharding, array.ndim)
        assert array.addressable_shards[0].data.shape[0] == 2


@pytest.mark.slow
def test_resumed_at_any_batch_it_goes_on_as_if_never_stopped(make):
    loader = make()
    stop = 2 * loader.batches_per_epoch + 1
    whole = read(loader, 0, stop)
    for start in range(1, stop):
        assert same(read(make(), start, min(start + 2, stop)), whole[start : start + 2])
    assert read(loader, stop, stop) == []


def test_evaluation_sees_every_row_once(make):
    loader = make(shuffle=False)
    batches = read(loader, 0, loader.batches_per_epoch)
    rows = np.concatenate([batch["row"] for batch in batches])
    assert sorted(rows[rows != FILLER].tolist()) == np.flatnonzero(loader.index.lengths).tolist()
    assert (rows == FILLER).sum() == -np.count_nonzero(loader.index.lengths) % 8
    for batch in batches:
        trained = batch["loss_mask"].any(axis=1)
        np.testing.assert_array_equal(trained, batch["row"] != FILLER)
        assert not batch["stage"][~trained].any()


def test_the_evaluation_of_fewer_rows_than_a_batch(make):
    (batch,) = read(make(Noise(3, fingerprint="three"), shuffle=False), 0, 1)
    assert batch["row"].tolist() == [0, 2, 1, *[FILLER] * 5]


def test_padding_is_the_share_of_tokens_without_attention(make):
    loader = make()
    batches = read(loader, 0, loader.batches_per_epoch)
    used = sum(int(batch["attention_mask"].sum()) for batch in batches)
    total = sum(batch["attention_mask"].size for batch in batches)
    assert loader.padding() == pytest.approx(1 - used / total)


def test_the_fingerprint_tells_other_batches(make):
    others = [
        make(),
        make(batch_size=16),
        make(num_buckets=1),
        make(Varied(100, fingerprint="varied")),
        make(Varied(100, fingerprint="varied"), num_image_buckets=1),
        make(pad_to_multiple_of=8),
        make(seed=1),
        make(shuffle=False),
        make(chat=ChatSettings(max_length=160)),
        make(Noise(101, fingerprint="more")),
    ]
    assert len({loader.fingerprint for loader in others}) == len(others)
    assert make(num_threads=1, num_workers=1, sharding=mesh_of(1, 2)).fingerprint == others[0].fingerprint


def test_several_sets_come_by_their_weights(make):
    """Each row as it comes from its own set, from any batch on; other weights are other batches."""
    parts = (Noise(30, fingerprint="thirty"), Varied(40, fingerprint="varied, 40"))
    loader = make(Mixture(parts, (1.0, 1.5)), num_buckets=1, num_image_buckets=1)
    own = [make(part, num_buckets=1, num_image_buckets=1).index for part in parts]
    assert loader.index.lengths.tolist() == [*own[0].lengths, *own[1].lengths]
    assert loader.index.skipped == own[0].skipped | {30 + i: reason for i, reason in own[1].skipped.items()}
    usable = [int(np.count_nonzero(index.lengths)) for index in own]
    assert loader.sets == [(usable[0], 1.0), (usable[1], 1.5)]
    assert loader.batches_per_epoch == (sum(usable) + round(usable[1] / 2)) // 8
    batches = read(loader, 0, loader.batches_per_epoch + 2)
    assert same(read(make(Mixture(parts, (1.0, 1.5)), num_buckets=1, num_image_buckets=1), 3, 5), batches[3:5])
    chat = Chat(demo_processor(), CHAT)
    for batch in batches:
        for place, row in enumerate(batch["row"].tolist()):
            ids = chat.encode(parts[row >= 30].turns(row - 30 * (row >= 30))).ids
            assert batch["input_ids"][place, : len(ids)].tolist() == ids
    others = [(1.0, 1.0), (1.0, 2.0), (2.0, 1.5)]
    assert len({make(Mixture(parts, weights)).fingerprint for weights in others} | {loader.fingerprint}) == 4


def test_where_nothing_is_left_of_an_epoch_the_next_one_comes(make):
    """Rows that came four times when they were to come five times have come often enough for a weight of 3."""
    rows = Noise(30, fingerprint="thirty")
    many, few = (make(Mixture((rows,), (weight,)), sharding=mesh_of(1, 2), batch_size=2) for weight in (5.0, 3.0))
    few.start_at(many.place(many.batches_per_epoch - 1))
    assert few.batches_until(1) == few.start.batches == many.batches_per_epoch - 1
    assert np.bincount(few.rows_of_epoch()).tolist() == (3 * (few.index.lengths > 0)).tolist()


class Damaged(Noise):
    """Rows of which row 5 has half an image."""

    def __getitem__(self, index):
        row = super().__getitem__(index)
        (image,) = row.images
        return replace(row, images=(image[: len(image) // 2],)) if index == 5 else row


class Changed(Noise):
    """Rows of which row 5 has changed since its tokens were counted."""

    def __getitem__(self, index):
        row = super().__getitem__(index)
        return replace(row, turns=self.turns(2)) if index == 5 else row


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("grain")]


def wait_for_readers() -> None:
    for thread in readers():
        thread.join(timeout=10)
    assert not readers()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (Damaged(100), r"row 5 \(noise-5\): the image of \d+ bytes cannot be decoded"),
        (Changed(100), r"row 5 \(noise-5\) was changed since .* it has \d+ tokens, but \d+ in the index"),
    ],
)
def test_a_fault_names_its_row(make, rows, message):
    with pytest.raises(UserError, match=message):
        read(make(rows), 0, 12)
    wait_for_readers()


def test_a_reader_that_stops_early_leaves_nothing_running(make):
    batches = make().batches(0, 1000)
    next(batches)
    assert readers()
    batches.close()
    wait_for_readers()


def test_it_reads_ahead_by_a_few_batches_alone(make):
    """A batch of tiles of the 11B model takes 120 MB, so that only a few batches may be read ahead."""
    started: list[int] = []

    class Watched(Noise):
        def __getitem__(self, index):
            started.append(index)
            return super().__getitem__(index)

    with closing(make(Watched(100)).batches(0, 1000)) as batches:
        next(batches)
        seen = -1
        while seen != len(started):  # until it has read all that it will
            seen = len(started)
            time.sleep(0.5)
    assert 8 * (1 + READY) <= len(started) <= 8 * (READY + 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"num_threads": 0}, "num_threads is 0"),
        ({"num_image_buckets": 0}, "num_image_buckets is 0"),
        ({"batch_size": 12}, "a batch of 12 rows does not divide over the devices"),
        ({"batch_size": 96}, "88 rows do not fill a batch of 96"),
    ],
)
def test_wrong_settings(make, settings, message):
    with pytest.raises(UserError, match=message):
        make(**settings)


@contextmanager
def stream(*arguments: Path) -> Iterator[tuple[subprocess.Popen, list[int], list[str]]]:
    """Start a process that streams from two workers. Give the process, the workers' ids, and digests of batches."""
    command = [sys.executable, "-m", "tests.data.stream", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            said = json.loads(process.stdout.readline())
            assert len(said["workers"]) == 2
            yield process, said["workers"], said["digests"]
        finally:
            process.kill()


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def wait_for_the_end(pids: list[int]) -> None:
    deadline = time.monotonic() + 60
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker process lives on"
        time.sleep(0.1)


@pytest.mark.slow
def test_workers_make_the_same_batches_and_a_dead_one_ends_the_run_with_one_line(cache):
    with stream(cache) as (process, workers, digests):
        assert digests == [digest(batch) for batch in read(make_loader(ROWS, cache, workers=0), 0, BATCHES)]
        os.kill(workers[1], signal.SIGKILL)
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 2
        assert "error: a worker process of the data died" in errors and "Traceback" not in errors
        wait_for_the_end(workers)


@pytest.mark.slow
def test_workers_do_not_outlive_a_killed_run(cache):
    with stream(cache) as (process, workers, _):
        process.kill()
        _, errors = process.communicate(timeout=60)
        assert "leaked" not in errors  # Python frees the batches that were under way in shared memory
        wait_for_the_end(workers)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_worker_that_meets_a_damaged_record_names_it(tmp_path):
    raw = make_raw_set(tmp_path, faults=False)
    images = raw.write_folder(tmp_path / "images")
    prepare_dataset(PrepareSettings(raw.annotations, images, tmp_path / "data", validation_share=0))
    rows = PreparedRows(tmp_path / "data", "train")
    late = read(make_loader(rows, tmp_path, workers=0), 10, 11)[0]["row"][0]
    (shard,) = (tmp_path / "data").glob("*-train.array_record-*")
    content = bytearray(shard.read_bytes())
    content[content.index(rows[late].images[0]) + 20] ^= 1
    shard.write_bytes(content)
    with stream(tmp_path, tmp_path / "data") as (process, workers, _):
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 2
        assert f"error: record {late} of the split 'train' is damaged: restore {shard}" in errors
        assert "Traceback" not in errors
        wait_for_the_end(workers)
