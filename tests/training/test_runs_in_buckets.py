"""Checkpoints, locks and metrics that training keeps in a bucket, as an emulator serves one over HTTP."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier, local
from typing import Any

import jax
import numpy as np
import pytest

from llava_cot_jax.errors import UserError
from llava_cot_jax.model.checkpoint.digest import WeightsDigest
from llava_cot_jax.model.checkpoint.sharded_loading import load_params
from llava_cot_jax.paths import files_in
from llava_cot_jax.training import run_lock
from llava_cot_jax.training.checkpoints import Checkpoints, latest_valid_step, steps_in
from llava_cot_jax.training.export import RunExport
from llava_cot_jax.training.layout import CHECKPOINTS
from llava_cot_jax.training.metrics import MetricsWriter
from llava_cot_jax.training.run_lock import RunLock
from tests.buckets import bucket_folder, bucket_host, upload  # noqa: F401 - fixtures
from tests.training.small_run import write_small
from tests.training.test_export import KEPT, begin, save, tensors_of

pytestmark = pytest.mark.slow


def test_checkpoints_and_the_model_exported_from_them(folder, tmp_path) -> None:
    start = upload(write_small(tmp_path / "small"), folder / "small")
    run = begin(start, folder / "run", frozen_params=["^vision_model"])
    with Checkpoints(folder / "run" / CHECKPOINTS, KEPT) as checkpoints:
        checkpoints.try_saving(run.program.mesh)
    assert not (folder / "run" / CHECKPOINTS / ".trial").exists()
    save(run, folder / "run")
    assert steps_in(folder / "run" / CHECKPOINTS) == [3]
    with Checkpoints(folder / "run" / CHECKPOINTS, KEPT) as checkpoints:
        like = replace(run.program.state, frozen=run.state.frozen)
        state = checkpoints.restore(3, like)
    jax.tree.map(np.testing.assert_array_equal, state.trained, run.state.trained)
    jax.tree.map(np.testing.assert_array_equal, state.optimizer, run.state.optimizer)
    export_run = RunExport(folder / "run")
    export_run.write(folder / "exported", export_run.config)
    wanted = tensors_of(run.program, run.state)
    got = load_params(folder / "exported", export_run.config, layout="unrolled")
    assert wanted.keys() == got.keys()
    assert all(np.array_equal(got[name], wanted[name]) for name in wanted)


def test_weights_are_known_again_from_a_bucket(folder, tmp_path) -> None:
    """By what the bucket says of their file, of which nothing is read."""
    local = write_small(tmp_path / "small")
    digests = []
    for place in (local, upload(local, folder / "small")):
        with WeightsDigest(place) as digest:
            digests.append(digest.result())
    assert digests[0] == digests[1]
    (folder / "small/model.safetensors").write_bytes((local / "model.safetensors").read_bytes()[:-1] + b"?")
    with WeightsDigest(folder / "small") as digest:
        assert digest.result() != digests[0]


def test_a_damaged_one_is_set_aside(folder, tmp_path) -> None:
    start = upload(write_small(tmp_path / "small"), folder / "small")
    save(begin(start, folder / "run"), folder / "run", steps=(3, 4))
    checkpoints, told = folder / "run" / CHECKPOINTS, []
    assert latest_valid_step(checkpoints, told.append) == 4 and not told
    path = max((checkpoints / "4/model/ocdbt.process_0/d").iterdir(), key=lambda path: path.stat().length)
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    assert latest_valid_step(checkpoints, told.append) == 3
    assert len(told) == 1 and "its checksum differs; moved to" in told[0]
    assert (folder / "run/damaged/4/checksums.json").exists() and steps_in(checkpoints) == [3]


def test_one_run_at_a_time(folder, monkeypatch) -> None:
    """The bucket's lock is a file that is renewed: who finds one waits to see whether it is."""
    monkeypatch.setattr(run_lock, "RENEWAL_SECONDS", 0.2)
    (folder / "config.yaml").write_text("")
    file = folder / run_lock.LOCK_FILE
    with RunLock(folder):
        with pytest.raises(UserError, match=r"a run is under way there \(process"), RunLock(folder):
            pass
        left = file.read_text()
    assert not file.exists()
    file.write_text(left)  # as a run leaves it that was killed
    with RunLock(folder):
        assert file.read_text() != left
    assert files_in(folder) == {"config.yaml"}


@pytest.mark.parametrize("abandoned", [False, True])
def test_of_runs_that_begin_at_once_one_gets_the_bucket(folder, monkeypatch, abandoned) -> None:
    """All of them find no lock, or the same one of a run that was killed, before any has made its own."""
    monkeypatch.setattr(run_lock, "RENEWAL_SECONDS", 0.2)
    (folder / "config.yaml").write_text("")
    if abandoned:
        (folder / run_lock.LOCK_FILE).write_text('{"id": "dead", "renewals": 3, "process": "process 1 on a host"}')
    together, create = Barrier(4), run_lock._BucketLock._create
    first = local()

    def create_together(lock: Any, path: Path) -> bool:
        claims = path.name != run_lock.LOCK_FILE
        if claims == abandoned and not hasattr(first, "waited"):
            first.waited = True
            together.wait()
        return create(lock, path)

    monkeypatch.setattr(run_lock._BucketLock, "_create", create_together)
    locks = [run_lock._BucketLock(folder) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        refusals = list(pool.map(lambda lock: lock.acquire(), locks))
    assert refusals.count("") == 1, refusals
    winner = locks[refusals.index("")]
    assert json.loads((folder / run_lock.LOCK_FILE).read_text())["id"] == winner._id
    winner.release()
    assert files_in(folder) == {"config.yaml"}


def test_metrics(folder) -> None:
    for first, last in ((0, 4), (2, 5)):  # cut off after 4, gone on from 2
        with MetricsWriter(folder, {}, None, first) as metrics:
            for step in range(first + 1, last + 1):
                metrics.write(step, {"loss": step + first / 10, "mfu": None})
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [1.0, 2.0, 3.2, 4.2, 5.2]
    assert all(line.keys() == {"step", "loss"} for line in lines)
    assert len(list((folder / "tensorboard").iterdir())) == 2
